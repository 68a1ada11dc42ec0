"""The formats of a run's files (no torch).

Every file is whole or absent (written aside, flushed, renamed). Numbers are rounded and keys sorted: the
same run twice differs in no byte outside efficiency.json, environment.json, report.md, report.html and run.log.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research.components import LOSS_COMPONENTS
from research.errors import InputError
from research.names import SCORES_PER_EPOCH
from research.storage.files import write_atomic

FloatArray = npt.NDArray[np.floating[Any]]
# What lies below these keys keeps every digit: a threshold rounded to 0.0 says yes to everything.
EXACT_KEYS = frozenset({"threshold", "thresholds"})
CHUNK_ROWS = 8192
PREDICTION_FILES = {"test": "predictions.csv", "validation": "validation_predictions.csv"}
HISTORY_COLUMNS = (
    "epoch",
    "global_step",
    "learning_rate",
    *(component.name for component in LOSS_COMPONENTS if not component.optional),
    "grad_norm",
    "skipped_steps",
    *(f"val_{name}" for name in SCORES_PER_EPOCH),
)
PLOTS = {
    "training.png": "Loss components and validation scores per epoch",
    "label_f1.png": "F1 of every label on the test part, at tuned thresholds",
    "precision_recall.png": "Precision and recall of every label on the test part",
    "reliability.png": "Predicted probability against observed share of positives on the test part; hollow: under 10 cells",
}


def to_plain(value: Any, decimals: int | None = 6) -> Any:
    """Turn numpy scalars and arrays, tuples and paths into what JSON holds.

    Floats are rounded to `decimals` (None keeps them, as do EXACT_KEYS), what is not finite becomes None, and
    -0.0 becomes 0.0, which is equal but differs in a diff.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry, None if key in EXACT_KEYS else decimals) for key, entry in value.items()}
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


def iter_rows(values: FloatArray) -> Iterator[list[float]]:
    """Yield the rows as lists, made a chunk at a time: all at once they take five times the array's memory."""
    for start in range(0, len(values), CHUNK_ROWS):
        yield from values[start : start + CHUNK_ROWS].tolist()


def dig(tree: Any, *keys: str) -> Any:
    """Return the entry below `keys`, None where a key is missing."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree
