"""Multi-label metrics and thresholds.

Labels are (N, C) floats holding 0, 1 or nan, where nan is *unknown* and is left out of every figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from research.evaluation.calibration import compute_calibration_error, fit_temperature, logit, mean_or_nan, sigmoid
from research.evaluation.thresholds import DEFAULT_THRESHOLD, choose_thresholds
from research.names import HEADLINE_METRIC, METRICS, PARTS, metrics_of

FloatArray = npt.NDArray[np.floating[Any]]
LabelledProbs = tuple[FloatArray, FloatArray]


@dataclass(frozen=True)
class Answers:
    """One model's answers on one part: labels (nan where unknown), probabilities and decisions, each (N, C)."""

    labels: FloatArray
    probs: FloatArray
    decisions: npt.NDArray[np.bool_]

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Cells whose label is known, (N, C)."""
        return ~np.isnan(self.labels)

    @property
    def complete(self) -> npt.NDArray[np.bool_]:
        """Rows whose labels are all known, (N,)."""
        return np.asarray(self.known.all(axis=1))


def compute_metrics(
    labels: FloatArray, probs: FloatArray, thresholds: FloatArray | float, label_names: Sequence[str]
) -> dict[str, Any]:
    """Score probabilities (N, C) against labels (N, C) at thresholds (C,); prob >= threshold is a yes.

    Returns every metric of `research.names.METRICS`, and "per_label" with the scores they average. Each label
    is scored on the rows where it is known, micro-F1, Hamming loss and Brier score on all known cells, subset
    accuracy and LRAP on the rows whose labels are all known. A label without known positives has F1 0, which
    counts in macro-F1 as it does in scikit-learn; its AP and AUC are nan and are left out of their averages. A
    label without any known cell says nothing: all its scores are nan, and every average leaves it out.
    """
    labels, probs = np.asarray(labels, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    num_labels = len(label_names)
    assert labels.shape == probs.shape and labels.shape[1] == num_labels, (labels.shape, probs.shape, num_labels)
    thresholds = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), (num_labels,))
    answers = Answers(labels, probs, probs >= thresholds)
    per_label = {}
    for column, name in enumerate(label_names):
        rows = answers.known[:, column]
        scores = _compute_label_scores(labels[rows, column], probs[rows, column], answers.decisions[rows, column])
        per_label[name] = scores | {"threshold": float(thresholds[column])}
    metrics = {
        metric.name: _average(per_label, metric.mean_of, metric.by_support)
        if metric.mean_of
        else OVERALL_METRICS[metric.name](answers)
        for metric in METRICS
        if not metric.tuned
    }
    return {**metrics, "per_label": per_label}


def _average(per_label: Mapping[str, Mapping[str, Any]], score: str, by_support: bool) -> float:
    """Return the mean of one score over the labels where it is defined, or its mean weighted by their positives."""
    values = np.array([scores[score] for scores in per_label.values()])
    support = np.array([scores["support"] for scores in per_label.values()])
    defined = ~np.isnan(values)
    values, support = values[defined], support[defined]
    if not by_support:
        return mean_or_nan(values)
    return float(values @ support / support.sum()) if support.sum() else 0.0


def _f1_micro(answers: Answers) -> float:
    from sklearn.metrics import f1_score  # takes 1.5 s, which comparing finished runs need not wait for

    truth = answers.labels[answers.known].astype(np.int8)
    decisions = answers.decisions[answers.known].astype(np.int8)
    return float(f1_score(truth, decisions, zero_division=0)) if truth.size else 0.0


def _subset_accuracy(answers: Answers) -> float:
    return mean_or_nan((answers.decisions == answers.labels)[answers.complete].all(axis=1))


def _hamming_loss(answers: Answers) -> float:
    return mean_or_nan((answers.decisions != answers.labels)[answers.known])


def _lrap(answers: Answers) -> float:
    return _compute_lrap(answers.labels[answers.complete] == 1, answers.probs[answers.complete])


def _calibration_error(answers: Answers) -> float:
    return compute_calibration_error(answers.labels, answers.probs)


def _brier(answers: Answers) -> float:
    return mean_or_nan((answers.probs - answers.labels)[answers.known] ** 2)


OVERALL_METRICS: dict[str, Callable[[Answers], float]] = {
    "f1_micro": _f1_micro,
    "subset_accuracy": _subset_accuracy,
    "hamming_loss": _hamming_loss,
    "lrap": _lrap,
    "ece": _calibration_error,
    "brier": _brier,
}
"""The metrics of `research.names.METRICS` that are no mean of a label's scores."""


