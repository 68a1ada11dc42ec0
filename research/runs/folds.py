"""The scores of a cross-validation: the mean of its folds' and those of all rows together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.evaluation.gain import AnsweredPart, measure_gain, measure_gap, measure_keeping, measure_scores, resample_models
from research.runs.run import Run, load_run


def combine_folds(path: Path, num_folds: int) -> dict[str, Any]:
    """Return the whole metrics.json of a cross-validation whose folds are finished below a directory."""
    folds = [load_run(path / f"fold_{fold + 1}") for fold in range(num_folds)]
    return aggregate_folds([fold.metrics for fold in folds]) | {"pooled": pool_folds(folds)}


def aggregate_folds(fold_metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of a cross-validation: mean and sample standard deviation of every number.

    A number that is null in some folds (an average precision without positives) is averaged over the
    others; the deviation of fewer than two numbers is null. Texts and flags are left out.
    """
    assert fold_metrics, "at least one fold"
    first = fold_metrics[0]
    trees = [{name: entry for name, entry in metrics.items() if name != "headline"} for metrics in fold_metrics]
    values = [metrics["headline"]["value"] for metrics in fold_metrics]
    headline_value = {"value": _mean(values), "std": _sample_std(values)}
    return {
        "folds": len(fold_metrics),
        "labels": list(first["labels"]),
        "mean": _aggregate(trees, _mean),
        "std": _aggregate(trees, _sample_std),
        "headline": {**first["headline"], **headline_value},
    }


def pool_folds(folds: Sequence[Run]) -> dict[str, Any]:
    """Return the scores over all rows, each answered by the model of the fold that did not learn from it.

    See `research.evaluation.folds` for what is measured and `measure_spread` for what the intervals are over.

    Returns:
        {"rows", "texts", "scores": as `measure_scores`, and of a run that has them "gap": as `measure_gap`, "kept": as
        `measure_keeping`, "kd_gain": as `measure_gain`}.
    """
    tested, ratios = [], []
    for fold in folds:
        # In the order of the columns, which is not that of a file with sorted keys.
        thresholds = {model: [cuts[label] for label in fold.label_names] for model, cuts in fold.metrics["thresholds"].items()}
        predictions = fold.predictions
        # A teacher that is a table may speak of all test rows of one fold and not of another's.
        probs = {model: of_model for model, of_model in predictions.probs.items() if all(model in each.models for each in folds)}
        tested.append(AnsweredPart(predictions.labels, probs, thresholds, predictions.text_cluster))
        ratios.append(fold.metrics["rows"]["test"] / fold.metrics["rows"]["train"])
    scores, overlap = resample_models(tested), statistics.fmean(ratios)
    clusters = np.concatenate([fold.text_cluster for fold in tested])
    num_rows, num_texts = len(clusters), len(np.unique(clusters))
    pooled: dict[str, Any] = {"rows": num_rows, "texts": num_texts, "scores": measure_scores(scores, num_texts, overlap)}
    models = tested[0].probs.keys()
    if {"teacher", "student"} <= models:
        pooled["gap"] = measure_gap(scores, num_texts, overlap)
        pooled["kept"] = measure_keeping(scores, num_texts, num_rows, overlap)
    if {"student", "control"} <= models:
        pooled["kd_gain"] = measure_gain(scores, num_texts, overlap)
    return pooled


def _aggregate(trees: Sequence[Any], combine: Callable[[Sequence[float | None]], float | None]) -> Any:
    result: dict[str, Any] = {}
    for name in dict.fromkeys(name for tree in trees for name in tree):
        leaves = [tree[name] for tree in trees if name in tree]
        if all(isinstance(leaf, Mapping) for leaf in leaves):
            result[name] = _aggregate(leaves, combine)
        elif all(leaf is None or (isinstance(leaf, (int, float)) and not isinstance(leaf, bool)) for leaf in leaves):
            result[name] = combine(leaves)
    return result


def _defined(values: Sequence[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float | None]) -> float | None:
    defined = _defined(values)
    return statistics.fmean(defined) if defined else None


def _sample_std(values: Sequence[float | None]) -> float | None:
    defined = _defined(values)
    return statistics.stdev(defined) if len(defined) > 1 else None
