"""Run directories for the tests of comparing, written by the same code that a run uses."""

from pathlib import Path
from typing import Any

import numpy as np

from research.components import COMPONENT_NAMES
from research.evaluation.calibration import sigmoid
from research.evaluation.metrics import build_metrics
from research.names import MODELS, SCORES_PER_EPOCH
from research.report.run_page import write_report
from research.runs.directory import RunDirectory
from research_config import ExperimentConfig, saved_settings

LABELS = ("bully", "threat", "spam")
PREVALENCE = np.array([0.4, 0.2, 0.3])


def make_truth(num_rows: int = 120, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((num_rows, len(LABELS))) < PREVALENCE).astype(float)


def make_probs(truth: np.ndarray, skill: float, seed: int) -> np.ndarray:
    """Return the probabilities of `make_logits`."""
    return sigmoid(make_logits(truth, skill, seed))


def make_logits(truth: np.ndarray, skill: float, seed: int) -> np.ndarray:
    """Return logits that follow known labels the better, the larger `skill`."""
    noise = np.random.default_rng(seed).standard_normal(truth.shape)
    return (noise + skill * (np.nan_to_num(truth) - 0.5)).astype(np.float32)


def write_run(
    path: Path,
    skill: float = 2.0,
    truth: np.ndarray | None = None,
    index: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
    noise_seed: int = 1,
    finished: bool = True,
    test_sha256: str = "a" * 64,
    efficiency: dict[str, Any] | None = None,
    validation_score: float = 0.8,
    models: tuple[str, ...] = ("student",),
    **flags: Any,
) -> Path:
    """Write a run directory whose student is as good as `skill`; `flags` go into its config."""
    truth = make_truth() if truth is None else truth
    index = np.arange(len(truth)) if index is None else index
    clusters = index if clusters is None else clusters
    path.mkdir(parents=True)
    directory = RunDirectory(path)
    directory.write_config(saved_settings(ExperimentConfig(**{"label_columns": LABELS, **flags})))
    if not finished:
        return path
    logits = {model: make_logits(truth, skill + (model == "teacher"), noise_seed) for model in models}
    for part in ("test", "validation"):
        directory.write_predictions(part, index, clusters, LABELS, truth, logits)
    directory.write_environment({"data": {"dataset_sha256": "d" * 64, "test_sha256": test_sha256}})
    if efficiency is not None:
        directory.write_efficiency(efficiency)
    scores = {
        part: {"at_0.5": {"f1_macro": score, "average_precision_macro": score}, "tuned": {"f1_macro": score}}
        for part, score in (("test", 0.8), ("validation", validation_score))
    }
    directory.write_metrics(
        {
            "labels": list(LABELS),
            "rows": {"train": 4 * len(truth), "validation": len(truth), "test": len(truth)},
            "headline": {"model": models[-1], "part": "test", "metric": "f1_macro", "value": 0.7},
            "thresholds": {model: dict.fromkeys(LABELS, 0.4) for model in models},
            **dict.fromkeys(models, scores),
        }
    )
    return path


def write_scored_run(path: Path) -> Path:
    """Write a run of all three models with the metrics, the history and the report that a run computes."""
    truth = make_truth()
    logits = {model: make_logits(truth, skill, 1) for model, skill in zip(MODELS, (4, 2, 3), strict=True)}
    parts = {model: dict.fromkeys(("validation", "test"), sigmoid(values)) for model, values in logits.items()}
    with RunDirectory(path) as directory:
        directory.claim(saved_settings(ExperimentConfig(label_columns=LABELS, with_control=True)))
        columns = (*COMPONENT_NAMES, *(f"val_{name}" for name in SCORES_PER_EPOCH))
        directory.write_history([{"epoch": 1, **dict.fromkeys(columns, 0.5)}])
        directory.write_predictions("test", range(len(truth)), range(len(truth)), LABELS, truth, logits)
        directory.write_metrics(build_metrics(LABELS, dict.fromkeys(("train", "validation", "test"), truth), parts, {}))
    write_report(path)
    return path
