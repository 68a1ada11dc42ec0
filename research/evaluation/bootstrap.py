"""How sure a score is: bootstrap over test rows, paired comparisons, correction for many of them (no torch).

N rows, C labels, R resamples. Labels are (N, C) floats holding 0, 1 or nan (unknown, left out of every
figure); probs are (N, C); weights are (N, R): how often each row was drawn in each resample. One weight
matrix serves every model, so that all are scored on the same resampled rows: what two models share, the
hard rows above all, cancels in their difference.

The rows are taken as independent draws. Near-duplicates of one comment in the test part, or several
comments by one author, make the intervals here too narrow.

Sources:
    Efron & Tibshirani, An Introduction to the Bootstrap, 1993.
    Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.
    Berg-Kirkpatrick, Burkett & Klein, An empirical investigation of statistical significance in NLP, 2012.
    Dror, Baumer, Shlomov & Reichart, The hitchhiker's guide to testing statistical significance in NLP, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from research.names import METRIC_OF, METRICS

FloatArray = npt.NDArray[np.floating[Any]]
Metric = Callable[[FloatArray], FloatArray]  # weights (N, R) -> scores (R,)
LEVEL = 0.95
RESAMPLES = 2000
# Weights held at once: resamples come in slices of this many cells, so memory does not grow with R.
CHUNK_CELLS = 1_000_000


@dataclass(frozen=True)
class Estimate:
    """A score and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A score minus the baseline's, its confidence interval, and the two-sided p value of no difference."""

    value: float
    low: float
    high: float
    p_value: float


def f1_macro(labels: FloatArray, probs: FloatArray, thresholds: FloatArray) -> Metric:
    """Score macro-F1: the mean over labels of 2 tp / (2 tp + fp + fn), 0 for a label without any of them.

    As in scikit-learn with zero_division=0. A label without positives in a resample scores 0 there too:
    the bootstrap applies the very statistic that is reported.
    """
    hits, marked = _count_f1_cells(labels, probs, thresholds)
    return _ratio_metric(2 * hits.T, marked.T, when_empty=0.0)


def f1_micro(labels: FloatArray, probs: FloatArray, thresholds: FloatArray) -> Metric:
    """Score micro-F1: 2 tp / (2 tp + fp + fn) with the counts summed over all known cells."""
    hits, marked = _count_f1_cells(labels, probs, thresholds)
    return _ratio_metric(2 * hits.sum(axis=1)[None], marked.sum(axis=1)[None], when_empty=0.0)


def subset_accuracy(labels: FloatArray, probs: FloatArray, thresholds: FloatArray) -> Metric:
    """Score the share of rows with every label right, among rows whose labels are all known."""
    complete = np.isnan(labels).sum(axis=1) == 0  # (N,)
    wrong = (probs >= thresholds) != (labels == 1)  # (N, C)
    right = complete & (wrong.sum(axis=1) == 0)
    return _ratio_metric(right[None], complete[None], when_empty=np.nan)


def hamming_loss(labels: FloatArray, probs: FloatArray, thresholds: FloatArray) -> Metric:
    """Score the share of known cells decided wrongly; lower is better."""
    known = ~np.isnan(labels)  # (N, C)
    wrong = known & ((probs >= thresholds) != (labels == 1))
    return _ratio_metric(wrong.sum(axis=1)[None], known.sum(axis=1)[None], when_empty=np.nan)


def average_precision_macro(labels: FloatArray, probs: FloatArray, thresholds: FloatArray) -> Metric:
    """Score the mean over labels of average precision; `thresholds` play no part.

    AP = sum over cut-offs k of (recall_k - recall_(k-1)) * precision_k, equal scores sharing a cut-off, as
    in scikit-learn. Labels without positives (in a resample) are left out of the mean.
    """
    ranked = [_rank(labels[:, column], probs[:, column]) for column in range(labels.shape[1])]

    def score(weights: FloatArray) -> FloatArray:
        precisions = np.stack([_average_precision(weights, ranking) for ranking in ranked])  # (C, R)
        defined = ~np.isnan(precisions)
        totals = np.where(defined, precisions, 0.0).sum(axis=0)
        return np.where(defined.any(axis=0), totals / np.maximum(defined.sum(axis=0), 1), np.nan)

    return score


RESAMPLED: dict[str, Callable[[FloatArray, FloatArray, FloatArray], Metric]] = {
    "f1_macro": f1_macro,
    "f1_micro": f1_micro,
    "average_precision_macro": average_precision_macro,
    "subset_accuracy": subset_accuracy,
    "hamming_loss": hamming_loss,
}
# Those and their variants at tuned thresholds, in the order of the one table.
COMPARED_METRICS = tuple(metric.name for metric in METRICS if metric.path[1] in RESAMPLED)


