"""A finished run, read from its folder (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research.errors import InputError
from research.evaluation.calibration import sigmoid
from research.names import HEADLINE_METRIC, METRIC_OF, MODELS, Metric
from research.runs.formats import PREDICTION_FILES, dig, read_csv, read_json

MOST_ROWS = 2**53  # past it a float no longer counts
FloatArray = npt.NDArray[np.floating[Any]]
LARGEST_LOGIT = 1e30  # far above any model's, and safely a float32


@dataclass(frozen=True)
class Predictions:
    """One part's `index` (N,), `labels` (N, C) with nan where unknown, and `probs` {model: (N, C)}.

    `text_cluster` (N,) is one number for all rows of one text. Files of version 0.1 have none, nor logits: their
    rows pass for distinct texts, their probabilities have six decimals, and `complete` is false.
    """

    index: npt.NDArray[np.int64]
    text_cluster: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    labels: FloatArray
    probs: dict[str, FloatArray]
    complete: bool


@dataclass(frozen=True)
class Run:
    """A finished run; files beyond config.json and metrics.json are read when they are asked for.

    Reading raises an InputError that names the file which is missing or cut short.
    """

    path: Path
    config: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels, in the order of the columns."""
        return tuple(self.metrics["labels"])

    @property
    def num_folds(self) -> int:
        """Folds below this directory, 1 for a run of a single split."""
        return int(self.metrics.get("folds", 1))

    @property
    def scores(self) -> dict[str, Any]:
        """The tree of metrics; of several folds, their mean."""
        return self.metrics["mean"] if "folds" in self.metrics else self.metrics

    @property
    def over_all_rows(self) -> dict[str, Any]:
        """What was tested over all test rows: of folds, those of all together, empty where an older version left it out."""
        return self.metrics.get("pooled", {}) if "folds" in self.metrics else self.metrics

    @property
    def models(self) -> tuple[str, ...]:
        """The models that were evaluated, in the order of MODELS."""
        return tuple(model for model in MODELS if model in self.scores)

    @cached_property
    def folds(self) -> tuple[Run, ...]:
        """The runs of the folds, this run itself for a single split."""
        if "folds" not in self.metrics:
            return (self,)
        return tuple(load_run(self.path / f"fold_{number + 1}") for number in range(self.num_folds))

    @cached_property
    def history(self) -> list[dict[str, float | None]]:
        """A {column: value} per epoch, None where nothing was computed."""
        return read_history(self.path / "history.csv")

    @cached_property
    def control_history(self) -> list[dict[str, float | None]]:
        """The same of the control's training."""
        return read_history(self.path / "history_control.csv")

    @cached_property
    def predictions(self) -> Predictions:
        """The models' predictions of the test part."""
        return read_predictions(self.path / PREDICTION_FILES["test"])

    @cached_property
    def validation_predictions(self) -> Predictions:
        """The models' predictions of the validation part."""
        return read_predictions(self.path / PREDICTION_FILES["validation"])

    @cached_property
    def efficiency(self) -> dict[str, Any]:
        """Size and speed of the models, and their ratios."""
        return read_json(self.path / "efficiency.json")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, device, command line, data and timings."""
        return read_json(self.path / "environment.json")

    def has(self, name: str) -> bool:
        """Say whether the directory holds a file of that name."""
        return (self.path / name).is_file()


def load_run(path: str | Path) -> Run:
    """Read a finished run directory.

    Raises:
        InputError: there is none, or it is unfinished, or a file is cut short.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such run directory.")
    if not (path / "config.json").is_file():
        raise InputError(f"{path} holds no config.json, so it is no run directory.")
    if not (path / "metrics.json").is_file():
        raise InputError(f"{path} holds no metrics.json: the run is unfinished. Run the same command again to resume it.")
    run = Run(path, read_json(path / "config.json"), read_json(path / "metrics.json"))
    labels, headline = run.metrics.get("labels"), run.metrics.get("headline")
    if not isinstance(labels, list) or not isinstance(headline, Mapping) or "value" not in headline:
        raise InputError(f"{path / 'metrics.json'} holds no labels or no headline. Repeat the run with --overwrite.")
    return run


def read_history(path: Path) -> list[dict[str, float | None]]:
    """Return a {column: value} per epoch, None where nothing was computed."""
    header, values = read_csv(path)
    return [
        {name: None if math.isnan(value) else value for name, value in zip(header, row, strict=True)} for row in values.tolist()
    ]


