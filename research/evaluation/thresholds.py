"""Thresholds of a model's labels, chosen on validation for their F1.

Labels are (N, C) floats holding 0, 1 or nan, where nan is *unknown* and is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from research.evaluation.calibration import logit, sigmoid

FloatArray = npt.NDArray[np.floating[Any]]
DEFAULT_THRESHOLD = 0.5
# Weight of the squared distance from slope 1 and shift 0: a normal prior of standard deviation 3, which lets a label of
# few positives keep the shift that its class weight gave it.
CALIBRATION_RIDGE = 0.1
SMALLEST_SLOPE = 0.01
# Positives for which a label's own cut counts as much as the cut of all labels.
SHRINKAGE = 20


def choose_thresholds(labels: FloatArray, probs: FloatArray, rule: str = "best_f1") -> npt.NDArray[np.float64]:
    """Return the (C,) cut-offs of probabilities (N, C); a prob at its label's cut-off or above is a yes.

    Call this on validation data only; the test split uses the result as given. A label with no positives keeps 0.5,
    since every cut-off scores zero.

    Args:
        rule: "best_f1", "half_f1" or "shrunk", each a function below.
    """
    labels, probs = np.asarray(labels, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    assert labels.shape == probs.shape and labels.ndim == 2, (labels.shape, probs.shape)
    return THRESHOLD_RULES[rule](labels, probs)


def cut_at_best_f1(labels: FloatArray, probs: FloatArray) -> npt.NDArray[np.float64]:
    """Return the (C,) cut-offs that maximise each label's F1 on these rows.

    Every cut is tried: only the order of the scores matters, so there are at most N. A cut lies midway between
    neighbouring scores, and of equally good ones the nearest to 0.5 is taken. For calibrated scores the best cut is half
    the best F1, so values well under 0.5 are expected (Lipton, Elkan and Naryanaswamy, "Optimal Thresholding of
    Classifiers to Maximize F1 Measure", 2014).
    """
    return np.array([_cut_at_best_f1(*cells) for cells in _known_cells(labels, probs)])


def cut_at_half_f1(labels: FloatArray, probs: FloatArray) -> npt.NDArray[np.float64]:
    """Return the (C,) cut-offs at half of the best F1 that calibrated probabilities promise.

    For calibrated probabilities p the cut that maximises the expected F1 is F/2, where F is that best F1 (Lipton et al.
    2014, theorem 1); F is the maximum over k of 2 * (sum of the k largest p) / (k + sum of all p). They are calibrated
    by label, p = sigmoid(a z + b) from the logits z (Platt 1999), so the cut rests on all rows of a label and not on
    the few around it.
    """
    cuts = []
    for positive, of_label in _known_cells(labels, probs):
        if not positive.any():
            cuts.append(DEFAULT_THRESHOLD)
            continue
        logits = logit(of_label)
        slope, shift = fit_logistic(positive, logits)
        calibrated = np.sort(sigmoid(slope * logits + shift))[::-1]
        best_f1 = (2 * np.cumsum(calibrated) / (np.arange(1, len(calibrated) + 1) + calibrated.sum())).max()
        cuts.append(float(sigmoid((logit(best_f1 / 2) - shift) / slope)))
    return np.array(cuts)


def cut_shrunk(labels: FloatArray, probs: FloatArray) -> npt.NDArray[np.float64]:
    """Return the (C,) cut-offs of `cut_at_best_f1`, drawn toward the cut that is best for all labels in common.

    On the logit scale, t_c = w_c * own_c + (1 - w_c) * common with w_c = n_c / (n_c + SHRINKAGE) and n_c the label's
    positives: a cut chosen from few positives is more of an accident. The common cut has the best macro-F1 on these rows.
    """
    positives = (labels == 1).sum(axis=0)
    if not positives.any():
        return np.full(labels.shape[1], DEFAULT_THRESHOLD)
    own, common = logit(cut_at_best_f1(labels, probs)), logit(np.array(_cut_in_common(labels, probs)))
    share = positives / (positives + SHRINKAGE)
    return np.where(positives > 0, sigmoid(share * own + (1 - share) * common), DEFAULT_THRESHOLD)


THRESHOLD_RULES = {"best_f1": cut_at_best_f1, "half_f1": cut_at_half_f1, "shrunk": cut_shrunk}


def fit_logistic(positive: npt.NDArray[np.bool_], logits: FloatArray) -> tuple[float, float]:
    """Return slope a > 0 and shift b for which sigmoid(a z + b) has the least cross-entropy plus ridge; both are (K,).

    The ridge, CALIBRATION_RIDGE / 2 * ((a - 1)^2 + b^2) beside the sum over rows, keeps both finite where the scores
    part the label perfectly. A slope under SMALLEST_SLOPE would turn the ranking over, so none is taken.
    """
    from scipy.optimize import minimize  # as in calibration: what never fits need not wait for it

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        slope, shift = parameters
        scores = slope * logits + shift
        residuals = sigmoid(scores) - positive
        ridge = CALIBRATION_RIDGE * np.array([slope - 1.0, shift])
        value = np.sum(np.logaddexp(0.0, scores) - positive * scores) + ridge @ ridge / (2 * CALIBRATION_RIDGE)
        return float(value), np.array([residuals @ logits, residuals.sum()]) + ridge

    bounds = [(SMALLEST_SLOPE, None), (None, None)]
    slope, shift = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(slope), float(shift)


def _known_cells(labels: FloatArray, probs: FloatArray) -> list[tuple[npt.NDArray[np.bool_], FloatArray]]:
    """Return each label's known cells: whether it is positive, and its probability, both (K,)."""
    known = ~np.isnan(labels)
    return [(labels[rows, column] == 1, probs[rows, column]) for column, rows in enumerate(known.T)]


def _cut_in_common(labels: FloatArray, probs: FloatArray) -> float:
    """Return the one cut for all labels with the best macro-F1, midway to the next score below it."""
    cuts = np.unique(probs[~np.isnan(labels)])
    total = np.zeros(len(cuts))
    for positive, of_label in _known_cells(labels, probs):
        true_positives = positive.sum() - np.searchsorted(np.sort(of_label[positive]), cuts)
        predicted = len(of_label) - np.searchsorted(np.sort(of_label), cuts)
        total += 2 * true_positives / np.maximum(predicted + positive.sum(), 1)
    best = int(total.argmax())
    return float((cuts[best] + cuts[max(best - 1, 0)]) / 2)


def _cut_at_best_f1(positive: npt.NDArray[np.bool_], probs: FloatArray) -> float:
    """Return one label's best cut; both arguments are (K,) known cells."""
    num_positives = int(positive.sum())
    if num_positives == 0:
        return DEFAULT_THRESHOLD
    order = np.argsort(-probs, kind="stable")
    scores = probs[order]  # falling
    true_positives = np.cumsum(positive[order])
    predicted = np.arange(1, len(scores) + 1)

    # A cut after position k says yes to the k + 1 highest scores; equal scores cannot be parted.
    below = np.append(scores[1:], min(0.0, scores[-1]))
    separable = np.append(scores[:-1] > scores[1:], True)
    midpoints = (scores + below) / 2
    # Between adjacent floats the midpoint rounds down to the lower one, which would let it through.
    cuts = np.where(midpoints > below, midpoints, scores)[separable]
    # Equal ratios of whole numbers round to equal floats, so ties are exact.
    f1 = (2 * true_positives / (predicted + num_positives))[separable]
    best_cuts = cuts[f1 == f1.max()]
    return float(best_cuts[np.argmin(np.abs(best_cuts - DEFAULT_THRESHOLD))])
