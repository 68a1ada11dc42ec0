"""Labels of a table: a column of 0 and 1 for each, or one column that lists the labels of a row.

Of 0 and 1 there are several spellings, as yes and no; a column has to keep to one of them.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from research.errors import InputError, quote_value
from research.flags import is_plain_text
from research.text.tables import (
    LONGEST_CELL,
    Row,
    clean_text,
    cleaned_rows,
    find_text_column,
    list_names,
    place_of,
    read_columns,
    read_rows,
)

DEFAULT_LABELS = ("bully", "sexual", "religious", "threat", "spam")
# Every label costs about ten milliseconds an evaluation; so many columns of 0 and 1 are more likely features.
MOST_LABELS_FOUND = 5000
UNKNOWN = -1
LABEL_CODES: dict[Any, int] = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": UNKNOWN, 0: 0, 1: 1, None: UNKNOWN}
PLAIN = "0/1"
WORDS = {"no": ("yes/no", 0), "yes": ("yes/no", 1), "false": ("true/false", 0), "true": ("true/false", 1)}
LONGEST_WORD = max(map(len, WORDS))
# Marks that lists are parted by; a label that holds one has probably not been parted.
USUAL_SEPARATORS = "|;,\t"
MOST_UNSEEN_NAMED = 5
# What str() makes of a list of texts in Python, as pandas writes it; without backslashes, whose meaning would be a guess.
_PYTHON_TEXT = r"""(?:'[^'\\]*'|"[^"\\]*")"""
PYTHON_LIST = re.compile(rf"\[\s*{_PYTHON_TEXT}(?:\s*,\s*{_PYTHON_TEXT})*\s*\]")


@dataclass(frozen=True)
class NoLabel:
    """Why a column is not taken for a label unasked: its first cell that is not 0, 1 or empty, or that it has no value.

    Attributes:
        line, cell: Of that cell; no line where every cell is empty.
        spellings: How its cells write labels, where all of them do.
    """

    line: int | None = None
    cell: Any = None
    spellings: tuple[str, ...] = ()

    def __str__(self) -> str:
        if len(self.spellings) == 1:
            return f"holds only {self.spellings[0]}"
        return "is empty" if self.line is None else f"is {quote_value(self.cell, LONGEST_CELL)} on line {self.line}"


@dataclass(frozen=True)
class LabelList:
    """A column that lists the labels of each row, and what parts them in a cell that is no list of JSON."""

    column: str
    separator: str


@dataclass(frozen=True)
class Columns:
    """The text column of a table and its labels: columns of their own, or what a column lists.

    Where the labels were not named, `others` holds every column that was left: what keeps it from being a
    label, or None for one that could be a label too.
    """

    text: str
    labels: tuple[str, ...]
    others: Mapping[str, NoLabel | None] = field(default_factory=dict)
    label_list: LabelList | None = None


def find_columns(
    path: str | Path,
    text_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    label_list: LabelList | None = None,
) -> Columns:
    """Return the columns to use: those named, else those found by name and content.

    Without `text_column`, the first of TEXT_COLUMNS present in any case. Without `label_columns`,
    DEFAULT_LABELS when all are present, else every other column that holds only 0, 1 and empty
    cells and at least one value, else every one that does so in another spelling; the table is read
    until every column is known to be no label. With `label_list` the labels are those that its column
    lists, sorted, or those of `label_columns`, which are no columns then.

    Raises:
        InputError: a column is missing, named twice or used for both, or no label column is found.
    """
    path = Path(path)
    names = read_columns(path)
    text = find_text_column(path, names, text_column)
    if label_list is not None:
        _check_list_column(path, label_list.column, text, names)
        labels = find_listed_labels(path, text, label_list) if label_columns is None else _clean_labels(label_columns)
        return Columns(text, labels, label_list=label_list)
    if label_columns is not None:
        check_label_names(path, label_columns, text, names)
        return Columns(text, tuple(label_columns))
    known = DEFAULT_LABELS if set(DEFAULT_LABELS) <= set(names) else ()
    if text in known:
        raise _used_twice(path, text)
    cells = judge_columns(path, [name for name in names if name and name not in (text, *known)])
    labels = known or _choose_labels(path, cells)
    return Columns(text, labels, {name: reason for name, reason in cells.items() if name not in labels})


