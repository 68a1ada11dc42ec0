"""What distillation gained over the same student trained without a teacher, and in which sense (no torch).

Three measures, because they can disagree: class weights move a control's probabilities away from 0.5 and a
teacher moves them back, which lifts macro-F1 at 0.5 while the student ranks no better than before. A gain at
0.5 that is absent from mean average precision is a matter of thresholds, and `describe_gain` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from research.evaluation.bootstrap import build_metric, compare_predictions, score_rows
from research.names import METRIC_OF

FloatArray = npt.NDArray[np.floating[Any]]
GAIN_METRICS = ("f1_macro", "f1_macro_tuned", "average_precision_macro")


def measure_gain(
    labels: FloatArray, probs: Mapping[str, FloatArray], thresholds: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float | None]]:
    """Compare the distilled student with its control on the same rows, for each of GAIN_METRICS.

    Args:
        labels: (N, C) with nan where unknown, of the test part.
        probs: (N, C) of "teacher", "control" and "student".
        thresholds: (C,) tuned on validation, of the same three.

    Returns:
        {metric: {"teacher", "control", "student": scores, "gain": student - control, "low" and "high": its 95 %
        paired bootstrap interval, "p_value", "gap_closed": the gain's share of teacher - control, None where
        the teacher is not above the control}}.
    """
    # The CSV files hold six decimals; the same rounding here gives the very numbers that comparing them gives.
    rounded = {model: np.round(values, 6) for model, values in probs.items()}
    gains: dict[str, dict[str, float | None]] = {}
    for metric in GAIN_METRICS:
        cuts = thresholds if METRIC_OF[metric].tuned else dict.fromkeys(probs)
        student, control, difference = compare_predictions(
            labels, rounded["student"], rounded["control"], metric, cuts["student"], cuts["control"]
        )
        teacher_score = build_metric(metric, labels, rounded["teacher"], cuts["teacher"])
        teacher = float(score_rows([teacher_score], len(labels))[0])
        gap = teacher - control.value
        gains[metric] = {
            "teacher": teacher,
            "control": control.value,
            "student": student.value,
            "gain": difference.value,
            "low": difference.low,
            "high": difference.high,
            "p_value": difference.p_value,
            "gap_closed": difference.value / gap if gap > 0 else None,
        }
    return gains


def describe_gain(gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the sentence that says whether distillation helped by all three measures, or how they disagree.

    A measure rose or fell when its interval leaves 0 out.
    """
    moved = {metric: _direction(gains[metric]) for metric in GAIN_METRICS if metric in gains}
    named = {sign: [METRIC_OF[metric].full_label for metric, found in moved.items() if found == sign] for sign in (1, 0, -1)}
    if not moved:
        return ""
    if not named[0] and not named[-1]:
        return "All three rose beyond their intervals: distillation helped."
    if not named[0] and not named[1]:
        return "All three fell beyond their intervals: distillation hurt."
    if not named[1] and not named[-1]:
        return "Every interval includes 0: on these rows distillation made no measurable difference."
    clauses = []
    if named[1]:
        clauses.append(f"{_join(named[1])} rose")
    if named[-1]:
        clauses.append(f"{_join(named[-1])} fell")
    if named[0]:
        clauses.append(f"{_join(named[0])} did not change measurably")
    text = " but ".join([", ".join(clauses[:-1]), clauses[-1]])
    verdict = _interpret(moved)
    return f"The measures disagree: {text}{f': {verdict}' if verdict else ''}."


def _direction(gain: Mapping[str, Any]) -> int:
    low, high = gain.get("low"), gain.get("high")
    if low is None or high is None:
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
