"""What distillation gained over the same student trained without a teacher, and what it kept of its teacher (no torch).

Three measures, because they can disagree: class weights move a control's probabilities away from 0.5 and a
teacher moves them back, which lifts macro-F1 at 0.5 while the student ranks no better than before. A gain at
0.5 that is absent from mean average precision is a matter of thresholds, and `describe_gain` says so.

All of it is of one run, so of one seed: it says what other test rows would, never what other seeds would. Of a
cross-validation it is over all rows, and speaks for other trainings as far as K folds tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from research.evaluation.bootstrap import RESAMPLES, Metric, bootstrap, score_texts, take_answers
from research.evaluation.folds import build_fold_metrics, gather_folds
from research.evaluation.inference import Scored, difference, estimate, holm, judge_keeping
from research.names import METRIC_OF

FloatArray = npt.NDArray[np.floating[Any]]
ModelScores = Mapping[str, Mapping[str, Scored]]  # {metric: {model: scores}}
GAIN_METRICS = ("f1_macro", "f1_macro_tuned", "average_precision_macro")
KEPT_SHARE = 0.99  # what a report asks for; research_compare.py --keeps asks for another
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class AnsweredPart:
    """What the models of a single split, or of one fold, answered on its test part.

    Attributes:
        labels: (N, C) with nan where unknown.
        probs: {model: (N, C)}.
        thresholds: {model: (C,)} tuned on validation.
        text_cluster: (N,) one number for all rows of one text, the same in every fold.
    """

    labels: FloatArray
    probs: Mapping[str, FloatArray]
    thresholds: Mapping[str, Sequence[float]]
    text_cluster: npt.NDArray[np.int64]


def resample_models(folds: Sequence[AnsweredPart], resamples: int = RESAMPLES) -> dict[str, dict[str, Scored]]:
    """Score models on the same resampled texts, for each of GAIN_METRICS; a single split is one fold."""
    distinct, text = np.unique(np.concatenate([fold.text_cluster for fold in folds]), return_inverse=True)
    of_folds = np.split(text, np.cumsum([len(fold.labels) for fold in folds])[:-1])
    keys = [(metric, model) for metric in GAIN_METRICS for model in folds[0].probs]
    built: list[Metric] = []
    places: list[slice] = []
    for metric, model in keys:
        answers = [
            take_answers(
                fold.labels, fold.probs[model], fold.thresholds[model] if METRIC_OF[metric].tuned else None, rows, len(distinct)
            )
            for fold, rows in zip(folds, of_folds, strict=True)
        ]
        metrics = build_fold_metrics(metric, answers)
        places.append(slice(len(built), len(built) + len(metrics)))
        built += metrics
    plain, replicates = score_texts(built, len(distinct)), bootstrap(built, len(distinct), resamples)
    scores: dict[str, dict[str, Scored]] = {metric: {} for metric in GAIN_METRICS}
    for (metric, model), place in zip(keys, places, strict=True):
        scores[metric][model] = gather_folds(plain[place], replicates[place], len(folds))
    return scores


def measure_scores(scores: ModelScores, num_texts: int, overlap: float = 0.0) -> dict[str, dict[str, dict[str, float]]]:
    """Return {metric: {model: {"value", "low" and "high": its 95 % interval}}}."""
    return {
        metric: {model: dataclasses.asdict(estimate(scored, num_texts, overlap)) for model, scored in models.items()}
        for metric, models in scores.items()
    }


def measure_gap(scores: ModelScores, num_texts: int, overlap: float = 0.0) -> dict[str, dict[str, float]]:
    """Return {metric: {"value": student - teacher, "low" and "high": its 95 % paired interval}}."""
    found = {metric: difference([of["student"] - of["teacher"]], num_texts, overlap) for metric, of in scores.items()}
    return {metric: {"value": gap.value, "low": gap.low, "high": gap.high} for metric, gap in found.items()}


def measure_gain(scores: ModelScores, num_texts: int, overlap: float = 0.0) -> dict[str, dict[str, float | None]]:
    """Compare the distilled student with its control on the same rows, for each of GAIN_METRICS.

    Returns:
        {metric: {"teacher", "control", "student": scores, "gain": student - control, "low" and "high": its 95 %
        paired bootstrap interval over texts, "p_value", "p_holm": corrected for the three measures, "gap_closed":
        the gain's share of teacher - control, None where the teacher is not above the control}}. The teacher's score
        is None where it was not scored.
    """
    found = {metric: difference([of["student"] - of["control"]], num_texts, overlap) for metric, of in scores.items()}
    corrected = holm([gain.p_value for gain in found.values()])
    gains: dict[str, dict[str, float | None]] = {}
    for (metric, gain), p_holm in zip(found.items(), corrected, strict=True):
        values = {model: scores[metric][model].mean for model in ("control", "student")}
        teacher = scores[metric]["teacher"].mean if "teacher" in scores[metric] else None
        gap = 0.0 if teacher is None else teacher - values["control"]
        gains[metric] = {
            "teacher": teacher,
            **values,
            "gain": gain.value,
            "low": gain.low,
            "high": gain.high,
            "p_value": gain.p_value,
            "p_holm": p_holm,
            "gap_closed": gain.value / gap if gap > 0 else None,
        }
    return gains


def measure_keeping(scores: ModelScores, num_texts: int, num_rows: int, overlap: float = 0.0) -> dict[str, Any]:
    """Test whether the student keeps KEPT_SHARE of its teacher's score, for each of GAIN_METRICS.

    Returns:
        {"share", metric: {"bound": lower one-sided 95 % bound of student - share * teacher over texts, "kept": whether
        that is above 0, "rows_needed": test rows for 80 % power, None where no number would do}}.
    """
    kept: dict[str, Any] = {"share": KEPT_SHARE}
    for metric, models in scores.items():
        found = judge_keeping(models["student"], models["teacher"], KEPT_SHARE, num_texts, num_rows, overlap)
        rows_needed = found.rows_needed if math.isfinite(found.rows_needed) else None
        kept[metric] = {"bound": found.bound, "kept": found.kept, "rows_needed": rows_needed}
    return kept


def describe_gain(gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the sentence that says how this student compares with its control, by all three measures or by some.

    A measure rose or fell when its p value, corrected for the three of them, is under 5 %: of two students that are
    alike on all rows of the world, three intervals of 95 % would call about one in eight better or worse. The
    sentence claims nothing of other seeds, which one run cannot know.
    """
    moved = {metric: _direction(gains[metric]) for metric in GAIN_METRICS if metric in gains}
    named = {sign: [METRIC_OF[metric].full_label for metric, found in moved.items() if found == sign] for sign in (1, 0, -1)}
    if not moved:
        return ""
    if not named[0] and not named[-1]:
        return "All three rose: with this seed, the distilled student is the better one, on other rows like these too."
    if not named[0] and not named[1]:
        return "All three fell: with this seed, the distilled student is the worse one, on other rows like these too."
    if not named[1] and not named[-1]:
        return "On these rows and with this seed, distillation made no measurable difference in any of the three."
    clauses = []
    if named[1]:
        clauses.append(f"{_join(named[1])} rose")
    if named[-1]:
        clauses.append(f"{_join(named[-1])} fell")
    if named[0]:
        clauses.append(f"{_join(named[0])} did not change measurably")
    text = " but ".join([", ".join(clauses[:-1]), clauses[-1]])
    verdict = _interpret(moved)
    return f"With this seed the measures disagree: {text}{f': {verdict}' if verdict else ''}."


def describe_keeping(kept: Mapping[str, Any]) -> str:
    """Return the sentences that say of which measures a share of the teacher's score is shown to be kept."""
    found = {METRIC_OF[metric].full_label: kept[metric] for metric in GAIN_METRICS if metric in kept}
    shown = [name for name, test in found.items() if test["kept"]]
    bounds = [f"{name} {'unknown' if test['bound'] is None else format(test['bound'], '+.4f')}" for name, test in found.items()]
    needed = [
        f"{'no number' if test['rows_needed'] is None else format(test['rows_needed'], ',')} ({name})"
        for name, test in found.items()
    ]
    return (
        f"That at least {100 * kept['share']:g} % of the teacher's score is kept on other rows too is shown, for this one "
        f"seed, {f'for {_join(shown)}' if shown else 'for none of the measures'} (lower one-sided 95 % bounds of student - "
        f"{kept['share']:g} teacher: {', '.join(bounds)}). Test rows that show it with 80 % power for a student as good as its "
        f"teacher: {', '.join(needed)}."
    )


def _direction(gain: Mapping[str, Any]) -> int:
    """Return 1 for a rise, -1 for a fall, 0 for neither; of version 0.1, which corrected nothing, by the interval."""
    low, high, p_holm = gain.get("low"), gain.get("high"), gain.get("p_holm")
    if low is None or high is None or (p_holm is not None and p_holm >= SIGNIFICANT):
        return 0
    return (low > 0) - (high < 0)


def _interpret(moved: Mapping[str, int]) -> str:
    """Say what a disagreement means, where it means one thing."""
    at_half, tuned, ranking = (moved.get(metric, 0) for metric in GAIN_METRICS)
    if at_half > 0 and ranking <= 0 and tuned <= 0:
        return "the gain is a matter of thresholds, which can be tuned without a teacher"
    if at_half > 0 and tuned > 0:
        return "the decisions improved, the ranking over all thresholds did not"
    if ranking > 0 and at_half <= 0:
        return "the student ranks better, but 0.5 is no threshold to see it at"
    if at_half < 0 and tuned >= 0 and ranking >= 0:
        return "the loss at 0.5 is a matter of thresholds"
    return ""


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