def _choose_labels(path: Path, cells: Mapping[str, NoLabel | None]) -> tuple[str, ...]:
    labels = [name for name, reason in cells.items() if reason is None]
    labels = labels or [name for name, reason in cells.items() if reason is not None and len(reason.spellings) == 1]
    if not labels:
        raise _no_label_column(path, cells)
    if len(labels) > MOST_LABELS_FOUND:
        raise InputError(
            f"{path}: {len(labels)} columns hold only 0 and 1, more than {MOST_LABELS_FOUND} that would be taken unasked. "
            "Name the labels in --label_columns."
        )
    return tuple(labels)


def check_label_names(path: Path, labels: Sequence[str], text: str, names: Sequence[str]) -> None:
    """Check that the table has each label column, once, and that none is the text."""
    if not labels:
        raise InputError(f"{path}: no label column is named. Set --label_columns.")
    present, counts = set(names), Counter(labels)
    for label in labels:
        if label not in present:
            raise InputError(f"{path}: no column {label!r}; found {list_names(names)}. Set --label_columns.")
        if counts[label] > 1:
            raise InputError(f"{path}: label {label!r} is named twice. Name it once in --label_columns.")
    if text in present.intersection(labels):
        raise _used_twice(path, text)


def _used_twice(path: Path, text: str) -> InputError:
    return InputError(f"{path}: {text!r} is both text and label. Set --text_column or --label_columns.")


def judge_columns(path: Path, names: Sequence[str]) -> dict[str, NoLabel | None]:
    """Say of each column what keeps it from being a label; None when it holds only 0, 1 and empty cells, and a value."""
    # Of each column that may still be a label, its spellings, with the first cell of each.
    open_columns: dict[str, dict[str, NoLabel]] = {name: {} for name in names}
    judged: dict[str, NoLabel | None] = dict.fromkeys(names)
    for line, row in read_rows(path):
        for name in tuple(open_columns):
            cell = row.get(name)
            found = read_label(cell)
            if found is None:
                del open_columns[name]
                judged[name] = NoLabel(line, cell)
            elif found[1] != UNKNOWN and found[0] not in open_columns[name]:
                open_columns[name][found[0]] = NoLabel(line, cell)
        if not open_columns:
            break
    for name, firsts in open_columns.items():
        other = next((first for spelling, first in firsts.items() if spelling != PLAIN), None)
        if not firsts:
            judged[name] = NoLabel()
        elif other is not None:
            judged[name] = NoLabel(other.line, other.cell, tuple(firsts))
    return judged


def _no_label_column(path: Path, cells: Mapping[str, NoLabel | None]) -> InputError:
    reasons = {name: reason for name, reason in cells.items() if reason is not None}
    for name, reason in reasons.items():
        if reason.spellings:
            return _spelled_in_several_ways(path, name, count_spellings(path, [name])[name])
    fractions = [f"{name!r} {reason}" for name, reason in reasons.items() if _is_fraction(reason.cell)]
    if fractions:
        remedy = "Binarise fractions first, say 1 from 0.5 up."
        return InputError(f"{path}: no column holds only 0 and 1; {'; '.join(fractions[:3])}. {remedy}")
    return InputError(
        f"{path}: no label column holding only 0 and 1 among {list_names(list(cells)) or 'no columns'}. "
        "Add one column of 0 and 1 per label, or set --label_columns, or --label_list_column where one column lists the labels."
    )


def label_code(cell: Any) -> int | None:
    """Return 0 or 1, UNKNOWN for an empty cell, or None for anything else."""
    try:
        return LABEL_CODES[cell]
    except (KeyError, TypeError):
        pass
    if isinstance(cell, str):
        return LABEL_CODES.get(cell.strip())
    return UNKNOWN if isinstance(cell, float) and math.isnan(cell) else None


def read_label(cell: Any) -> tuple[str, int] | None:
    """Return how a cell spells a label and its code: 0, 1 or UNKNOWN; None for what is no label.

    Beside 0 and 1 these are yes and no, true and false in any case, and the digits of other scripts.
    """
    code = label_code(cell)
    if code is not None:
        return PLAIN, code
    if not isinstance(cell, str) or len(cell := cell.strip()) > LONGEST_WORD:
        return None
    if (found := WORDS.get(cell.lower())) is not None:
        return found
    digit = unicodedata.digit(cell, None) if len(cell) == 1 else None
    if digit not in (0, 1):
        return None
    script = unicodedata.name(cell).rpartition(" ")[0]  # BENGALI DIGIT ONE
    return f"{script.capitalize()}s", int(digit)


def _is_fraction(cell: Any) -> bool:
    try:
        return 0 < float(cell) < 1
    except (TypeError, ValueError, OverflowError):
        return False


