"""A run's folder: claimed, written and refused (no torch).

`config.json` is the first file of a run and `metrics.json` the last, so their presence tells an unfinished
run from a finished one.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from research.errors import InputError
from research.evaluation.calibration import sigmoid
from research.flags import format_value
from research.names import MODELS, number_name
from research.runs.formats import (
    HISTORY_COLUMNS,
    PLOTS,
    PREDICTION_FILES,
    dig,
    iter_rows,
    read_json,
    to_plain,
    write_csv_atomic,
    write_json_atomic,
)
from research.storage.claims import Claim, remove_dead_claims
from research.storage.files import remove_litter, write_atomic
from research_config import ExperimentConfig, saved_settings

FloatArray = npt.NDArray[np.floating[Any]]
Status = Literal["absent", "unfinished", "finished", "foreign"]
# Says that the unfinished run it stands in was begun by --overwrite, so the same command goes on with it.
OVERWRITING_FILE = ".overwriting"
# On how many processes each teacher of the unfinished run it stands in was fine-tuned, when on more than one.
PROCESSES_FILE = ".teacher_processes"
# Which epochs of the unfinished run it stands in --track has sent, and to which session.
TRACKING_FILE = ".tracking"
# Everything --overwrite may remove. metrics.json goes before the rest, so that an interruption leaves no finished run.
OWNED_FILES = (
    OVERWRITING_FILE,  # before metrics.json, so that an interruption does not make the old run look like a new one
    PROCESSES_FILE,
    TRACKING_FILE,
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
OWNED_FOLDERS = (*CHECKPOINT_FOLDERS, "student", "student_onnx", "teacher_onnx", "tensorboard")  # and every TEACHER_FOLDER
LOCK_FILE = ".lock"
TEACHER_FOLDER = re.compile(r"teacher(?:_([2-9]|[1-9][0-9]+))?")
TEMPORARY_FILE = re.compile(r"\..+\.tmp")
FOLD_FOLDER = re.compile(r"fold_[1-9][0-9]*")


class DirectoryInUse(InputError):
    """Another process is writing the run."""


class RunDirectory:
    """A folder that one process at a time may fill with one run.

    Claim it before writing; leaving the `with` block, `release` or the end of the process frees it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._claim: Claim | None = None
        self._made = False

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

    def claim(self, config: Mapping[str, Any], overwrite: bool = False, unresolved: Collection[str] = ()) -> Status:
        """Take the folder for a run of `config` and say what it held: "absent", "unfinished" or "finished".

        "absent" means that config.json has just been written, "unfinished" that the stored run can go on,
        "finished" that there is nothing to do; then nothing is locked and nothing was written. With
        `overwrite` the suite's own files are removed, and nothing else, and the answer is "absent", unless
        what stands there is the beginning of a run of `config` that `overwrite` was given for already. A flag
        of `unresolved`, which the data will decide, agrees with any stored value while it is None in `config`.

        Raises:
            InputError: the folder is not ours, not writable, in use, or holds a run of another config.
        """
        asked = to_plain(config, decimals=None)
        if self._check_claim(asked, overwrite, unresolved) == "finished" and not overwrite:
            return "finished"
        self._acquire()
        try:
            # Looked at again, since another process may have begun or finished it in the meantime.
            status = self._check_claim(asked, overwrite, unresolved)
            if overwrite and status != "absent" and not self._is_overwriting(asked):
                self._remove_run()
                status = "absent"
            if status == "absent":
                self.write_config(config)
                if overwrite:
                    write_atomic(self.path / OVERWRITING_FILE, b"")
            remove_litter(self.path)
        except BaseException:
            self.release()
            raise
        if status == "finished":
            self.release()
        return status

    def hold(self) -> None:
        """Keep others from a folder that `claim` will be called for; what it would refuse stays as it is.

        So that, of many processes that share runs, one alone reads its inputs.

        Raises:
            InputError: the folder is not writable, or in use (`DirectoryInUse`).
        """
        if self.status() in ("absent", "unfinished"):
            self._acquire()

    def holder(self) -> str | None:
        """Return a name for the process that is writing the run, None when nobody is."""
        try:
            owner = Claim(self.path / LOCK_FILE).holder()
        except OSError:  # what is wrong with the folder is told by whoever claims it
            return None
        return None if owner is None else str(owner)

    def preview(self, config: Mapping[str, Any], overwrite: bool = False, unresolved: Collection[str] = ()) -> Status:
        """Say what `claim` would, and refuse what it would, without writing or locking anything."""
        asked = to_plain(config, decimals=None)
        status = self._check_claim(asked, overwrite, unresolved)
        return "absent" if overwrite and not self._is_overwriting(asked) else status

    def release(self) -> None:
        """Let others claim the folder; harmless when it is not held."""
        if self._claim is None:
            return
        atexit.unregister(self.release)
        self._claim.release()
        self._claim = None
        if self._made:
            _remove_if_empty(self.path)

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
        text_cluster: Sequence[int] | npt.NDArray[np.integer[Any]],
        label_names: Sequence[str],
        labels: FloatArray,
        logits: Mapping[str, FloatArray],
    ) -> None:
        """Write the predictions of "test" or "validation".

        Logits and probabilities stand side by side, both with the nine significant digits that give a float32
        back: a confident model's probabilities differ far behind the sixth decimal. What reads the file computes
        from the logits.

        Args:
            index: (N,) data rows of the table.
            text_cluster: (N,) one number for all rows of one text, which are not independent of each other.
            labels: (N, C) with nan where unknown.
            logits: {model: (N, C)} for the models present.
        """
        shape = (len(index), len(label_names))
        assert labels.shape == shape and all(values.shape == shape for values in logits.values())
        models = [model for model in MODELS if model in logits]
        prefixes = ("true", *(f"logit_{model}" for model in models), *models)
        header = ["index", "text_cluster", *(f"{prefix}_{label}" for prefix in prefixes for label in label_names)]
        given = np.concatenate([np.asarray(logits[model], dtype=np.float32) for model in models], axis=1)
        cells = np.concatenate([given, sigmoid(given)], axis=1)
        rows = (
            [
                int(row),
                int(cluster),
                *("" if math.isnan(value) else int(value) for value in truth),
                *("" if math.isnan(value) else f"{value:.9g}" for value in predicted),
            ]
            for row, cluster, truth, predicted in zip(index, text_cluster, iter_rows(labels), iter_rows(cells), strict=True)
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
        for name in (OVERWRITING_FILE, PROCESSES_FILE):
            (self.path / name).unlink(missing_ok=True)

    def keep_num_processes(self, teacher: str, number: int) -> None:
        """Remember, until the run is finished, on how many processes a teacher of it was fine-tuned."""
        kept = self._num_processes()
        if kept.get(teacher, 1) != number:
            write_json_atomic(self.path / PROCESSES_FILE, kept | {teacher: number})

    def kept_num_processes(self, teacher: str) -> int | None:
        """Return on how many processes a teacher of the run was fine-tuned, None when the run may not have it yet."""
        number = self._num_processes().get(teacher)
        return 1 if number is None and (self.path / CHECKPOINT_FOLDERS[0]).is_dir() else number

    def _num_processes(self) -> dict[str, int]:
        return read_json(self.path / PROCESSES_FILE) if (self.path / PROCESSES_FILE).is_file() else {}

    def drop_leavings(self) -> None:
        """Remove what a finished run has no use for; a process may have been killed before it did."""
        for name in CHECKPOINT_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / TRACKING_FILE).unlink(missing_ok=True)
        remove_dead_claims(self.path)

    def check_tables(self, file_sha256: Mapping[str, str], paths: Mapping[str, Path]) -> None:
        """Refuse to take the finished run for one of the tables as they are now.

        Args:
            file_sha256: Hashes of the tables, by what their rows are called: main, validation, test, unlabelled.
            paths: The tables, by the same names.

        Raises:
            InputError: a table of the run had another content, by the hashes in its environment.json.
        """
        stored = dig(read_json(self.path / "environment.json"), "data", "file_sha256") or {}
        changed = [name for name, digest in file_sha256.items() if stored.get(name, digest) != digest]
        if changed:
            raise InputError(
                f"{self.path} was made from another content of {paths[changed[0]]}. "
                "Use another --output_dir, or --overwrite to run on the table as it is now."
            )

    def _is_overwriting(self, asked: Mapping[str, Any]) -> bool:
        """Whether there is the beginning of this very run, made by an earlier command with --overwrite."""
        if self.status() != "unfinished" or not (self.path / OVERWRITING_FILE).exists():
            return False
        return not list_config_differences(self._stored_config() or {}, asked, ())

    def _stored_config(self) -> dict[str, Any] | None:
        try:
            config = read_json(self.path / "config.json")
        except InputError:
            return None
        return config if "pipeline" in config else None

    def _check_claim(self, asked: Mapping[str, Any], overwrite: bool, unresolved: Collection[str]) -> Status:
        status = self.status()
        if status == "foreign":
            what = "is not empty and holds no run of this suite" if self.path.is_dir() else "is not a folder"
            raise InputError(f"{self.path} {what}. Use another --output_dir.")
        stored = self._stored_config()
        if stored is not None and not overwrite:
            differences = list_config_differences(stored, asked, unresolved)
            if differences:
                raise InputError(
                    f"{self.path} holds a run with another config: {'; '.join(differences)}. "
                    "Use another --output_dir or --overwrite."
                )
        return status

    def _acquire(self) -> None:
        if self._claim is not None:
            return
        claim = Claim(self.path / LOCK_FILE)
        self._made = not self.path.exists()
        try:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held = claim.acquire()
            except FileNotFoundError:  # another process has just left it, and removed it since it was empty
                self.path.mkdir(parents=True, exist_ok=True)
                held = claim.acquire()
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Use another --output_dir.") from error
        if not held:
            raise DirectoryInUse(f"{self.path} is being written by another process. Wait for it or use another --output_dir.")
        self._claim = claim
        atexit.register(self.release)

    def _remove_run(self) -> None:
        """Remove what the suite wrote except config.json, which marks the folder as ours until replaced."""
        for name in OWNED_FILES:
            (self.path / name).unlink(missing_ok=True)
        for folder in (*(self.path / name for name in OWNED_FOLDERS), *find_teachers(self.path)):
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
                remove_dead_claims(folder)
                _remove_if_empty(folder)


