"""Scores on resampled test texts, by which one sees how far other texts would have moved them (no torch).

N rows, C labels, G texts, R resamples. Labels are (N, C) floats holding 0, 1 or nan (unknown, left out of every
figure); probs are (N, C); weights are (G, R): how often each text was drawn in each resample. One weight matrix
serves every model, so that all are scored on the same resampled texts: what two models share, the hard texts above
all, cancels in their difference.

Texts are drawn and not rows: rows that repeat a text are answered alike and say nothing new, and drawing them one
by one made intervals 15 to 21 % too narrow on 1,266 rows of 1,017 texts (a cluster bootstrap: Davison & Hinkley,
Bootstrap Methods and their Application, 1997, section 3.8). Near-duplicates, or several comments by one author,
still pass for independent.

Sources:
    Efron & Tibshirani, An Introduction to the Bootstrap, 1993.
    Berg-Kirkpatrick, Burkett & Klein, An empirical investigation of statistical significance in NLP, 2012.
    Dror, Baumer, Shlomov & Reichart, The hitchhiker's guide to testing statistical significance in NLP, 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from research.names import METRIC_OF, METRICS

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]
Metric = Callable[[FloatArray], FloatArray]  # weights (G, R) -> scores (R,)
RESAMPLES = 2000
# Weights held at once: resamples come in slices of this many cells, so memory does not grow with R.
CHUNK_CELLS = 4_000_000


@dataclass(frozen=True)
class Answers:
    """What one model is scored on: labels and probabilities (N, C), thresholds, and each row's text.

    Thresholds are (C,), or (N, C) where rows have their own. `text` (N,) counts from 0 to `num_texts` - 1.
    """

    labels: FloatArray
    probs: FloatArray
    thresholds: FloatArray
    text: IntArray
    num_texts: int

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Cells with a label."""
        return ~np.isnan(self.labels)

    @property
    def yes(self) -> npt.NDArray[np.bool_]:
        """The decisions in known cells; prob >= threshold is a yes."""
        return (self.probs >= self.thresholds) & self.known

    def per_text(self, counts: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Sum (K, N) counts over the rows of each text, (K, G)."""
        sums = [np.bincount(self.text, weights=count, minlength=self.num_texts) for count in counts]
        return np.array(sums, dtype=np.float32)


def f1_macro(answers: Answers) -> Metric:
    """Score macro-F1: the mean over labels of 2 tp / (2 tp + fp + fn), 0 for a label without any of them.

    As in scikit-learn with zero_division=0; a label without known cells is left out. A label without positives in a
    resample scores 0 there too: the bootstrap applies the very statistic that is reported.
    """
    positive, yes = answers.labels == 1, answers.yes
    return _ratio_metric(answers, 2 * (positive & yes), positive.astype(np.int64) + yes, answers.known)


def f1_micro(answers: Answers) -> Metric:
    """Score micro-F1: 2 tp / (2 tp + fp + fn) with the counts summed over all known cells."""
    positive, yes = answers.labels == 1, answers.yes
    counts = 2 * (positive & yes), positive.astype(np.int64) + yes
    hits, marked = (count.sum(axis=1, keepdims=True) for count in counts)
    return _ratio_metric(answers, hits, marked, np.ones_like(marked))


def subset_accuracy(answers: Answers) -> Metric:
    """Score the share of rows with every label right, among rows whose labels are all known."""
    complete = np.all(answers.known, axis=1)[:, None]  # (N, 1)
    right = complete & np.all(answers.yes == (answers.labels == 1), axis=1)[:, None]
    return _ratio_metric(answers, right, complete, complete)


def hamming_loss(answers: Answers) -> Metric:
    """Score the share of known cells decided wrongly; lower is better."""
    wrong = answers.known & (answers.yes != (answers.labels == 1))
    known = answers.known.sum(axis=1, keepdims=True)
    return _ratio_metric(answers, wrong.sum(axis=1, keepdims=True), known, known)


def average_precision_macro(answers: Answers) -> Metric:
    """Score the mean over labels of average precision; the thresholds play no part.

    AP = sum over cut-offs k of (recall_k - recall_(k-1)) * precision_k, equal scores sharing a cut-off, as
    in scikit-learn. Labels without positives (in a resample) are left out of the mean.
    """
    ranked = [_rank(answers, column) for column in range(answers.labels.shape[1])]
    return lambda weights: _mean_defined(np.stack([_average_precision(weights, ranking) for ranking in ranked]))


RESAMPLED: dict[str, Callable[[Answers], Metric]] = {
    "f1_macro": f1_macro,
    "f1_micro": f1_micro,
    "average_precision_macro": average_precision_macro,
    "subset_accuracy": subset_accuracy,
    "hamming_loss": hamming_loss,
}
# Those and their variants at tuned thresholds, in the order of the one table.
COMPARED_METRICS = tuple(metric.name for metric in METRICS if metric.path[1] in RESAMPLED)


def build_metric(
    name: str,
    labels: FloatArray,
    probs: FloatArray,
    thresholds: Sequence[float] | FloatArray | None = None,
    text: IntArray | None = None,
    num_texts: int | None = None,
) -> Metric:
    """Prepare one model's score so that any weighting of the texts costs a matrix product.

    Args:
        thresholds: (C,), 0.5 when not given; prob >= threshold is a yes.
        text: (N,) each row's text, counted from 0; every row has its own when not given.
        num_texts: All texts that are drawn from, when more than those of these rows.

    Returns:
        A function of weights (G, R); of np.ones((G, 1)) it gives the plain score.
    """
    text = np.arange(len(labels)) if text is None else text
    num_texts = int(text.max(initial=-1)) + 1 if num_texts is None else num_texts
    return metric_builder(name)(take_answers(labels, probs, thresholds, text, num_texts))


def metric_builder(name: str) -> Callable[[Answers], Metric]:
    """Return what prepares a metric of COMPARED_METRICS; the answers bring the thresholds it is taken at."""
    return RESAMPLED[METRIC_OF[name].path[1]]


def take_answers(
    labels: FloatArray,
    probs: FloatArray,
    thresholds: Sequence[float] | FloatArray | None,
    text: IntArray,
    num_texts: int,
) -> Answers:
    """Return the answers of one model to (N, C) labels; thresholds are 0.5 when not given."""
    labels, probs = np.asarray(labels, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    assert labels.ndim == 2, labels.shape
    assert labels.shape == probs.shape, (labels.shape, probs.shape)
    cuts = np.broadcast_to(np.asarray(0.5 if thresholds is None else thresholds, dtype=np.float64), labels.shape[1:])
    return Answers(labels, probs, cuts, text, num_texts)


def _mean_defined(scores: FloatArray) -> FloatArray:
    """Return the mean over labels (K, R) of what is not nan; nan where nothing is."""
    defined = ~np.isnan(scores)
    totals = np.where(defined, scores, 0.0).sum(axis=0)
    return np.where(defined.any(axis=0), totals / np.maximum(defined.sum(axis=0), 1), np.nan)


def _ratio_metric(
    answers: Answers, numerators: npt.NDArray[Any], denominators: npt.NDArray[Any], known: npt.NDArray[Any]
) -> Metric:
    """Return the mean over K of weighted sums' ratios; the arguments are (N, K) counts per row.

    A ratio whose denominator is 0 is 0 where something is known, and else left out of the mean. float32 sums of
    whole numbers are exact up to 2**24, far above N times a row's largest count.
    """
    count = numerators.shape[1]
    blocks = [numerators, denominators] if known.all() else [numerators, denominators, known]
    stacked = np.concatenate([answers.per_text(block.T) for block in blocks])  # (2K or 3K, G)

    def score(weights: FloatArray) -> FloatArray:
        sums = (stacked @ weights).astype(np.float64)
        below = sums[count : 2 * count]
        empty = 0.0 if len(blocks) == 2 else np.where(sums[2 * count :] > 0, 0.0, np.nan)
        return _mean_defined(np.where(below > 0, sums[:count] / np.where(below > 0, below, 1.0), empty))

    return score


@dataclass(frozen=True)
class Ranking:
    """One label's cut-offs at which recall can grow, from the highest score down.

    `counts` (2K, G), sparse, says in turn of every cut-off how many rows of each text lie between it and the one
    above it, and how many positives do.
    """

    counts: Any
    num_cut_offs: int


def _rank(answers: Answers, column: int) -> Ranking:
    """Sort one label's known rows; average precision needs only cut-offs with a positive, few of the N."""
    from scipy.sparse import csr_array

    truth, scores = answers.labels[:, column], answers.probs[:, column]
    known = np.flatnonzero(~np.isnan(truth))
    order = known[np.argsort(-scores[known], kind="stable")]
    positive = truth[order] == 1
    last_of_tie = np.append(scores[order][1:] != scores[order][:-1], True)[: len(order)]
    tie = np.cumsum(last_of_tie) - last_of_tie  # (N,) which tie a row belongs to
    with_positive = np.unique(tie[positive])
    count = len(with_positive)
    cut_off = np.searchsorted(with_positive, tie)  # rows under the last positive are above no cut-off that counts
    above = cut_off < count
    rows = np.concatenate([2 * cut_off[above], 2 * cut_off[positive] + 1])
    texts = answers.text[np.concatenate([order[above], order[positive]])]
    counts = csr_array((np.ones(len(rows), np.float32), (rows, texts)), shape=(2 * count, answers.num_texts))
    return Ranking(counts, count)


def _average_precision(weights: FloatArray, ranking: Ranking) -> FloatArray:
    """Return one label's average precision (R,), nan where a resample holds no positive."""
    if not ranking.num_cut_offs:
        return np.full(weights.shape[1], np.nan)
    drawn = ranking.counts @ weights  # (2K, R)
    gained = drawn[1::2].copy()
    _accumulate(drawn.reshape(ranking.num_cut_offs, -1))  # both at once
    above, reached = drawn[::2], drawn[1::2]
    total = reached[-1].astype(np.float64)
    summed = np.einsum("kr,kr->r", gained, reached / np.maximum(above, 1), dtype=np.float64)
    return np.where(total > 0, summed / np.where(total > 0, total, 1.0), np.nan)


def _accumulate(weights: FloatArray) -> None:
    """Sum down the rows, in place.

    Adding row to row is a vector operation over the resamples; np.cumsum walks down one column at a time
    and takes four times as long.
    """
    for above, below in zip(weights, weights[1:], strict=False):
        below += above


def draw_weights(num_texts: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield (G, r) slices of `resamples` multinomial draws of G texts out of G, the same for the same seed."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_CELLS // num_texts)
    for start in range(0, resamples, step):
        width = min(step, resamples - start)
        drawn = rng.integers(0, num_texts, size=(num_texts, width))
        cells = drawn * width + np.arange(width)
        counts = np.bincount(cells.ravel(), minlength=num_texts * width)
        yield counts.reshape(num_texts, width).astype(np.float32)


def score_texts(metrics: Sequence[Metric], num_texts: int) -> FloatArray:
    """Return the (K,) plain scores of K metrics over the same G texts."""
    weights = np.ones((num_texts, 1))
    return np.array([metric(weights)[0] for metric in metrics])


def bootstrap(metrics: Sequence[Metric], num_texts: int, resamples: int = RESAMPLES, seed: int = 0) -> FloatArray:
    """Return the (K, R) scores of K metrics on the same R resamples of the texts."""
    slices = [np.stack([metric(weights) for metric in metrics]) for weights in draw_weights(num_texts, resamples, seed)]
    return np.concatenate(slices, axis=1)
