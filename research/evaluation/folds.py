"""Scores of a cross-validation over all rows, each answered by the model of the fold that held it out (no torch).

K folds, R resamples. The statistic of the whole is

- of a metric of decisions (F1, subset accuracy, Hamming loss): that of all rows together, each decided at the
  thresholds that its own fold tuned. Counts add up, whichever model made them.
- of a ranking metric (average precision): the mean over folds of the fold's own. Ranking the rows of K models in one
  list would compare scores of K scales, and a fold whose model is shyer than the others would count as one that ranks
  worse (Forman & Scholz, Apples-to-apples in cross-validation studies, SIGKDD Explorations 12, 2010, who for F1 find
  the pooled counts to be the one nearly unbiased choice).

Texts are drawn from all folds at once. No text stands in two folds, so each fold's share of a resample varies around
its own, which moves a mean over folds by next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from research.evaluation.bootstrap import Answers, Metric, metric_builder
from research.evaluation.inference import Scored
from research.names import METRIC_OF

FloatArray = npt.NDArray[np.floating[Any]]


def build_fold_metrics(name: str, folds: Sequence[Answers]) -> list[Metric]:
    """Prepare the score of each fold, and after them that of all rows where it is no mean of theirs.

    Of one fold, which is a single split, it is the one metric.
    """
    build = metric_builder(name)
    metrics = [build(fold) for fold in folds]
    return metrics if len(folds) == 1 or METRIC_OF[name].kind == "ranking" else [*metrics, build(pool_answers(folds))]


def pool_answers(folds: Sequence[Answers]) -> Answers:
    """Put the rows of all folds together, each with the thresholds of its fold."""
    return Answers(
        np.concatenate([fold.labels for fold in folds]),
        np.concatenate([fold.probs for fold in folds]),
        np.concatenate([np.broadcast_to(fold.thresholds, fold.labels.shape) for fold in folds]),
        np.concatenate([fold.text for fold in folds]),
        folds[0].num_texts,
    )


def gather_folds(plain: FloatArray, resampled: FloatArray, num_folds: int) -> Scored:
    """Return the scores of one seed from those of `build_fold_metrics`: plain (M,), and on resampled texts (M, R)."""
    if num_folds == 1:
        return Scored(plain, resampled)
    folds = tuple(Scored(plain[fold : fold + 1], resampled[fold : fold + 1]) for fold in range(num_folds))
    if len(plain) > num_folds:
        return Scored(plain[num_folds:], resampled[num_folds:], folds)
    return Scored(_mean_defined(plain[:, None])[0], _mean_defined(resampled), folds)


def _mean_defined(values: FloatArray) -> FloatArray:
    """Return the mean over folds (K, R) as (1, R) of what is not nan; nan where nothing is."""
    defined = ~np.isnan(values)
    totals, counts = np.where(defined, values, 0.0).sum(axis=0, keepdims=True), defined.sum(axis=0, keepdims=True)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def stack_seeds(scores: Sequence[Scored]) -> Scored:
    """Return the scores of several seeds as one; all have the same folds."""
    folds = tuple(stack_seeds(of_fold) for of_fold in zip(*(score.folds for score in scores), strict=True))
    plain = np.concatenate([score.plain for score in scores])
    return Scored(plain, np.concatenate([score.resampled for score in scores]), folds)
