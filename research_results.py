"""The run directory on disk, written and read in one room so that comparing cannot drift from saving.

Every file is whole or absent (written aside, flushed, renamed). `config.json` is the first file of a run
and `metrics.json` the last, so their presence tells an unfinished run from a finished one. Numbers are
rounded and keys sorted: the same run twice differs in no byte outside efficiency.json, environment.json,
report.md, report.html and run.log. torch is never imported, matplotlib only by `write_report`.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
import statistics
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from research_config import ExperimentConfig, InputError
from research_files import remove_litter, write_atomic

if TYPE_CHECKING:
    from filelock import BaseFileLock

FloatArray = npt.NDArray[np.floating[Any]]
Status = Literal["absent", "unfinished", "finished", "foreign"]
FetchTexts = Callable[[Sequence[int]], Mapping[int, str]]

CHUNK_ROWS = 8192
MODELS = ("teacher", "control", "student")  # the control is the student trained without the teacher
PARTS = ("validation", "test")
HEADLINE_THRESHOLDS = "at_0.5"  # macro-F1 at 0.5 needs no tuned number to be repeated
PREDICTION_FILES = {"test": "predictions.csv", "validation": "validation_predictions.csv"}
HISTORY_COLUMNS = (
    "epoch",
    "global_step",
    "learning_rate",
    "total_loss",
    "soft_loss",
    "soft_excess",
    "hard_loss",
    "hidden_loss",
    "attention_loss",
    "grad_norm",
    "skipped_steps",
    "val_f1_macro",
    "val_f1_micro",
    "val_average_precision_macro",
)

# Everything --overwrite may remove. metrics.json goes first, so that an interruption leaves no finished run.
OWNED_FILES = (
    "metrics.json",
    "history.csv",
    "history_control.csv",
    *PREDICTION_FILES.values(),
    "efficiency.json",
    "environment.json",
    "report.md",
    "report.html",
    "run.log",
)
CHECKPOINT_FOLDERS = ("checkpoint", "checkpoint_control")
OWNED_FOLDERS = (*CHECKPOINT_FOLDERS, "student", "teacher", "tensorboard")
PLOTS = {
    "training.png": "Loss components and validation scores per epoch",
    "label_f1.png": "F1 of every label on the test part, at tuned thresholds",
    "precision_recall.png": "Precision and recall of every label on the test part",
    "reliability.png": "Predicted probability against observed share of positives on the test part; hollow: under 10 cells",
}
# The flag that names each table whose hash environment.json holds.
TABLE_FLAGS = {"main": "dataset_path", "validation": "val_path", "test": "test_path", "unlabelled": "unlabelled_path"}
LOCK_FILE = ".lock"
TEMPORARY_FILE = re.compile(r"\..+\.tmp")
FOLD_FOLDER = re.compile(r"fold_[1-9][0-9]*")

# Flags left open on the command line and written into config.json as the data decided.
AUTO_RESOLVED = frozenset({"text_column", "label_columns"})


# Files


def to_plain(value: Any, decimals: int | None = 6) -> Any:
    """Turn numpy scalars and arrays, tuples and paths into what JSON holds.

    Floats are rounded to `decimals` (None keeps them), what is not finite becomes None, and -0.0
    becomes 0.0, which is equal but differs in a diff.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry, decimals) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry, decimals) for entry in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return (value if decimals is None else round(value, decimals)) + 0.0
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no place in a JSON file")


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a UTF-8 text file; a lone surrogate, as in an undecodable argument, becomes its escape."""
    write_atomic(path, text.encode("utf-8", errors="backslashreplace"))


def write_json_atomic(path: Path, value: Any, decimals: int | None = 6) -> None:
    """Replace a JSON file deterministically: sorted keys, rounded floats, null for what is not finite."""
    plain = to_plain(value, decimals)
    write_text_atomic(path, json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv_atomic(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Replace a CSV file; None and nan are empty cells, other floats have eight significant digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_format_cell(cell) for cell in row] for row in rows)
    write_text_atomic(path, buffer.getvalue())


def _format_cell(cell: Any) -> str:
    if isinstance(cell, np.generic):
        cell = cell.item()
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return format(cell + 0.0, ".8g") if isinstance(cell, float) else str(cell)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, cut short or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _missing(path, error) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not whole JSON ({error}). Repeat the run with --overwrite.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object. Repeat the run with --overwrite.")
    return value


def read_csv(path: Path) -> tuple[list[str], FloatArray]:
    """Read a table of numbers as its header and an (N, columns) array, nan for an empty cell.

    Raises:
        InputError: the file is missing, cut short or holds something else; the line is named.
    """
    values = array("d")
    try:
        # Without the last newline the last number may have lost digits and still look like one.
        if not _ends_with_newline(path):
            raise InputError(f"{path} is empty or cut short. Repeat the run with --overwrite.")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader)
            for cells in reader:
                try:
                    if len(cells) != len(header):
                        raise ValueError(f"{len(cells)} cells under {len(header)} columns")
                    values.extend([float(cell) if cell else math.nan for cell in cells])
                except ValueError as error:
                    raise InputError(f"{path}, line {reader.line_num}: {error}. Repeat the run with --overwrite.") from None
    except OSError as error:
        raise _missing(path, error) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}). Repeat the run with --overwrite.") from None
    return header, np.frombuffer(values).reshape(-1, len(header))


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _missing(path: Path, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing. Run the same command again, with --overwrite if the run is finished.")
    return InputError(f"{path} cannot be read: {error.strerror}.")


# Writing a run


class RunDirectory:
    """A folder that one process at a time may fill with one run.

    Claim it before writing; leaving the `with` block, `release` or the end of the process frees it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()

    def status(self) -> Status:
        """Say what is there: nothing, a run's beginning, a whole run, or something that is not ours.

        A config.json alone proves nothing, since every pretrained model has one: ours names a pipeline.
        """
        if not self.path.is_dir():
            return "foreign" if self.path.exists() or self.path.is_symlink() else "absent"
        if self._stored_config() is not None:
            return "finished" if (self.path / "metrics.json").is_file() else "unfinished"
        strangers = (path for path in self.path.iterdir() if not _is_litter(path))
        return "absent" if next(strangers, None) is None else "foreign"

    def claim(
        self,
        config: Mapping[str, Any],
        overwrite: bool = False,
        auto_resolved: Collection[str] = AUTO_RESOLVED,
    ) -> Status:
        """Take the folder for a run of `config` and say what it held: "absent", "unfinished" or "finished".

        "absent" means that config.json has just been written, "unfinished" that the stored run can go on,
        "finished" that there is nothing to do; then nothing is locked and nothing was written. With
        `overwrite` the suite's own files are removed, and nothing else, and the answer is "absent". A flag
        of `auto_resolved` that is None in `config` agrees with any stored value.

        Raises:
            InputError: the folder is not ours, not writable, in use, or holds a run of another config.
        """
        asked = to_plain(config, decimals=None)
        if self._check_claim(asked, overwrite, auto_resolved) == "finished" and not overwrite:
            return "finished"
        self._acquire()
        try:
            # Looked at again, since another process may have begun or finished it in the meantime.
            status = self._check_claim(asked, overwrite, auto_resolved)
            if overwrite and status != "absent":
                self._remove_run()
                status = "absent"
            if status == "absent":
                self.write_config(config)
            remove_litter(self.path)
        except BaseException:
            self.release()
            raise
        if status == "finished":
            self.release()
        return status

    def release(self) -> None:
        """Let others claim the folder; harmless when it is not held."""
        if self._lock is None:
            return
        atexit.unregister(self.release)
        # Removed while still held: whoever opened it meanwhile finds it without a name and tries again.
        with contextlib.suppress(OSError):
            (self.path / LOCK_FILE).unlink()
        self._lock.release()
        self._lock = None

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json with every digit: a run is repeated from it, and 1.5e-6 must not become 2e-6."""
        write_json_atomic(self.path / "config.json", config, decimals=None)

    def write_history(self, rows: Sequence[Mapping[str, Any]], name: str = "history.csv") -> None:
        """Write history.csv, or the control's, a row per epoch; further columns follow the usual ones."""
        extra = dict.fromkeys(name for row in rows for name in row if name not in HISTORY_COLUMNS)
        header = [*HISTORY_COLUMNS, *extra]
        write_csv_atomic(self.path / name, header, ([row.get(name) for name in header] for row in rows))

    def write_predictions(
        self,
        part: str,
        index: Sequence[int] | npt.NDArray[np.integer[Any]],
        label_names: Sequence[str],
        labels: FloatArray,
        probs: Mapping[str, FloatArray],
    ) -> None:
        """Write the predictions of "test" or "validation".

        `index` (N,) holds data rows of the table, `labels` is (N, C) with nan where unknown, `probs` is
        {model: (N, C)} for the models present.
        """
        shape = (len(index), len(label_names))
        assert labels.shape == shape and all(values.shape == shape for values in probs.values())
        models = [model for model in MODELS if model in probs]
        header = ["index", *(f"{prefix}_{label}" for prefix in ("true", *models) for label in label_names)]
        cells = np.concatenate([probs[model] for model in models], axis=1)
        rows = (
            [
                int(row),
                *("" if math.isnan(value) else int(value) for value in truth),
                *("" if math.isnan(value) else f"{value:.6f}" for value in predicted),
            ]
            for row, truth, predicted in zip(index, iter_rows(labels), iter_rows(cells), strict=True)
        )
        write_csv_atomic(self.path / PREDICTION_FILES[part], header, rows)

    def write_efficiency(self, efficiency: Mapping[str, Any]) -> None:
        """Write efficiency.json: parameters, sizes and timings of each model, their ratios, a remark."""
        write_json_atomic(self.path / "efficiency.json", efficiency)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write environment.json: versions, device, command line, data hashes, timings."""
        write_json_atomic(self.path / "environment.json", environment)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json, which makes the run a finished one; call it after the other writers."""
        write_json_atomic(self.path / "metrics.json", metrics)

    def drop_checkpoints(self) -> None:
        """Remove what a finished run has no use for; a process may have been killed before it did."""
        for name in CHECKPOINT_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def check_tables(self, file_sha256: Mapping[str, str], config: ExperimentConfig) -> None:
        """Refuse to take the finished run for one of the tables as they are now.

        Args:
            file_sha256: Hashes of the tables by the names of TABLE_FLAGS.

        Raises:
            InputError: a table of the run had another content, by the hashes in its environment.json.
        """
        stored = dig(read_json(self.path / "environment.json"), "data", "file_sha256") or {}
        changed = [name for name, digest in file_sha256.items() if stored.get(name, digest) != digest]
        if changed:
            raise InputError(
                f"{self.path} was made from another content of {getattr(config, TABLE_FLAGS[changed[0]])}. "
                "Use another --output_dir, or --overwrite to run on the table as it is now."
            )

    def _stored_config(self) -> dict[str, Any] | None:
        try:
            config = read_json(self.path / "config.json")
        except InputError:
            return None
        return config if "pipeline" in config else None

    def _check_claim(self, asked: Mapping[str, Any], overwrite: bool, auto_resolved: Collection[str]) -> Status:
        status = self.status()
        if status == "foreign":
            what = "is not empty and holds no run of this suite" if self.path.is_dir() else "is not a folder"
            raise InputError(f"{self.path} {what}. Use another --output_dir.")
        stored = self._stored_config()
        if stored is not None and not overwrite:
            differences = describe_config_differences(stored, asked, auto_resolved)
            if differences:
                raise InputError(
                    f"{self.path} holds a run with another config: {'; '.join(differences)}. "
                    "Use another --output_dir or --overwrite."
                )
        return status

    def _acquire(self) -> None:
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK_FILE, timeout=0, thread_local=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise InputError(
                f"{self.path} is being written by another process. Wait for it or use another --output_dir."
            ) from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Use another --output_dir.") from error
        self._lock = lock
        atexit.register(self.release)

    def _remove_run(self) -> None:
        """Remove what the suite wrote except config.json, which marks the folder as ours until replaced."""
        for name in OWNED_FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in OWNED_FOLDERS:
            folder = self.path / name
            if folder.is_symlink():
                folder.unlink()
            elif folder.is_dir():
                shutil.rmtree(folder)
        for name in PLOTS:
            (self.path / "plots" / name).unlink(missing_ok=True)
        _remove_if_empty(self.path / "plots")
        for folder in sorted(self.path.iterdir()):
            fold = RunDirectory(folder)
            if is_fold(folder) and not folder.is_symlink() and fold.status() in ("unfinished", "finished"):
                fold._remove_run()
                (folder / "config.json").unlink(missing_ok=True)
                (folder / LOCK_FILE).unlink(missing_ok=True)
                _remove_if_empty(folder)


