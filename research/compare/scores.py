"""Scores of compared rows with their intervals and differences (no torch)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from research.compare.rows import MAX_NAMED_RUNS, Folds, Key, Member, Row, differing_flags, find_runs, gather_rows
from research.errors import InputError
from research.evaluation.bootstrap import RESAMPLES, Answers, Metric, bootstrap, score_texts, take_answers
from research.evaluation.folds import build_fold_metrics, gather_folds, stack_seeds
from research.evaluation.inference import (
    Difference,
    Estimate,
    Keeping,
    Scored,
    difference,
    estimate,
    holm,
    judge_keeping,
    mean_and_std,
)
from research.names import METRIC_OF
from research.runs.formats import dig

IntArray = npt.NDArray[np.int64]
BOOTSTRAP_SEED = 0  # the same comparison twice prints the same bytes
SIGNIFICANT = 0.05
DEFAULT_METRICS = ("average_precision_macro", "f1_macro", "f1_macro_tuned")


@dataclass(frozen=True)
class Result:
    """A row's figures in one metric; `difference` is None for the baseline.

    `values` are those of its seeds, of a single one those of its folds; `p_holm` is corrected for every difference of
    the comparison, and nan where nothing could be tested; `keeping` is there when it was asked for and the row has a
    teacher.
    """

    row: Row
    estimate: Estimate
    values: tuple[float, ...]
    std: float
    difference: Difference | None
    p_holm: float = math.nan
    keeping: Keeping | None = None

    @property
    def is_claim(self) -> bool:
        """Whether the difference may be claimed of other seeds and other rows, after correction for all that were tested."""
        return self.difference is not None and self.difference.over_seeds and self.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class Comparison:
    """Everything a table or a figure shows; figures show the first metric."""

    by_metric: dict[str, tuple[Result, ...]]
    part: str
    resamples: int
    group_by: str | None
    flags: tuple[str, ...]
    unfinished: tuple[Path, ...]
    baseline_note: str
    keeps: float | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Their names, in the order asked for."""
        return tuple(self.by_metric)

    @property
    def metric(self) -> str:
        """The first metric."""
        return self.metrics[0]

    @property
    def results(self) -> tuple[Result, ...]:
        """The rows' results in the first metric."""
        return self.by_metric[self.metric]

    @property
    def baseline(self) -> Result:
        """What the other rows are compared with."""
        return next(result for result in self.results if result.difference is None)

    @property
    def grouped(self) -> bool:
        """Whether a row stands for several runs."""
        return any(len(result.values) > 1 for result in self.results)

    @property
    def unit(self) -> str:
        """What the runs of a row differ by: "seed" or "fold"."""
        return "seed" if self.group_by == "seed" and any(len(result.row.seeds) > 1 for result in self.results) else "fold"

    @property
    def num_folds(self) -> int:
        """How many folds together answer for all rows; 1 for runs of a single split."""
        return len(next(iter(self.results[0].row.seeds.values())))


def check_same_rows(rows: Sequence[Row], part: str) -> None:
    """Refuse a comparison of scores that were measured on different rows.

    Members with the same seed must have been tested on the same rows, and every fold on its own ones whatever the seed;
    members of other seeds may have other rows of the same table, which must then carry the same labels.

    Raises:
        InputError: naming the runs that differ from the first.
    """
    members = [member for row in rows for member in row.members]
    first = members[0]
    expected = first.predictions.label_names
    _refuse([m for m in members if m.predictions.label_names != expected], first, "other label columns")
    _check_folds([folds for row in rows for folds in row.seeds.values()], part)
    references: dict[Key, Member] = {}
    for member in members:
        references.setdefault(_part_key(member), member)
    for key, reference in references.items():
        paired = [member for member in members if _part_key(member) == key]
        hint = " Runs whose seeds split the data anew need --group_by seed." if key == (None, None) else ""
        _refuse([m for m in paired if not _same_part(reference, m, part)], reference, f"another {part} part", hint)
    _refuse([m for m in references.values() if not _same_table(first, m)], first, "another table")


def _part_key(member: Member) -> Key:
    """Return what members that answer for the same rows have in common: the fold, or of a single split the seed."""
    seed, fold = member.key
    return (seed, None) if fold is None else (None, fold)


