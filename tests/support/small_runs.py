"""Run directories with the scores of a made-up run, written with numpy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from research.runs.directory import RunDirectory

LABELS = ("bully", "a|b<script>")
CONFIG = {
    "pipeline": "kd_only",
    "kd_alpha": 0.7,
    "lr": 1.5e-6,
    "label_columns": None,
    "teacher_checkpoint": None,
}


def make_scores(f1: float) -> dict[str, Any]:
    per_label = {label: {"f1": f1, "threshold": 0.4, "average_precision": None, "support": 3} for label in LABELS}
    scores = {"f1_macro": f1, "f1_micro": f1 + 0.01, "ece": float("nan"), "per_label": per_label}
    return {part: {"at_0.5": scores, "tuned": scores} for part in ("validation", "test")}


def make_metrics(models: tuple[str, ...] = ("teacher", "student"), student_f1: float = 0.7123) -> dict[str, Any]:
    f1 = {"teacher": 0.7345, "control": 0.7, "student": student_f1}
    return {
        "labels": list(LABELS),
        "rows": {"train": 80, "validation": 10, "test": 20},
        "headline": {"model": models[-1], "part": "test", "metric": "f1_macro", "value": f1[models[-1]]},
        "training": {model: {"best_epoch": 1, "epochs_run": 2, "skipped_steps": 0} for model in models},
        **{model: make_scores(f1[model]) for model in models},
    }


def write_run(path: Path, models: tuple[str, ...] = ("teacher", "student")) -> Path:
    generator = np.random.default_rng(0)
    labels = (generator.random((20, 2)) < 0.4).astype(float)
    labels[0, 0] = np.nan
    logits = {model: 2 * generator.standard_normal((20, 2)) for model in models}
    with RunDirectory(path) as run:
        run.claim(CONFIG)
        run.write_history([{"epoch": 1, "total_loss": 0.5, "learning_rate": 1.5e-6, "val_f1_macro": 0.6}])
        run.write_predictions("test", range(20), range(20), LABELS, labels, logits)
        run.write_efficiency({models[0]: {"size_mb": 1.5}, "ratios": {}, "remark": "nothing gained"})
        run.write_environment({"command_line": "python research_main.py --seed 1", "device": "cpu"})
        run.write_metrics(make_metrics(models))
    return path
