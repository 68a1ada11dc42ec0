"""How far other test texts would have moved a run's scores: bootstrap intervals, from its predictions (no torch).

Rows of one text are answered alike, so texts are drawn and not rows. All models are scored on the same resamples, so
that what two of them share cancels in their difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from research.evaluation.bootstrap import RESAMPLES, Metric, bootstrap, build_metric, score_texts
from research.evaluation.gain import GAIN_METRICS
from research.evaluation.inference import Difference, Estimate, Scored, difference, estimate
from research.names import METRIC_OF
from research.runs.formats import PREDICTION_FILES, dig
from research.runs.run import Run

# Seconds of a report on a common test part, and at most a minute on 100,000 rows, whose intervals are narrow anyway.
MOST_CELLS, FEWEST_RESAMPLES = 200_000_000, 200


@dataclass(frozen=True)
class Resampled:
    """The scores of a run's models on the same resamples of its test texts.

    Attributes:
        num_rows: Test rows.
        num_texts: Distinct texts among them; None where the predictions do not tell.
        scores: {(model, metric): the scores of one seed}; metrics are GAIN_METRICS.
        label_f1: {(model, label): the same} at tuned thresholds.
    """

    num_rows: int
    num_texts: int | None
    scores: Mapping[tuple[str, str], Scored]
    label_f1: Mapping[tuple[str, str], Scored]

    def score(self, model: str, metric: str) -> Estimate | None:
        """Return a model's score with its interval."""
        return self._estimate(self.scores.get((model, metric)))

    def f1_of(self, model: str, label: str) -> Estimate | None:
        """Return a label's F1 with its interval."""
        return self._estimate(self.label_f1.get((model, label)))

    def difference(self, model: str, baseline: str, metric: str) -> Difference | None:
        """Return how much a model scores above a baseline, with the interval that comparing the two gives."""
        if not {(model, metric), (baseline, metric)} <= self.scores.keys():
            return None
        gap = self.scores[model, metric] - self.scores[baseline, metric]
        found = difference([gap], self.num_texts or self.num_rows)
        return None if math.isnan(found.low) else found

    def _estimate(self, scored: Scored | None) -> Estimate | None:
        if scored is None:
            return None
        found = estimate(scored, self.num_texts or self.num_rows)
        return None if math.isnan(found.value) or math.isnan(found.low) else found


def resample_run(run: Run) -> Resampled | None:
    """Score the models of a run on resamples of its test texts; None without predictions, as in a run of several folds."""
    if not run.has(PREDICTION_FILES["test"]) or not len(run.predictions.index):
        return None
    predictions = run.predictions
    distinct, text = np.unique(predictions.text_cluster, return_inverse=True)
    metrics, f1_metrics = _build_metrics(run, text)
    both = [*metrics.values(), *f1_metrics.values()]
    cells = len(text) * len(predictions.label_names) * len(predictions.probs)
    resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, MOST_CELLS // max(1, cells)))
    plain, resampled = score_texts(both, len(distinct)), bootstrap(both, len(distinct), resamples)
    scored = [Scored(plain[place : place + 1], resampled[place : place + 1]) for place in range(len(both))]
    return Resampled(
        len(text),
        len(distinct) if predictions.complete else None,
        dict(zip(metrics, scored[: len(metrics)], strict=True)),
        dict(zip(f1_metrics, scored[len(metrics) :], strict=True)),
    )


def _build_metrics(run: Run, text: npt.NDArray[np.int64]) -> tuple[dict[tuple[str, str], Metric], dict[tuple[str, str], Metric]]:
    """Return the metrics by model and name, and those of each label's F1; without tuned thresholds, what needs none."""
    labels, names = run.predictions.labels, run.predictions.label_names
    metrics, f1_metrics = {}, {}
    for model, probs in run.predictions.probs.items():
        tuned = np.array([dig(run.scores, "thresholds", model, label) for label in names], dtype=np.float64)
        has_tuned = not np.isnan(tuned).any()
        for name in GAIN_METRICS:
            if has_tuned or not METRIC_OF[name].tuned:
                metrics[model, name] = build_metric(name, labels, probs, tuned if METRIC_OF[name].tuned else None, text)
        for column, label in enumerate(names if has_tuned else ()):
            cells = slice(column, column + 1)
            if dig(run.scores, model, "test", "tuned", "per_label", label, "f1") is not None:
                f1_metrics[model, label] = build_metric("f1_macro", labels[:, cells], probs[:, cells], tuned[cells], text)
    return metrics, f1_metrics