def _check_folds(seeds: Sequence[Folds], part: str) -> None:
    """Refuse seeds of which some lack a fold, and a test row that two folds answer for."""
    reference, expected = seeds[0][0], [member.key[1] for member in seeds[0]]
    _refuse([folds[0] for folds in seeds if [m.key[1] for m in folds] != expected], reference, "other folds")
    for folds in seeds if part == "test" else ():
        rows, counts = np.unique(np.concatenate([member.predictions.index for member in folds]), return_counts=True)
        if (counts > 1).any():
            raise InputError(
                f"{folds[0].owner}: row {rows[counts > 1][0]} is in the test part of two folds, so they are not of one "
                "cross-validation. Repeat it with --overwrite."
            )


def _same_part(reference: Member, member: Member, part: str) -> bool:
    hashes = (reference.data.get("test_sha256"), member.data.get("test_sha256"))
    if part == "test" and None not in hashes and hashes[0] != hashes[1]:
        return False
    ours, theirs = reference.predictions, member.predictions
    return np.array_equal(ours.index, theirs.index) and np.array_equal(ours.labels, theirs.labels, equal_nan=True)


def _same_table(reference: Member, member: Member) -> bool:
    hashes = (reference.data.get("dataset_sha256"), member.data.get("dataset_sha256"))
    if _part_key(reference) != _part_key(member) and None not in hashes and hashes[0] != hashes[1]:
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
class Texts:
    """The texts that are resampled: those of all parts together, by their number in the predictions.

    A text that two seeds test on is so drawn for both or for neither. Where a run of version 0.1 does not say which
    rows share a text, every row counts as a text, in all runs alike.
    """

    numbers: IntArray
    by_row: bool

    @classmethod
    def of(cls, members: Sequence[Member]) -> Texts:
        """Gather the texts of the members' rows."""
        by_row = not all(member.predictions.complete for member in members)
        parts = [member.predictions.index if by_row else member.predictions.text_cluster for member in members]
        return cls(np.unique(np.concatenate(parts)), by_row)

    def places(self, member: Member) -> IntArray:
        """Return the place among the texts of each of a member's rows, (N,)."""
        predictions = member.predictions
        return np.searchsorted(self.numbers, predictions.index if self.by_row else predictions.text_cluster)

    def __len__(self) -> int:
        return len(self.numbers)


def _take_answers(member: Member, model: str, metric: str, texts: Texts) -> Answers:
    predictions, thresholds = member.predictions, None
    if METRIC_OF[metric].tuned:
        tuned = dig(member.run.metrics, "thresholds", model) or {}
        if any(tuned.get(label) is None for label in predictions.label_names):
            raise InputError(f"{member.run.path}/metrics.json has no tuned thresholds of the {model}.")
        thresholds = [float(tuned[label]) for label in predictions.label_names]
    return take_answers(predictions.labels, predictions.probs[model], thresholds, texts.places(member), len(texts))


class Scores:
    """Every seed's scores in every metric, all on the same resampled texts; with `teachers` those beside them too."""

    def __init__(self, rows: Sequence[Row], metrics: Sequence[str], resamples: int, *, teachers: bool) -> None:
        self.texts = Texts.of([member for row in rows for member in row.members])
        seeds = [folds for row in rows for folds in row.seeds.values()]
        beside = [(folds, "teacher") for folds in seeds if teachers and all(map(_has_teacher, folds))]
        self._places: dict[tuple[str, Path, str], slice] = {}
        built: list[Metric] = []
        placed: dict[tuple[str, str], slice] = {}  # a teacher that the runs of a sweep share is scored once
        for folds, model in [*((folds, folds[0].model) for folds in seeds), *beside]:
            digest = "".join(_digest_answers(member, model) for member in folds)
            for metric in metrics:
                if (metric, digest) not in placed:
                    answers = [_take_answers(member, model, metric, self.texts) for member in folds]
                    start = len(built)
                    built += build_fold_metrics(metric, answers)
                    placed[metric, digest] = slice(start, len(built))
                self._places[metric, folds[0].run.path, model] = placed[metric, digest]
        self._plain = score_texts(built, len(self.texts))
        self._resampled = bootstrap(built, len(self.texts), resamples, BOOTSTRAP_SEED)

    def of(self, seeds: Iterable[Folds], metric: str, model: str | None = None) -> Scored:
        """Return the scores of some seeds, or of another model beside each."""
        found = []
        for folds in seeds:
            place = self._places[metric, folds[0].run.path, model or folds[0].model]
            found.append(gather_folds(self._plain[place], self._resampled[place], len(folds)))
        return stack_seeds(found)


def _digest_answers(member: Member, model: str) -> str:
    """Return what two models have in common only if they answered alike on the same rows, at the same thresholds."""
    thresholds = dig(member.run.metrics, "thresholds", model)
    digest = hashlib.sha256(json.dumps(thresholds, sort_keys=True).encode())
    digest.update(member.predictions.index.tobytes())
    digest.update(np.ascontiguousarray(member.predictions.probs[model]).tobytes())
    return digest.hexdigest()