def is_fold(path: Path) -> bool:
    """Say whether a path is a fold's folder by its name."""
    return FOLD_FOLDER.fullmatch(path.name) is not None


def _is_litter(path: Path) -> bool:
    """Say whether a file may be left by a run that was killed before it wrote its config."""
    return path.name == LOCK_FILE or TEMPORARY_FILE.fullmatch(path.name) is not None


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def describe_config_differences(
    stored: Mapping[str, Any], asked: Mapping[str, Any], auto_resolved: Collection[str] = AUTO_RESOLVED
) -> list[str]:
    """Return a text such as "--kd_alpha 0.7 there, 0.5 asked" for each flag that differs, by name."""
    differences = []
    for name in sorted(stored.keys() | asked.keys()):
        there, wanted = stored.get(name), asked.get(name)
        if there != wanted and not (wanted is None and name in auto_resolved):
            differences.append(f"--{name} {format_flag(there) or 'unset'} there, {format_flag(wanted) or 'unset'} asked")
    return differences


def format_flag(value: Any) -> str:
    """Return a flag's value as it is typed: on or off, lists by spaces, nothing for an unset one."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return "" if value is None else str(value)


# Cross-validation


def aggregate_folds(fold_metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics.json of a cross-validation: mean and sample standard deviation of every number.

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


# Reading a run


@dataclass(frozen=True)
class Predictions:
    """One part's `index` (N,), `labels` (N, C) with nan where unknown, and `probs` {model: (N, C)}."""

    index: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    labels: FloatArray
    probs: dict[str, FloatArray]


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
    def models(self) -> tuple[str, ...]:
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
        return read_predictions(self.path / PREDICTION_FILES["test"])

    @cached_property
    def validation_predictions(self) -> Predictions:
        return read_predictions(self.path / PREDICTION_FILES["validation"])

    @cached_property
    def efficiency(self) -> dict[str, Any]:
        return read_json(self.path / "efficiency.json")

    @cached_property
    def environment(self) -> dict[str, Any]:
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
    if "labels" not in run.metrics or "value" not in run.metrics.get("headline", {}):
        raise InputError(f"{path / 'metrics.json'} holds no labels or no headline. Repeat the run with --overwrite.")
    return run


