"""Scores of compared rows with their intervals and differences (no torch)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research.compare.rows import MAX_NAMED_RUNS, Key, Member, Row, differing_flags, find_runs, gather_rows
from research.errors import InputError
from research.evaluation.bootstrap import (
    RESAMPLES,
    Difference,
    Estimate,
    Metric,
    bootstrap,
    build_metric,
    estimate,
    holm,
    mean_and_std,
    paired_difference,
    paired_t_test,
    score_rows,
)
from research.names import HEADLINE_METRIC, METRIC_OF
from research.runs.formats import dig

FloatArray = npt.NDArray[np.floating[Any]]
BOOTSTRAP_SEED = 0  # the same comparison twice prints the same bytes


@dataclass(frozen=True)
class Result:
    """A row's figures; `difference` is None for the baseline. p values are nan where nothing could be tested."""

    row: Row
    estimate: Estimate
    values: tuple[float, ...]
    std: float
    difference: Difference | None
    p_holm: float = math.nan
    p_members: float = math.nan
    p_members_holm: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """Everything a table or a figure shows."""

    metric: str
    part: str
    resamples: int
    group_by: str | None
    flags: tuple[str, ...]
    results: tuple[Result, ...]
    unfinished: tuple[Path, ...]
    baseline_note: str

    @property
    def baseline(self) -> Result:
        """The row that every other is compared with."""
        return next(result for result in self.results if result.difference is None)

    @property
    def grouped(self) -> bool:
        """Whether a row stands for several runs."""
        return any(len(result.values) > 1 for result in self.results)

    @property
    def unit(self) -> str:
        """What the runs of a row differ by: "seed" or "fold"."""
        return "seed" if self.group_by == "seed" else "fold"


def check_same_rows(rows: Sequence[Row], part: str) -> None:
    """Refuse a comparison of scores that were measured on different rows.

    Members with the same seed and fold must have been tested on the same rows; members of other seeds or
    folds may have other rows of the same table, which must then carry the same labels.

    Raises:
        InputError: naming the runs that differ from the first.
    """
    members = [member for row in rows for member in row.members]
    first = members[0]
    expected = first.predictions.label_names
    _refuse([m for m in members if m.predictions.label_names != expected], first, "other label columns")
    references: dict[Key, Member] = {}
    for member in members:
        references.setdefault(member.key, member)
    for key, reference in references.items():
        paired = [member for member in members if member.key == key]
        hint = " Runs whose seeds split the data anew need --group_by seed." if key == (None, None) else ""
        _refuse([m for m in paired if not _same_part(reference, m, part)], reference, f"another {part} part", hint)
    _refuse([m for m in references.values() if not _same_table(first, m)], first, "another table")


def _same_part(reference: Member, member: Member, part: str) -> bool:
    hashes = (reference.data.get("test_sha256"), member.data.get("test_sha256"))
    if part == "test" and None not in hashes and hashes[0] != hashes[1]:
        return False
    ours, theirs = reference.predictions, member.predictions
    return np.array_equal(ours.index, theirs.index) and np.array_equal(ours.labels, theirs.labels, equal_nan=True)


def _same_table(reference: Member, member: Member) -> bool:
    hashes = (reference.data.get("dataset_sha256"), member.data.get("dataset_sha256"))
    if reference.key != member.key and None not in hashes and hashes[0] != hashes[1]:
        return False
    ours, theirs = reference.predictions, member.predictions
    _, here, there = np.intersect1d(ours.index, theirs.index, return_indices=True)
    return np.array_equal(ours.labels[here], theirs.labels[there], equal_nan=True)


def _refuse(differing: Sequence[Member], reference: Member, what: str, hint: str = "") -> None:
    if not differing:
        return
    names = ", ".join(str(member.run.path) for member in differing[:MAX_NAMED_RUNS])
    more = f" and {len(differing) - MAX_NAMED_RUNS} more" if len(differing) > MAX_NAMED_RUNS else ""
    raise InputError(
        f"{names}{more}: {what} than {reference.run.path}, so the scores cannot be compared. Leave out one or the other.{hint}"
    )


@dataclass(frozen=True)
class Scores:
    """Every member's plain score and its (R,) scores on the shared resamples, by the member's directory and model."""

    plain: dict[tuple[Path, str], float]
    resampled: dict[tuple[Path, str], FloatArray]

    def of(self, members: Sequence[Member]) -> list[float]:
        """Return the members' plain scores."""
        return [self.plain[member.run.path, member.model] for member in members]

    def mean(self, members: Sequence[Member]) -> tuple[float, FloatArray]:
        """Return the members' mean score and its (R,) resampled values."""
        replicates = np.mean([self.resampled[member.run.path, member.model] for member in members], axis=0)
        return float(np.mean(self.of(members))), replicates