def read_predictions(path: Path) -> Predictions:
    """Read a predictions file; probabilities come from its logits, as those behind metrics.json do.

    Raises:
        InputError: it is missing, cut short, lacks columns, or holds what is no label, logit or probability.
    """
    header, values = read_csv(path)
    column_of = {name: number for number, name in enumerate(header)}
    label_names = tuple(name.removeprefix("true_") for name in header if name.startswith("true_"))
    models = [model for model in MODELS if any(f"{model}_{label}" in column_of for label in label_names)]
    complete = "text_cluster" in column_of
    prefix = "logit_" if complete else ""
    lacking = [
        name
        for name in ("index", *(f"{prefix}{model}_{label}" for model in models for label in label_names))
        if name not in column_of
    ]
    if lacking or not label_names:
        raise InputError(f"{path} lacks {lacking[0] if lacking else 'true_<label>'}. Repeat the run with --overwrite.")

    def block(name: str) -> FloatArray:
        return values[:, [column_of[f"{name}_{label}"] for label in label_names]]

    index, labels = values[:, column_of["index"]], block("true")
    clusters = values[:, column_of["text_cluster"]] if complete else index
    for name, cells in (("index", index), ("text_cluster", clusters)):
        _refuse_cells(path, name, cells, (cells >= 0) & (cells < MOST_ROWS) & (cells == np.floor(cells)), "a row number")
    _refuse_cells(path, "true_<label>", labels, np.isin(labels, (0, 1)) | np.isnan(labels), "0, 1 or empty")
    found = {model: block(f"{prefix}{model}") for model in models}
    low, high, wanted = (-LARGEST_LOGIT, LARGEST_LOGIT, "a finite logit") if complete else (0, 1, "a probability from 0 to 1")
    for model, cells in found.items():
        _refuse_cells(path, f"{prefix}{model}_<label>", cells, (cells >= low) & (cells <= high), wanted)
    probs = {model: sigmoid(cells.astype(np.float32)) if complete else cells for model, cells in found.items()}
    return Predictions(index.astype(np.int64), clusters.astype(np.int64), label_names, labels, probs, complete)


def _refuse_cells(path: Path, columns: str, cells: FloatArray, good: npt.NDArray[np.bool_], wanted: str) -> None:
    if not good.all():
        first = cells[~good][0]
        row = int(np.flatnonzero(~good.reshape(len(good), -1).all(axis=1))[0])
        found = "an empty cell" if np.isnan(first) else f"{first:g}"
        raise InputError(f"{path}, data row {row + 1}: {columns} must be {wanted}, got {found}. Repeat the run with --overwrite.")


def result_line(path: str | Path, metrics: Mapping[str, Any]) -> str:
    """Return the last line of a run, as in "results/x  student test f1_macro=0.7123 (teacher 0.7345)"."""
    teacher = teacher_headline(metrics)
    return f"{path}  {_format_headline(metrics)}" + ("" if teacher is None else f" (teacher {teacher:.4f})")


def best_line(path: str | Path, metrics: Mapping[str, Any], metric: str) -> str:
    """Return how a sweep names its best run by a metric's value on validation.

    As in "results/x  student test f1_macro=0.7123 (validation average_precision_macro=0.8201)".
    """
    value = validation_score(metrics, metric)
    return f"{path}  {_format_headline(metrics)} (validation {metric}={'undefined' if value is None else f'{value:.4f}'})"


def teacher_headline(metrics: Mapping[str, Any]) -> float | None:
    """Return the teacher's value of the headline's metric; None when the headline is the teacher's own."""
    entry = metrics["headline"]
    return None if entry["model"] == "teacher" else _find_score(metrics, "teacher", entry["part"], HEADLINE_METRIC)


def validation_score(metrics: Mapping[str, Any], metric: str) -> float | None:
    """Return a metric of the headline's model on validation, by which one run is chosen among several."""
    return _find_score(metrics, metrics["headline"]["model"], "validation", METRIC_OF[metric])


def _find_score(metrics: Mapping[str, Any], model: str, part: str, metric: Metric) -> float | None:
    return dig(metrics.get("mean", metrics), model, part, *metric.path)


def _format_headline(metrics: Mapping[str, Any]) -> str:
    entry = metrics["headline"]
    value = "undefined" if entry["value"] is None else f"{entry['value']:.4f}"
    spread = "" if entry.get("std") is None else f" ± {entry['std']:.4f}"
    return f"{entry['model']} {entry['part']} {entry['metric']}={value}{spread}"