def build_metric(
    name: str, labels: FloatArray, probs: FloatArray, thresholds: Sequence[float] | FloatArray | None = None
) -> Metric:
    """Prepare one model's score so that any weighting of the rows costs a matrix product.

    `thresholds` (C,) are 0.5 when not given; prob >= threshold is a yes. `metric(np.ones((N, 1)))` is the
    plain score.
    """
    labels, probs = np.asarray(labels, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    assert labels.ndim == 2, labels.shape
    assert labels.shape == probs.shape, (labels.shape, probs.shape)
    cuts = np.broadcast_to(np.asarray(0.5 if thresholds is None else thresholds), labels.shape[1:])
    return RESAMPLED[METRIC_OF[name].path[1]](labels, probs, cuts)


def _count_f1_cells(
    labels: FloatArray, probs: FloatArray, thresholds: FloatArray
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (N, C) true positives, and predicted plus true positives (2 tp + fp + fn)."""
    positive = labels == 1
    predicted = (probs >= thresholds) & ~np.isnan(labels)
    return (positive & predicted).astype(np.int64), positive.astype(np.int64) + predicted


def _ratio_metric(numerators: npt.NDArray[Any], denominators: npt.NDArray[Any], when_empty: float) -> Metric:
    """Return the mean over K of weighted sums' ratios; both arguments are (K, N) counts per row.

    float32 sums of whole numbers are exact up to 2**24, far above N times a row's largest count.
    """
    count = len(numerators)
    stacked = np.concatenate([numerators, denominators]).astype(np.float32)  # (2K, N)

    def score(weights: FloatArray) -> FloatArray:
        sums = (stacked @ weights).astype(np.float64)  # (2K, R)
        below = sums[count:]
        ratios = np.where(below > 0, sums[:count] / np.where(below > 0, below, 1.0), when_empty)
        return ratios.mean(axis=0)

    return score


@dataclass(frozen=True)
class Ranking:
    """One label's rows by falling score, and the cut-offs at which recall can grow.

    `rows` run down to the last cut-off that holds a positive, `positive_rows` are the positives among them.
    `last` and `positive_last` say, per cut-off, which entry of each is the last one above it.
    """

    rows: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    positive_rows: npt.NDArray[np.int64]
    positive_last: npt.NDArray[np.int64]


def _rank(truth: FloatArray, scores: FloatArray) -> Ranking:
    """Sort one label's known rows; average precision needs only cut-offs with a positive, few of the N."""
    known = np.flatnonzero(~np.isnan(truth))
    order = known[np.argsort(-scores[known], kind="stable")]
    positive = truth[order] == 1
    last_of_tie = np.append(scores[order][1:] != scores[order][:-1], True)[: len(order)]
    tie = np.cumsum(last_of_tie) - last_of_tie  # (N,) which cut-off a row belongs to
    cut_offs, counts = np.unique(tie[positive], return_counts=True)
    last = np.flatnonzero(last_of_tie)[cut_offs]
    end = last[-1] + 1 if len(last) else 0
    return Ranking(order[:end], last, order[positive], np.cumsum(counts) - 1)


def _average_precision(weights: FloatArray, ranking: Ranking) -> FloatArray:
    """Return one label's average precision (R,), nan where a resample holds no positive."""
    if not len(ranking.rows):
        return np.full(weights.shape[1], np.nan)
    above = _accumulate(weights[ranking.rows])[ranking.last]  # (cut-offs, R)
    reached = _accumulate(weights[ranking.positive_rows])[ranking.positive_last]
    gained = np.diff(reached, axis=0, prepend=0)
    total = reached[-1].astype(np.float64)
    summed = np.einsum("kr,kr->r", gained, reached / np.maximum(above, 1), dtype=np.float64)
    return np.where(total > 0, summed / np.where(total > 0, total, 1.0), np.nan)


def _accumulate(weights: FloatArray) -> FloatArray:
    """Sum down the rows, in place.

    Adding row to row is a vector operation over the resamples; np.cumsum walks down one column at a time
    and takes four times as long.
    """
    for above, below in zip(weights, weights[1:], strict=False):
        below += above
    return weights


def draw_weights(num_rows: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield (N, r) slices of `resamples` multinomial draws of N rows out of N, the same for the same seed."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_CELLS // num_rows)
    for start in range(0, resamples, step):
        width = min(step, resamples - start)
        drawn = rng.integers(0, num_rows, size=(num_rows, width))
        cells = drawn * width + np.arange(width)
        counts = np.bincount(cells.ravel(), minlength=num_rows * width)
        yield counts.reshape(num_rows, width).astype(np.float32)


def score_rows(metrics: Sequence[Metric], num_rows: int) -> FloatArray:
    """Return the (K,) plain scores of K metrics over the same N rows."""
    weights = np.ones((num_rows, 1), dtype=np.float32)
    return np.array([metric(weights)[0] for metric in metrics])


def bootstrap(metrics: Sequence[Metric], num_rows: int, resamples: int = RESAMPLES, seed: int = 0) -> FloatArray:
    """Return the (K, R) scores of K metrics on the same R resamples of the rows."""
    slices = [np.stack([metric(weights) for metric in metrics]) for weights in draw_weights(num_rows, resamples, seed)]
    return np.concatenate(slices, axis=1)


def estimate(value: float, replicates: FloatArray) -> Estimate:
    """Give a score its percentile interval from its (R,) resampled scores.

    The percentile interval (Efron & Tibshirani 1993, ch. 13) stays within 0 and 1 and holds its level for
    macro-F1 of 250 to 1,000 rows (benchmarks/coverage.py); BCa (ch. 14) covered within a point of it.
    """
    defined = replicates[~np.isnan(replicates)]
    if not len(defined):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def paired_difference(
    value: float,
    replicates: FloatArray,
    baseline_value: float,
    baseline_replicates: FloatArray,
) -> Difference:
    """Compare two models scored on the same resamples, (R,) each.

    With d the difference of the scores and s the standard deviation of its R resampled values, the interval
    is d -/+ z s (the standard interval, Efron & Tibshirani 1993, ch. 12-13) and the p value is
    2 (1 - Phi(|d| / s)); zero is outside the interval exactly when p < 1 - LEVEL.

    Why not count resamples as Berg-Kirkpatrick et al. (2012) do: a counted p is never below 2 / (R + 1),
    which Holm's correction over 50 rows lifts above 0.05, so no difference however large would pass. Why not
    BCa: two students mostly agree, so few rows carry their difference, and there BCa is too narrow: side by
    side, with 99 % of the noise shared, it covered the difference 1.5 points less often.
    """
    difference = value - baseline_value
    resampled = replicates - baseline_replicates
    resampled = resampled[~np.isnan(resampled)]
    if math.isnan(difference) or len(resampled) < 2:
        return Difference(difference, math.nan, math.nan, math.nan)
    spread = float(resampled.std(ddof=1))
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * spread
    return Difference(difference, difference - reach, difference + reach, _normal_p_value(difference, spread))


def _normal_p_value(difference: float, spread: float) -> float:
    if difference == 0:
        return 1.0
    return math.erfc(abs(difference) / spread / math.sqrt(2)) if spread > 0 else 0.0


def compare_predictions(
    labels: FloatArray,
    probs: FloatArray,
    baseline_probs: FloatArray,
    metric: str = "f1_macro",
    thresholds: Sequence[float] | FloatArray | None = None,
    baseline_thresholds: Sequence[float] | FloatArray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Estimate, Estimate, Difference]:
    """Score a model and a baseline on the same rows; returns both estimates and their paired difference."""
    metrics = [
        build_metric(metric, labels, probs, thresholds),
        build_metric(metric, labels, baseline_probs, baseline_thresholds),
    ]
    value, baseline_value = score_rows(metrics, len(labels)).tolist()
    replicates, baseline_replicates = bootstrap(metrics, len(labels), resamples, seed)
    return (
        estimate(value, replicates),
        estimate(baseline_value, baseline_replicates),
        paired_difference(value, replicates, baseline_value, baseline_replicates),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for being the best of several (Holm 1979), in the order given.

    The i-th smallest of m, i from 0, becomes the largest of (m - j) p_j over j <= i, at most 1. The chance of
    any false claim then stays below the level whatever the dependence, which is needed here: every row is
    compared with the same baseline. Nan, a comparison that could not be made, stays nan and does not count.
    """
    known = [index for index, value in enumerate(p_values) if not math.isnan(value)]
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(known, key=lambda index: p_values[index])):
        largest = max(largest, (len(known) - rank) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1); the latter is nan for a single value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def paired_t_test(differences: Sequence[float], overlap: float = 0.0) -> float:
    """Return the two-sided p value that differences paired by seed or fold have mean 0; nan for fewer than two.

    t = mean / (std sqrt(1 / n + overlap)) with n - 1 degrees of freedom. This is the test reported over seeds:
    it assumes roughly normal differences, which scores averaged over hundreds of rows give (Dror et al.
    2018), and it can speak for 3 to 5 seeds, where a test of their signs cannot fall under 5 %.

    Folds, and seeds that split the data anew, share most of their training rows, so their differences are not
    independent and the plain test claims too much. `overlap` = test rows / training rows is the correction of
    Nadeau & Bengio, Inference for the generalization error, 2003; leave it 0 for seeds of one split.
    """
    from scipy.special import stdtr

    count = len(differences)
    if count < 2:
        return math.nan
    mean, std = mean_and_std(differences)
    if mean == 0:
        return 1.0
    if std == 0:
        return 0.0
    return float(2 * stdtr(count - 1, -abs(mean) / (std * math.sqrt(1 / count + overlap))))