def score_members(members: Sequence[Member], metric: str, resamples: int) -> Scores:
    """Score members on the same resampled rows.

    The rows of all parts are resampled together by their place in the table, so a comment that two seeds
    test on is drawn for both or for neither.
    """
    table = np.unique(np.concatenate([member.predictions.index for member in members]))
    metrics = [_restrict(_build_metric(member, metric), member.predictions.index, table) for member in members]
    keys = [(member.run.path, member.model) for member in members]
    plain = score_rows(metrics, len(table)).tolist()
    replicates = bootstrap(metrics, len(table), resamples, BOOTSTRAP_SEED)
    return Scores(dict(zip(keys, plain, strict=True)), dict(zip(keys, replicates, strict=True)))


def _restrict(metric: Metric, index: npt.NDArray[np.int64], table: npt.NDArray[np.int64]) -> Metric:
    """Let a metric of one part's rows take the weights of the whole table's."""
    if np.array_equal(index, table):
        return metric
    places = np.searchsorted(table, index)
    return lambda weights: metric(weights[places])


def _build_metric(member: Member, metric: str) -> Metric:
    thresholds = None
    if METRIC_OF[metric].tuned:
        tuned = dig(member.run.metrics, "thresholds", member.model) or {}
        if any(tuned.get(label) is None for label in member.predictions.label_names):
            raise InputError(f"{member.run.path}/metrics.json has no tuned thresholds of the {member.model}.")
        thresholds = [float(tuned[label]) for label in member.predictions.label_names]
    return build_metric(metric, member.predictions.labels, member.probs, thresholds)


def compare_rows(rows: Sequence[Row], metric: str, resamples: int) -> list[Result]:
    """Score every row, and its difference to the first row, the baseline.

    A row's score is the mean over its members. The difference is taken over the seeds and folds that the
    row and the baseline share; over all of both when they share none, and then no test over seeds is made.
    """
    members = [member for row in rows for member in row.members]
    scores = score_members(members, metric, resamples)
    results = []
    for row in rows:
        values = scores.of(row.members)
        value, replicates = scores.mean(row.members)
        result = Result(row, estimate(value, replicates), tuple(values), mean_and_std(values)[1], None)
        results.append(result if row is rows[0] else _add_difference(result, rows[0], scores))
    corrected = zip(
        results,
        holm([result.difference.p_value if result.difference else math.nan for result in results]),
        holm([result.p_members for result in results]),
        strict=True,
    )
    return [
        dataclasses.replace(result, p_holm=p_holm, p_members_holm=p_members_holm) for result, p_holm, p_members_holm in corrected
    ]


def _add_difference(result: Result, baseline: Row, scores: Scores) -> Result:
    theirs = {member.key: member for member in baseline.members}
    paired = [member for member in result.row.members if member.key in theirs]
    partners = [theirs[member.key] for member in paired]
    ours, others = (paired, partners) if paired else (result.row.members, baseline.members)
    difference = paired_difference(*scores.mean(ours), *scores.mean(others))
    if len(paired) < 2:
        return dataclasses.replace(result, difference=difference)
    differences = np.subtract(scores.of(paired), scores.of(partners)).tolist()
    return dataclasses.replace(
        result,
        difference=difference,
        p_members=paired_t_test(differences, _training_overlap(paired)),
    )


def _training_overlap(members: Sequence[Member]) -> float:
    """Return test rows / training rows where the members' test parts differ, 0 where they share one."""
    first = members[0].predictions.index
    if all(np.array_equal(first, member.predictions.index) for member in members):
        return 0.0
    ratios = []
    for member in members:
        test, train = (dig(member.run.metrics, "rows", part) for part in ("test", "train"))
        if not test or not train:
            raise InputError(f"{member.run.path}/metrics.json has no rows of train and test. Repeat the run.")
        ratios.append(test / train)
    return float(np.mean(ratios))


def compare_runs(
    paths: Sequence[str | Path],
    baseline: str | None = None,
    metric: str = HEADLINE_METRIC.name,
    part: str = "test",
    model: str | None = None,
    group_by: str | None = None,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare the runs at or below `paths`.

    `model` None takes the student's predictions, the teacher's in a run without a student; `group_by` is
    None, "seed" or "fold"; `baseline` None looks for a control, see `gather_rows`.

    Raises:
        InputError: the runs cannot be found, read, grouped or compared.
    """
    finished, unfinished = find_runs(paths)
    if not finished:
        raise InputError(f"{unfinished[0]} is unfinished, and no finished run was given. Run its command again first.")
    rows, note = gather_rows(finished, baseline, part, model, group_by)
    check_same_rows(rows, part)
    flags = differing_flags(rows)
    if "seed" in flags:
        note += "; runs of several seeds are compared with one of them: --group_by seed pairs equal seeds"
    results = compare_rows(rows, metric, resamples)
    return Comparison(metric, part, resamples, group_by, flags, tuple(results), tuple(unfinished), note)
