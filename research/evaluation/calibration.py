"""Probabilities from logits, and how well they are calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
NUM_CALIBRATION_BINS = 15
TEMPERATURE_RANGE = (0.02, 50.0)
SMALLEST_PROB = 1e-300


def sigmoid(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Return label probabilities in float64: in float32 every logit above 17 would become 1.0 and lose its rank."""
    from scipy.special import expit

    return expit(np.asarray(logits, dtype=np.float64))


def logit(probs: FloatArray) -> npt.NDArray[np.float64]:
    """Return the logits of label probabilities, the inverse of `sigmoid`; a certain 0 or 1 stays finite."""
    from scipy import special

    probs = np.asarray(probs, dtype=np.float64)
    return special.logit(np.clip(probs, SMALLEST_PROB, 1.0 - np.finfo(np.float64).epsneg))


def mean_or_nan(values: npt.NDArray[Any]) -> float:
    """Return the mean, nan for no values at all."""
    return float(values.mean()) if values.size else np.nan


@dataclass(frozen=True)
class ReliabilityTable:
    """A reliability diagram: mean predicted and observed probability by bin, each (num_bins,); nan in empty bins."""

    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]
    mean_prob: npt.NDArray[np.float64]
    observed_rate: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]


def compute_calibration(labels: FloatArray, probs: FloatArray, num_bins: int = NUM_CALIBRATION_BINS) -> ReliabilityTable:
    """Sort the known cells of same-shaped arrays into equal-width bins of probability."""
    labels, probs = np.asarray(labels, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    known = ~np.isnan(labels)
    truth, predicted = labels[known], probs[known]
    bins = np.minimum((predicted * num_bins).astype(np.int64), num_bins - 1)  # 1.0 belongs to the last bin
    count = np.bincount(bins, minlength=num_bins)
    divisor = np.where(count > 0, count, np.nan)
    edges = np.linspace(0, 1, num_bins + 1)
    return ReliabilityTable(
        lower=edges[:-1],
        upper=edges[1:],
        mean_prob=np.bincount(bins, weights=predicted, minlength=num_bins) / divisor,
        observed_rate=np.bincount(bins, weights=truth, minlength=num_bins) / divisor,
        count=count,
    )


def compute_calibration_error(labels: FloatArray, probs: FloatArray, num_bins: int = NUM_CALIBRATION_BINS) -> float:
    """Return the expected calibration error of (N, C) probabilities, averaged over labels.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, bin the confidence of one answer
    among classes. Here every label is a yes-or-no question, so the probability of yes is binned, which
    also sees a model that is overconfident where it says no. Labels without known cells are left out.
    """
    errors = []
    for column in range(labels.shape[1]):
        table = compute_calibration(labels[:, column], probs[:, column], num_bins)
        gaps = np.abs(table.mean_prob - table.observed_rate)
        if table.count.sum():
            errors.append(np.nansum(gaps * table.count) / table.count.sum())
    return mean_or_nan(np.array(errors))


def fit_temperature(labels: FloatArray, logits: FloatArray) -> float:
    """Return the temperature T for which sigmoid(logits / T) has the least cross-entropy.

    Fit it on validation data only. One T for all labels keeps their ranking as it is, and with it
    every AP and AUC (Guo et al., 2017). T stays within TEMPERATURE_RANGE, where logits that separate
    the labels perfectly would drive it to 0; without known cells it is 1.
    """
    from scipy.optimize import minimize_scalar

    known = ~np.isnan(labels)
    if not known.any():
        return 1.0
    truth, scores = labels[known], np.asarray(logits, dtype=np.float64)[known]

    def cross_entropy(log_temperature: float) -> float:
        scaled = scores * np.exp(-log_temperature)
        return float(np.mean(np.logaddexp(0.0, scaled) - truth * scaled))

    # The loss is convex in 1/T, so it has one valley in log T as well.
    bounds = tuple(np.log(TEMPERATURE_RANGE))
    return float(np.exp(minimize_scalar(cross_entropy, bounds=bounds, method="bounded").x))
