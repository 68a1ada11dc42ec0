"""How far other test texts would have moved a run's scores: bootstrap intervals, from its predictions (no torch).

Rows of one text are answered alike, so texts are drawn and not rows. All models are scored on the same resamples, so
that what two of them share cancels in their difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from research.evaluation.bootstrap import RESAMPLES, Metric, build_metric, draw_weights
from research.evaluation.gain import GAIN_METRICS
from research.names import METRIC_OF
from research.runs.formats import PREDICTION_FILES, dig
from research.runs.run import Run

FloatArray = npt.NDArray[np.floating[Any]]
LEVEL = 0.95
# Seconds of a report on a common test part, and at most a minute on 100,000 rows, whose intervals are narrow anyway.
MOST_CELLS, FEWEST_RESAMPLES = 200_000_000, 200


@dataclass(frozen=True)
class Interval:
    """A score, or the difference of two, and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """The scores of a run's models on the same resamples of its test texts.

    Attributes:
        num_rows: Test rows.
        num_texts: Distinct texts among them; None where the predictions do not tell.
        scores: {(model, metric): (1 + R,)}, the plain score first; metrics are GAIN_METRICS.
        label_f1: {(model, label): (1 + R,)} at tuned thresholds.
    """

    num_rows: int
    num_texts: int | None
    scores: Mapping[tuple[str, str], FloatArray]
    label_f1: Mapping[tuple[str, str], FloatArray]

    def score(self, model: str, metric: str) -> Interval | None:
        """Return a model's score with its percentile interval (Efron & Tibshirani 1993, ch. 13)."""
        return _percentile_interval(self.scores.get((model, metric)))

    def f1_of(self, model: str, label: str) -> Interval | None:
        """Return a label's F1 with its percentile interval."""
        return _percentile_interval(self.label_f1.get((model, label)))

    def difference(self, model: str, baseline: str, metric: str) -> Interval | None:
        """Return how much a model scores above a baseline, with the interval that comparing the two gives."""
        if not {(model, metric), (baseline, metric)} <= self.scores.keys():
            return None
        values = self.scores[model, metric] - self.scores[baseline, metric]
        defined = values[1:][~np.isnan(values[1:])]
        if math.isnan(values[0]) or len(defined) < 2:
            return None
        reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * float(defined.std(ddof=1))
        return Interval(float(values[0]), float(values[0]) - reach, float(values[0]) + reach)


def _percentile_interval(values: FloatArray | None) -> Interval | None:
    if values is None or math.isnan(values[0]):
        return None
    defined = values[1:][~np.isnan(values[1:])]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values[0]), float(low), float(high))


def resample_run(run: Run) -> Resampled | None:
    """Score the models of a run on resamples of its test texts; None without predictions, as in a run of several folds."""
    if not run.has(PREDICTION_FILES["test"]) or not len(run.predictions.index):
        return None
    clusters = getattr(run.predictions, "text_cluster", None)
    text = np.arange(len(run.predictions.index)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    num_texts = int(text.max()) + 1
    metrics, f1_metrics = _build_metrics(run)
    both = [*metrics.values(), *f1_metrics.values()]
    cells = len(text) * len(run.predictions.label_names) * len(run.predictions.probs)
    resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, MOST_CELLS // max(1, cells)))
    slices = [_score(both, weights[text]) for weights in _draw_weights(num_texts, resamples)]
    scores = np.concatenate(slices, axis=1)
    return Resampled(
        len(text),
        None if clusters is None else num_texts,
        dict(zip(metrics, scores[: len(metrics)], strict=True)),
        dict(zip(f1_metrics, scores[len(metrics) :], strict=True)),
    )


def _score(metrics: Sequence[Metric], weights: FloatArray) -> FloatArray:
    return np.stack([metric(weights) for metric in metrics])


def _draw_weights(num_texts: int, resamples: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield how often each text counts: once in the plain score, then as the resamples drew it."""
    yield np.ones((num_texts, 1), dtype=np.float32)
    yield from draw_weights(num_texts, resamples, 0)


def _build_metrics(run: Run) -> tuple[dict[tuple[str, str], Metric], dict[tuple[str, str], Metric]]:
    """Return the metrics by model and name, and those of each label's F1; without tuned thresholds, what needs none."""
    labels, names = run.predictions.labels, run.predictions.label_names
    metrics, f1_metrics = {}, {}
    for model, probs in run.predictions.probs.items():
        tuned = np.array([dig(run.scores, "thresholds", model, label) for label in names], dtype=np.float64)
        has_tuned = not np.isnan(tuned).any()
        for name in GAIN_METRICS:
            if has_tuned or not METRIC_OF[name].tuned:
                metrics[model, name] = build_metric(name, labels, probs, tuned if METRIC_OF[name].tuned else None)
        for column, label in enumerate(names if has_tuned else ()):
            cells = slice(column, column + 1)
            if dig(run.scores, model, "test", "tuned", "per_label", label, "f1") is not None:
                f1_metrics[model, label] = build_metric("f1_macro", labels[:, cells], probs[:, cells], tuned[cells])
    return metrics, f1_metrics
