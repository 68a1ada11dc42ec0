"""The table of --teacher_probs_path: another teacher's probabilities, found again by text.

It is read before torch is imported, which takes longer than all of that.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError, escape_controls, quote_value
from research.experiment.announce import count, join_names
from research.storage.files import hash_file
from research.text.tables import LONGEST_CELL, Row, cleaned_rows, describe_delimiter, find_text_column, read_columns
from research_data import PARTS, Comments, Split, hash_text

# Cells of one text that differ by less are one probability, written twice.
SAME_PROBABILITY = 1e-9


@dataclass(frozen=True, eq=False)
class TeacherTable:
    """What the table says of the rows of a run.

    Attributes:
        probs: (N, C) float32 of every row in the order of the comments, nan where the table says nothing.
        texts: Distinct texts that it says something of.
        unknown_texts: Of these, those that are in no table of the run.
        differing_texts: Those that stand there several times with different probabilities; their mean counts.
        delimiter: What separates its cells, in words, where that is unusual.
    """

    path: Path
    sha256: str
    probs: NDArray[np.float32]
    texts: int
    unknown_texts: int
    differing_texts: int
    delimiter: str | None = None

    def count_covered(self, rows: NDArray[np.int64]) -> int:
        """Return how many of some rows the table says anything of."""
        return int((~np.isnan(self.probs[rows])).any(axis=1).sum())

    def is_complete(self, rows: NDArray[np.int64]) -> bool:
        """Whether the table says something of every cell of some rows."""
        return not np.isnan(self.probs[rows]).any()

    def describe(self, split: Split) -> list[str]:
        """Return a line that says of how many rows of each part it speaks, after one of its delimiter where that is unusual."""
        parts = {part: getattr(split, part) for part in PARTS}
        shares = [
            f"{part} {self.count_covered(rows):,} of {len(rows):,} ({100 * self.count_covered(rows) / len(rows):.1f} %)"
            for part, rows in parts.items()
            if len(rows)
        ]
        unknown = f" ({count(self.unknown_texts, 'text')} of it in no table)" if self.unknown_texts else ""
        texts = f"{count(self.texts, 'distinct text')}{unknown}"
        line = f"{self.path}: probabilities of {texts}; rows it speaks of: {', '.join(shares)}"
        delimiter = [] if self.delimiter is None else [f"{self.path}: {self.delimiter}"]
        return [escape_controls(text) for text in (*delimiter, line)]

    def warn(self) -> str | None:
        """Return what a reader should know of texts that stand there with different probabilities."""
        if not self.differing_texts:
            return None
        texts = count(self.differing_texts, "text")
        return escape_controls(f"{self.path}: different probabilities of {texts} in several rows; their mean is taken")


def read_teacher_table(path: str | Path, comments: Comments) -> TeacherTable:
    """Read a table of probabilities and match its rows with those of a run by their cleaned texts.

    Its text column has the main table's name or is found by name; it has a column for each label. An empty
    cell says nothing of that label.

    Raises:
        InputError: a column is missing, a cell is no probability, or no text of the run stands there.
    """
    path = Path(path)
    names = read_columns(path)
    text_column = find_text_column(path, names, comments.text_column if comments.text_column in names else None)
    if missing := [label for label in comments.label_names if label not in names]:
        raise InputError(
            f"--teacher_probs_path: {path}: no column '{missing[0]}'; found {join_names(names)}. It needs one column of "
            f"probabilities for each label of the run: {join_names(comments.label_names)}."
        )
    hashes, cells = array("Q"), array("d")
    for line, row, text in cleaned_rows(path, text_column, comments.text_normalization):
        if text:
            hashes.append(hash_text(text.encode()))
            cells.extend(read_probabilities(path, line, row, comments.label_names))
    probs = np.frombuffer(cells).reshape(-1, len(comments.label_names))
    spoken = ~np.isnan(probs).all(axis=1)
    texts, averaged, differing = average_by_text(np.frombuffer(hashes, np.uint64)[spoken], probs[spoken])
    found = np.isin(comments.text_hash, texts)
    if not found.any():
        raise InputError(
            f"--teacher_probs_path: {path}: none of its {count(len(texts), 'text')} with probabilities is a text of "
            f"{comments.tables[0].path}. Its column '{text_column}' must hold the same texts."
        )
    aligned = np.full((len(comments), probs.shape[1]), np.nan, dtype=np.float32)
    aligned[found] = averaged[np.searchsorted(texts, comments.text_hash[found])]
    unknown = int((~np.isin(texts, comments.text_hash)).sum())
    return TeacherTable(path, hash_file(path), aligned, len(texts), unknown, differing, describe_delimiter(path))


def read_probabilities(path: Path, line: int, row: Row, labels: Sequence[str]) -> list[float]:
    """Return the row's probability of each label, nan for an empty cell.

    Raises:
        InputError: a cell holds anything but a number from 0 to 1 or nothing.
    """
    found = []
    for label in labels:
        value = to_number(row.get(label))
        if value is None or not (math.isnan(value) or 0 <= value <= 1):
            raise InputError(
                f"--teacher_probs_path: {path}, line {line}: the probability of '{label}' is "
                f"{quote_value(row.get(label), LONGEST_CELL)}, not a number from 0 to 1. Logits need a sigmoid first, "
                "percentages a division by 100."
            )
        found.append(value)
    return found


def to_number(cell: Any) -> float | None:
    """Return a cell's number, nan for an empty cell, None for anything else."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return math.nan
    try:
        return None if isinstance(cell, bool) or (isinstance(cell, str) and math.isnan(float(cell))) else float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def average_by_text(
    hashes: NDArray[np.uint64], probs: NDArray[np.float64]
) -> tuple[NDArray[np.uint64], NDArray[np.float64], int]:
    """Return the distinct texts, sorted, their mean probabilities (T, C), and how many of them had different ones.

    Each label's mean runs over the rows that say something of it.
    """
    texts, text_of_row = np.unique(hashes, return_inverse=True)
    shape = (len(texts), probs.shape[1])
    sums, counts = np.zeros(shape), np.zeros(shape)
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    known = ~np.isnan(probs)
    np.add.at(sums, text_of_row, np.where(known, probs, 0.0))
    np.add.at(counts, text_of_row, known)
    np.minimum.at(low, text_of_row, np.where(known, probs, np.inf))
    np.maximum.at(high, text_of_row, np.where(known, probs, -np.inf))
    differing = int((high - low > SAME_PROBABILITY).any(axis=1).sum())
    with np.errstate(invalid="ignore"):  # a label that no row of a text says anything of
        return texts, sums / counts, differing