def read_history(path: Path) -> list[dict[str, float | None]]:
    header, values = read_csv(path)
    return [
        {name: None if math.isnan(value) else value for name, value in zip(header, row, strict=True)} for row in values.tolist()
    ]


def iter_rows(values: FloatArray) -> Iterator[list[float]]:
    """Yield the rows as lists, made a chunk at a time: all at once they take five times the array's memory."""
    for start in range(0, len(values), CHUNK_ROWS):
        yield from values[start : start + CHUNK_ROWS].tolist()


def read_predictions(path: Path) -> Predictions:
    """Read a predictions file.

    Raises:
        InputError: it is missing, cut short, or lacks columns.
    """
    header, values = read_csv(path)
    column_of = {name: number for number, name in enumerate(header)}
    label_names = tuple(name.removeprefix("true_") for name in header if name.startswith("true_"))
    models = [model for model in MODELS if any(f"{model}_{label}" in column_of for label in label_names)]
    wanted = ["index", *(f"{model}_{label}" for model in models for label in label_names)]
    lacking = [name for name in wanted if name not in column_of]
    if lacking or not label_names:
        raise InputError(f"{path} lacks {lacking[0] if lacking else 'true_<label>'}. Repeat the run with --overwrite.")

    def block(prefix: str) -> FloatArray:
        return values[:, [column_of[f"{prefix}_{label}"] for label in label_names]]

    return Predictions(
        values[:, column_of["index"]].astype(np.int64),
        label_names,
        block("true"),
        {model: block(model) for model in models},
    )