def compare_rows(
    rows: Sequence[Row], metrics: Sequence[str], resamples: int, keeps: float | None
) -> dict[str, tuple[Result, ...]]:
    """Score every row in every metric, and its difference to the first row, the baseline.

    A row's score is the mean over its seeds; of a cross-validation each is over all rows, see `research.evaluation.folds`.
    The difference is paired over the seeds that the row and the baseline share; where they share fewer than two, but both
    have several, it is that of independent seeds; a row that no seed would change is set against each seed of the other.
    Holm's correction runs over every difference of every metric, since the reader looks at them all.
    """
    scores = Scores(rows, metrics, resamples, teachers=keeps is not None)
    results = [_score_row(row, rows[0], metric, scores, keeps) for metric in metrics for row in rows]
    corrected = holm([result.difference.p_value if result.difference else math.nan for result in results])
    results = [dataclasses.replace(result, p_holm=p_holm) for result, p_holm in zip(results, corrected, strict=True)]
    return {metric: tuple(results[place * len(rows) : (place + 1) * len(rows)]) for place, metric in enumerate(metrics)}


def _score_row(row: Row, baseline: Row, metric: str, scores: Scores, keeps: float | None) -> Result:
    scored, num_texts = scores.of(row.seeds.values(), metric), len(scores.texts)
    found = estimate(scored, num_texts, _training_overlap(row.members))
    values = scored.plain.tolist()
    if scored.folds and row.members[0].key[0] is None:  # not grouped by seed
        values = [fold.mean for fold in scored.folds]
    return Result(
        row,
        found,
        tuple(values),
        mean_and_std(values)[1],
        None if row is baseline else _compare(row, baseline, metric, scores),
        keeping=None if keeps is None else _judge_keeping(row, metric, scores, keeps),
    )


def _compare(row: Row, baseline: Row, metric: str, scores: Scores) -> Difference:
    ours, theirs = row.seeds, baseline.seeds
    if row.has_one_answer or baseline.has_one_answer:
        gap = scores.of(ours.values(), metric) - scores.of(theirs.values(), metric)
        return difference([gap], len(scores.texts), _training_overlap([*row.members, *baseline.members]))
    shared = [seed for seed in ours if seed in theirs]
    if not shared or (len(shared) == 1 and min(len(ours), len(theirs)) > 1):
        sides = [scores.of(ours.values(), metric), -1 * scores.of(theirs.values(), metric)]
        return difference(sides, len(scores.texts), _training_overlap([*row.members, *baseline.members]))
    paired = scores.of([ours[seed] for seed in shared], metric) - scores.of([theirs[seed] for seed in shared], metric)
    overlap = _training_overlap([member for seed in shared for member in ours[seed]])
    return difference([paired], len(scores.texts), overlap)


def _judge_keeping(row: Row, metric: str, scores: Scores, share: float) -> Keeping | None:
    if METRIC_OF[metric].lower_is_better or not all(_has_teacher(member) for member in row.members):
        return None
    seeds = row.seeds.values()
    rows = len(np.unique(np.concatenate([member.predictions.index for member in row.members])))
    student, teacher = scores.of(seeds, metric), scores.of(seeds, metric, "teacher")
    return judge_keeping(student, teacher, share, len(scores.texts), rows, _training_overlap(row.members))


def _has_teacher(member: Member) -> bool:
    return member.model != "teacher" and "teacher" in member.predictions.probs


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
    metrics: Sequence[str] = DEFAULT_METRICS,
    part: str = "test",
    model: str | None = None,
    group_by: str | None = None,
    resamples: int = RESAMPLES,
    keeps: float | None = None,
) -> Comparison:
    """Compare the runs at or below `paths`.

    `model` None takes the student's predictions, the teacher's in a run without a student; `group_by` is
    None, "seed" or "fold"; `baseline` None looks for a control, see `gather_rows`; `keeps` tests whether each student
    keeps that share of its teacher's score.

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
    incomplete = [member.run.path for row in rows for member in row.members if not member.predictions.complete]
    if incomplete:
        note += (
            f"; {incomplete[0]} is of version 0.1: its probabilities have six decimals, and rows are resampled, not texts, "
            "so that intervals are too narrow where texts repeat"
        )
    by_metric = compare_rows(rows, tuple(dict.fromkeys(metrics)), resamples, keeps)
    return Comparison(by_metric, part, resamples, group_by, flags, tuple(unfinished), note, keeps)