def calibrate(labels: FloatArray, probs: FloatArray, temperature: float) -> dict[str, float]:
    """Return the metrics of the probabilities (N, C) themselves after dividing their logits by `temperature`."""
    scaled = sigmoid(logit(probs) / temperature)
    answers = Answers(np.asarray(labels, dtype=np.float64), scaled, scaled >= DEFAULT_THRESHOLD)
    scores = {metric.name: OVERALL_METRICS[metric.name](answers) for metric in metrics_of("probabilities")}
    return {"temperature": temperature, **scores}


def _compute_label_scores(labels: FloatArray, probs: FloatArray, decisions: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Score one label on its known rows; every argument is (K,)."""
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

    truth = labels.astype(np.int8)
    support = int(truth.sum())
    precision = recall = f1 = np.nan
    if truth.size:
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, decisions.astype(np.int8), average="binary", zero_division=0
        )
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "average_precision": float(average_precision_score(truth, probs)) if support else np.nan,
        "roc_auc": float(roc_auc_score(truth, probs)) if 0 < support < truth.size else np.nan,
        "support": support,
        "predicted": int(decisions.sum()),
        "known": int(truth.size),
    }


def _compute_lrap(relevant: npt.NDArray[np.bool_], probs: FloatArray) -> float:
    """Return label ranking average precision of (N, C) arrays; 1 for a row with no or every label.

    The same figure as scikit-learn's, whose loop over rows takes over a second for 12,000 comments.
    """
    precision_at_label = np.zeros(relevant.shape)
    for column in range(relevant.shape[1]):
        ranked_above = probs >= probs[:, column : column + 1]  # (N, C), the label itself included
        precision_at_label[:, column] = (ranked_above & relevant).sum(axis=1) / ranked_above.sum(axis=1)
    num_relevant = relevant.sum(axis=1)
    trivial = (num_relevant == 0) | (num_relevant == relevant.shape[1])
    row_precision = (precision_at_label * relevant).sum(axis=1) / np.maximum(num_relevant, 1)
    return mean_or_nan(np.where(trivial, 1.0, row_precision))


def majority_baseline(train_labels: FloatArray, labels: FloatArray) -> dict[str, float]:
    """Score the answer that needs no model: each label's majority value in training, no on a tie."""
    known = ~np.isnan(train_labels)
    positives = (np.where(known, train_labels, 0) == 1).sum(axis=0)  # (C,)
    majority = (2 * positives > known.sum(axis=0)).astype(np.float64)  # (C,)
    names = [str(column) for column in range(len(majority))]
    scores = compute_metrics(labels, np.broadcast_to(majority, labels.shape), DEFAULT_THRESHOLD, names)
    return {key: scores[key] for key in ("f1_macro", "f1_micro", "subset_accuracy")}


def compute_agreement(teacher_probs: FloatArray, student_probs: FloatArray, label_names: Sequence[str]) -> dict[str, float]:
    """Say how far a student repeats its teacher, right or wrong; both inputs are (N, C).

    Decisions are taken at 0.5. The correlation is Pearson's, averaged over the labels where neither
    side is constant, and nan when there is no such label.
    """
    teacher_probs = np.asarray(teacher_probs, dtype=np.float64)
    student_probs = np.asarray(student_probs, dtype=np.float64)
    assert teacher_probs.shape == student_probs.shape and teacher_probs.shape[1] == len(label_names)
    equal = (teacher_probs >= DEFAULT_THRESHOLD) == (student_probs >= DEFAULT_THRESHOLD)  # (N, C)
    correlations = [
        np.corrcoef(teacher, student)[0, 1] if np.ptp(teacher) > 0 and np.ptp(student) > 0 else np.nan
        for teacher, student in zip(teacher_probs.T, student_probs.T, strict=True)
    ]
    return {
        "decisions_equal": mean_or_nan(equal),
        "rows_equal": mean_or_nan(equal.all(axis=1)),
        "probability_mae": mean_or_nan(np.abs(teacher_probs - student_probs)),
        "probability_correlation": mean_or_nan(np.array(correlations)[~np.isnan(correlations)]),
    }


def compute_soft_loss(
    teacher_probs: FloatArray,
    student_probs: FloatArray,
    temperature: float,
    *,
    t_squared: bool = True,
    teacher_shift: FloatArray | float = 0.0,
) -> dict[str, float]:
    """Return the mean soft loss of (N, C) probabilities and its excess over the teacher's entropy.

    The same figures as a history row's, taken without dropout. The excess is a Kullback-Leibler divergence,
    0 for a student that repeats its teacher, so it can be compared across temperatures and data sets.
    """
    teacher, student = (logit(teacher_probs) - teacher_shift) / temperature, logit(student_probs) / temperature
    targets = sigmoid(teacher)
    scale = temperature**2 if t_squared else 1.0

    def cross_entropy(logits: npt.NDArray[np.float64]) -> float:
        return scale * mean_or_nan(np.logaddexp(0.0, logits) - targets * logits)

    loss = cross_entropy(student)
    return {"soft_loss": loss, "soft_excess": loss - cross_entropy(teacher)}


def evaluate_model(
    label_names: Sequence[str], *, validation: LabelledProbs, test: LabelledProbs, threshold_rule: str = "best_f1"
) -> tuple[dict[str, Any], dict[str, float]]:
    """Score one model on both parts, at 0.5 and at thresholds tuned on validation.

    Parts are (labels, probs), each (N, C). Returns {part: {"at_0.5": M, "tuned": M, "calibration": ...}} and
    {label: threshold}. The temperature of "calibration" is fitted on validation as well.
    """
    thresholds = choose_thresholds(*validation, threshold_rule)
    temperature = fit_temperature(validation[0], logit(validation[1]))
    scores = {
        part: {
            "at_0.5": compute_metrics(labels, probs, DEFAULT_THRESHOLD, label_names),
            "tuned": compute_metrics(labels, probs, thresholds, label_names),
            "calibration": calibrate(labels, probs, temperature),
        }
        for part, (labels, probs) in (("validation", validation), ("test", test))
    }
    return scores, dict(zip(label_names, thresholds.tolist(), strict=True))


def keep_spoken(labels: FloatArray, probs: FloatArray) -> LabelledProbs:
    """Return labels and probabilities, (N, C) each, where a cell without a probability (nan) counts as of unknown label."""
    silent = np.isnan(probs)
    return np.where(silent, np.nan, labels), np.where(silent, DEFAULT_THRESHOLD, probs)


def score_teachers(
    label_names: Sequence[str],
    labels: Mapping[str, FloatArray],
    probs: Mapping[str, Mapping[str, FloatArray]],
    threshold_rule: str = "best_f1",
) -> dict[str, Any]:
    """Score each of several teachers by itself, as `evaluate_model` does.

    Args:
        labels: (N, C) by part.
        probs: {teacher: {part: (N, C)}}, nan where it says nothing: those cells are left out, and `rows` says how
            many rows of each part are left.
    """
    scores = {}
    for name, parts in probs.items():
        known = {part: keep_spoken(labels[part], parts[part]) for part in PARTS}
        validation, test = (known[part] for part in PARTS)
        scores[name], _ = evaluate_model(label_names, validation=validation, test=test, threshold_rule=threshold_rule)
        scores[name]["rows"] = {part: int((~np.isnan(parts[part])).any(axis=1).sum()) for part in PARTS}
    return scores


def build_metrics(
    label_names: Sequence[str],
    labels: Mapping[str, FloatArray],
    probs: Mapping[str, Mapping[str, FloatArray]],
    training: Mapping[str, Any],
    *,
    kd_temperature: float = 1.0,
    t_squared: bool = True,
    teacher_shift: FloatArray | float = 0.0,
    threshold_rule: str = "best_f1",
    softened: Mapping[str, FloatArray] | None = None,
) -> dict[str, Any]:
    """Assemble the content of metrics.json, unrounded.

    Args:
        labels: (N, C) labels of the parts "train", "validation" and "test".
        probs: {model: {"validation": (N, C), "test": (N, C)}} of "teacher", "student" and "control", those
            there are; the control is the student trained without the teacher.
        training: deterministic facts of the training, kept as they are.
        kd_temperature: softening for the soft loss, which says how far a student is from its teacher.
        teacher_shift: (C,) what training took off the teacher's logits for the soft loss; its own scores keep it.
        threshold_rule: how the tuned thresholds of every model are chosen on validation.
        softened: {part: (N, C)} what the teacher's softened probabilities are made from, where several were averaged.

    The headline is macro-F1 on the test part at 0.5, which needs no tuned number to be repeated: the
    student's, or the teacher's in a run without a student.
    """
    metrics: dict[str, Any] = {
        "labels": list(label_names),
        "rows": {part: len(values) for part, values in labels.items()},
        "thresholds": {},
        "majority_baseline": {"test": majority_baseline(labels["train"], labels["test"])},
        "training": dict(training),
    }
    for model, parts in probs.items():
        metrics[model], metrics["thresholds"][model] = evaluate_model(
            label_names,
            validation=(labels["validation"], parts["validation"]),
            test=(labels["test"], parts["test"]),
            threshold_rule=threshold_rule,
        )
    for model, name in (("student", "agreement"), ("control", "control_agreement")):
        if not {"teacher", model} <= probs.keys():
            continue
        metrics[name] = {part: compute_agreement(probs["teacher"][part], probs[model][part], label_names) for part in PARTS}
        for part, student in probs[model].items():
            target = (softened or probs["teacher"])[part]
            soft = compute_soft_loss(target, student, kd_temperature, t_squared=t_squared, teacher_shift=teacher_shift)
            metrics[model][part] |= soft
    return metrics | {"headline": _pick_headline(metrics)}


def _pick_headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    model = "student" if "student" in metrics else "teacher"
    thresholds, name = HEADLINE_METRIC.path
    return {"model": model, "part": "test", "metric": name, "value": metrics[model]["test"][thresholds][name]}


def take_best(scores: Mapping[float, float]) -> float:
    """Return the first setting of the highest score; one that cannot be computed is below all others."""
    return max(scores, key=lambda setting: np.nan_to_num(scores[setting], nan=-1.0))


def most_disagreeing(teacher_probs: FloatArray, student_probs: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """Return the positions of the `count` rows where two models differ most, summed over labels; (N, C) each.

    Equal rows keep their order.
    """
    distance = np.abs(teacher_probs - student_probs).sum(axis=1)  # (N,)
    return np.argsort(-distance, kind="stable")[:count]


def count_confusions(labels: FloatArray, probs: FloatArray, thresholds: FloatArray) -> npt.NDArray[np.int64]:
    """Return each label's true positives, false positives, false negatives and true negatives, (C, 4).

    `labels` (N, C) holds nan where unknown, which counts nowhere; `thresholds` is (C,).
    """
    predicted, positive, known = probs >= thresholds, labels == 1, ~np.isnan(labels)
    cells = (positive & predicted, ~positive & predicted, positive & ~predicted, ~positive & ~predicted)
    return np.stack([(cell & known).sum(axis=0) for cell in cells], axis=1)