# One line


def headline(metrics: Mapping[str, Any]) -> str:
    """Return the run's one number in words, as in "student test f1_macro 0.7123"."""
    entry = metrics["headline"]
    return f"{entry['model']} {entry['part']} {entry['metric']} {_format_headline(metrics)}"


def result_line(path: str | Path, metrics: Mapping[str, Any]) -> str:
    """Return the last line of a run, as in "results/x  student test f1_macro=0.7123 (teacher 0.7345)"."""
    entry = metrics["headline"]
    line = f"{path}  {entry['model']} {entry['part']} {entry['metric']}={_format_headline(metrics)}"
    teacher = teacher_headline(metrics)
    return line if teacher is None else f"{line} (teacher {teacher:.4f})"


def teacher_headline(metrics: Mapping[str, Any]) -> float | None:
    """Return the teacher's value of the headline's metric; None when the headline is the teacher's own."""
    entry = metrics["headline"]
    if entry["model"] == "teacher":
        return None
    return dig(metrics.get("mean", metrics), "teacher", entry["part"], HEADLINE_THRESHOLDS, entry["metric"])


def dig(tree: Any, *keys: str) -> Any:
    """Return the entry below `keys`, None where a key is missing."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def _format_headline(metrics: Mapping[str, Any]) -> str:
    entry = metrics["headline"]
    value = "undefined" if entry["value"] is None else f"{entry['value']:.4f}"
    return value if entry.get("std") is None else f"{value} ± {entry['std']:.4f}"


def write_report(run_dir: str | Path, metrics: Mapping[str, Any] | None = None, fetch_texts: FetchTexts | None = None) -> None:
    """Write report.md, report.html and plots/*.png from the files of a run's directory.

    With `metrics` the report can be written before metrics.json, which marks the run as finished. The texts
    are in none of the files: `fetch_texts` returns those of some values of `index` for report.html.
    """
    from research_report import write_report as write  # a reader of this room, so not imported above

    path = Path(run_dir)
    run = load_run(path) if metrics is None else Run(path, read_json(path / "config.json"), to_plain(metrics))
    write(run, fetch_texts)