def count_spellings(path: Path, names: Sequence[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Return, of each column, how many cells write a label in each spelling, and the line of the first of them."""
    counts: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in names}
    for line, row in read_rows(path):
        for name in names:
            found = read_label(row.get(name))
            if found is not None and found[1] != UNKNOWN:
                count, first = counts[name].get(found[0], (0, line))
                counts[name][found[0]] = count + 1, first
    return counts


def _spelled_in_several_ways(path: Path, name: str, counts: Mapping[str, tuple[int, int]]) -> InputError:
    ways = [
        f"{spelling} in {count:,} cell{'' if count == 1 else 's'} (first on line {first})"
        for spelling, (count, first) in counts.items()
    ]
    return InputError(
        f"{path}: label {quote_value(name, LONGEST_CELL)} is written in several ways: {', '.join(ways)}. "
        "Write the whole column in one of them."
    )


class ColumnReader:
    """Reads the labels of a table that has a column for each.

    Attributes:
        spelled: The labels that have been found in another spelling than 0 and 1.
    """

    def __init__(self, path: Path, labels: Sequence[str]) -> None:
        self.path = path
        self.labels = tuple(labels)
        self.spelled: set[str] = set()

    def read(self, line: int, row: Row) -> list[int]:
        """Return the row's label codes: 0, 1 or UNKNOWN.

        Raises:
            InputError: a cell is no label.
        """
        codes = []
        for name in self.labels:
            cell = row.get(name)
            code = label_code(cell)
            if code is None:
                code = self._read_spelled(line, name, cell)
            codes.append(code)
        return codes

    def _read_spelled(self, line: int, name: str, cell: Any) -> int:
        found = read_label(cell)
        if found is None:
            remedy = "Binarise fractions first, say 1 from 0.5 up." if _is_fraction(cell) else "Write 0 or 1, or leave it empty."
            place = place_of(self.path, line)
            raise InputError(f"{place}: label {name!r} is {quote_value(cell, LONGEST_CELL)}, not 0 or 1. {remedy}")
        self.spelled.add(name)
        return found[1]

    def finish(self) -> dict[str, str]:
        """Return the spelling of each label that is not written as 0 and 1, once the table is read to its end.

        Raises:
            InputError: a label is spelled in several ways.
        """
        # Counted only now, since most tables need none of it.
        counts = count_spellings(self.path, [name for name in self.labels if name in self.spelled]) if self.spelled else {}
        for name, ways in counts.items():
            if len(ways) > 1:
                raise _spelled_in_several_ways(self.path, name, ways)
        return {name: next(iter(ways)) for name, ways in counts.items()}


class ListReader:
    """Reads the labels of a table of which one column lists those of each row.

    Args:
        origin: What a label that is none of `labels` is missing from, and what to do, in words.
    """

    def __init__(self, path: Path, label_list: LabelList, labels: Sequence[str], origin: str) -> None:
        self.path = path
        self.label_list = label_list
        self.origin = origin
        self.places = {label: place for place, label in enumerate(labels)}
        self.unseen: dict[str, int] = {}

    def read(self, line: int, row: Row) -> list[int]:
        """Return the row's label codes: 1 for those listed, 0 for the others, UNKNOWN for all where the list is missing.

        Raises:
            InputError: the cell is no list of labels.
        """
        listed = read_listed(self.path, line, row, self.label_list)
        if listed is None:
            return [UNKNOWN] * len(self.places)
        codes = [0] * len(self.places)
        for label in listed:
            if (place := self.places.get(label)) is None:
                self.unseen.setdefault(label, line)
            else:
                codes[place] = 1
        return codes

    def finish(self) -> dict[str, str]:
        """Check the table, once it is read to its end; no label has a spelling of its own.

        Raises:
            InputError: it lists other labels.
        """
        if not self.unseen:
            return {}
        named = [
            f"{quote_value(label, LONGEST_CELL)} ({place_of(Path(self.path.name), line).rpartition(', ')[2]})"
            for label, line in list(self.unseen.items())[:MOST_UNSEEN_NAMED]
        ]
        more = f" and {len(self.unseen) - len(named)} more" if len(self.unseen) > len(named) else ""
        which = "label" if len(self.unseen) == 1 else "labels"
        raise InputError(f"{self.path}: {which} {', '.join(named)}{more} in {self.label_list.column!r} {self.origin}")


def open_labels(path: Path, columns: Columns, main: Path, *, named: bool) -> ColumnReader | ListReader:
    """Return what reads the labels of a table.

    Args:
        columns: The labels, and how the main table has them.
        main: The main table.
        named: Whether the labels were named rather than found in it.
    """
    if columns.label_list is None:
        return ColumnReader(path, columns.labels)
    if named:
        origin = "stand not among --label_columns. Mend the cells, or name every label there."
    else:
        origin = f"stand in no row of {main}. Mend the cells, or name every label in --label_columns."
    return ListReader(path, columns.label_list, columns.labels, origin)


def check_label_source(path: Path, columns: Columns, text: str, names: Sequence[str]) -> None:
    """Check that a table beside the main one has its labels in the same columns.

    Raises:
        InputError: it has not.
    """
    if columns.label_list is None:
        check_label_names(path, columns.labels, text, names)
    else:
        _check_list_column(path, columns.label_list.column, text, names)


def _check_list_column(path: Path, column: str, text: str, names: Sequence[str]) -> None:
    if column not in names:
        raise InputError(f"{path}: no column {column!r}; found {list_names(names)}. Set --label_list_column.")
    if column == text:
        raise InputError(f"{path}: {text!r} is both text and list of labels. Set --text_column or --label_list_column.")


def find_listed_labels(path: Path, text_column: str, label_list: LabelList) -> tuple[str, ...]:
    """Return the distinct labels that rows with a text list, sorted by code points.

    Raises:
        InputError: a cell is no list, or what was found are hardly labels.
    """
    found: set[str] = set()
    column = label_list.column
    for line, row, text in cleaned_rows(path, text_column, "none"):
        if text:
            found.update(read_listed(path, line, row, label_list) or ())
        if len(found) > MOST_LABELS_FOUND:
            raise InputError(
                f"{path}: {column!r} lists more than {MOST_LABELS_FOUND} different labels. Set --label_list_column to the column "
                "of labels, or --label_separator to what stands between them."
            )
    if not found:
        raise InputError(f"{path}: no row lists a label in {column!r}. Set --label_list_column.")
    if found <= {"0", "1"}:
        raise InputError(
            f"{path}: {column!r} holds only 0 and 1, so it is a label itself. Name it in --label_columns, without "
            "--label_list_column."
        )
    unparted = sorted(label for label in found if any(mark in label for mark in USUAL_SEPARATORS))
    if unparted:
        raise InputError(
            f"{path}: {column!r} lists {quote_value(unparted[0], LONGEST_CELL)} as one label. Set --label_separator to what "
            "stands between labels, or name every label in --label_columns if it is one."
        )
    return tuple(sorted(found))


def _clean_labels(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(clean_text(label, "nfc") for label in labels))


def read_listed(path: Path, line: int, row: Row, label_list: LabelList) -> list[str] | None:
    """Return the labels that a row lists, composed (NFC) and without outer white space; None where the list is missing.

    An empty cell lists nothing. So does one that is not there in .xlsx, which cannot tell the two apart.

    Raises:
        InputError: the cell is no list of labels.
    """
    cell = row.get(label_list.column)
    if cell is None and path.suffix.lower() == ".xlsx":
        return []
    try:
        return split_labels(cell, label_list.separator)
    except ValueError as error:
        raise InputError(
            f"{place_of(path, line)}: {label_list.column!r} is {quote_value(cell, LONGEST_CELL)}, {error}. Write labels with "
            f'{label_list.separator!r} between, or ["a", "b"].'
        ) from None


def split_labels(cell: Any, separator: str) -> list[str] | None:
    """Return the labels in a cell: texts with a separator between, a list of JSON or of str() in Python, or a list.

    Raises:
        ValueError: why it is none of these.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    items: list[Any] = cell if isinstance(cell, list) else [cell]
    if isinstance(cell, str):
        text = cell.strip()
        items = _parse_list(text) if text.startswith("[") and text.endswith("]") else text.split(separator)
    return [label for label in map(_clean_label, items) if label]


def _parse_list(text: str) -> list[Any]:
    if PYTHON_LIST.fullmatch(text):
        return [item[1:-1] for item in re.findall(_PYTHON_TEXT, text)]
    try:
        found: list[Any] = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("which begins and ends as a list and is none") from None
    return found


def _clean_label(item: Any) -> str:
    if isinstance(item, float) and item.is_integer():  # pandas writes a column of whole numbers with gaps so
        item = int(item)
    if isinstance(item, bool) or not isinstance(item, str | int):
        raise ValueError("which holds something that is no text")
    label = clean_text(str(item), "nfc")
    if label and not is_plain_text(label):
        raise ValueError("which holds a character that no name can have")
    return label