def teacher_name(number: int) -> str:
    """Return what a run calls its teacher of that number, counted from 1, and the folder that it is saved in."""
    return number_name("teacher", number)


def find_teachers(path: Path) -> list[Path]:
    """Return the folders of a run's teachers, in their order."""
    found = {int(match[1] or 1): place for place in path.iterdir() if (match := TEACHER_FOLDER.fullmatch(place.name))}
    return [found[number] for number in sorted(found)]


def is_fold(path: Path) -> bool:
    """Say whether a path is a fold's folder by its name."""
    return FOLD_FOLDER.fullmatch(path.name) is not None


def _is_litter(path: Path) -> bool:
    """Say whether a file may be left by a run that was killed before it wrote its config."""
    return path.name == LOCK_FILE or path.name.startswith(f"{LOCK_FILE}.") or TEMPORARY_FILE.fullmatch(path.name) is not None


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def list_config_differences(stored: Mapping[str, Any], asked: Mapping[str, Any], unresolved: Collection[str]) -> list[str]:
    """Return a text such as "--kd_alpha 0.7 there, 0.5 asked" for each flag that differs, by name.

    A flag that the stored run's version did not have is at its default there.
    """
    defaults = to_plain(saved_settings(ExperimentConfig()), decimals=None)
    differences = []
    for name in sorted(stored.keys() | asked.keys()):
        there, wanted = stored.get(name, defaults.get(name) if name in asked else None), asked.get(name)
        if there != wanted and not (wanted is None and name in unresolved):
            differences.append(f"--{name} {format_value(there) or 'unset'} there, {format_value(wanted) or 'unset'} asked")
    return differences
