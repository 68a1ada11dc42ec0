"""Tables of comments on disk: rows as they are streamed, columns as they are found, cells as they are read."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import math
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from xml.etree.ElementTree import ParseError

from research.errors import InputError, first_line, quote_value
from research.storage.files import hash_file

TEXT_COLUMNS = (
    "text",
    "comment",
    "comment_text",
    "sentence",
    "content",
    "tweet",
    "post",
    "message",
    "body",
    "review",
)
DEFAULT_LABELS = ("bully", "sexual", "religious", "threat", "spam")
# Every label costs about ten milliseconds an evaluation; so many columns of 0 and 1 are more likely features.
MOST_LABELS_FOUND = 5000
UNKNOWN = -1
LONGEST_CELL = 40
PARQUET_ROWS, PARQUET_BUFFER = 4096, 1 << 20
LABEL_CODES: dict[Any, int] = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": UNKNOWN, 0: 0, 1: 1, None: UNKNOWN}
Row = dict[str, Any]
Rows = Iterator[tuple[int, Row]]


def read_rows(path: str | Path, columns: Collection[str] | None = None) -> Rows:
    """Stream a table's data rows as (line, {column: cell}).

    A folder is the table of the .parquet files in it, one after the other by name. `line` is the physical
    line a row starts on, counted from 1 (the sheet's row in .xlsx; the data row in .parquet, counted through all
    files of a folder), for messages. Cells of .csv and .tsv are text as written; other formats keep
    their types, and a cell that is not there is None. Blank lines are passed over.

    Args:
        columns: Those that are needed; a format that keeps its columns apart leaves the others unread.

    Raises:
        InputError: the file is missing, empty or malformed; one line says where and what to do.
    """
    path = Path(path)
    found_rows = False
    try:
        _check_file(path)
        rows = _read_parquet(path, columns) if _is_parquet(path) else READERS[path.suffix.lower()](path)
        for item in rows:
            found_rows = True
            yield item
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"{path}: cannot be read: {reason}. Check the path and its rights.") from None
    if not found_rows:
        raise InputError(f"{path}: holds no data rows. Give a table with a header and at least one row.")


def read_columns(path: str | Path) -> tuple[str, ...]:
    """Return a table's column names in order; for JSON Lines, every key of any line.

    Raises:
        InputError: as read_rows.
    """
    path = Path(path)
    if _is_parquet(path):
        next(read_rows(path, ()))  # which says what is wrong with the files
        return _parquet_columns(path)
    rows = read_rows(path)
    names = dict.fromkeys(next(rows)[1])
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for _, row in rows:
            names.update(dict.fromkeys(row))
        try:
            "".join(names).encode()
        except UnicodeEncodeError:
            raise InputError(f"{path}: a key holds half a surrogate pair. Rename the key.") from None
    return tuple(names)


def _check_file(path: Path) -> None:
    if path.is_dir():
        if not list_files(path):
            raise InputError(f"{path}: is a folder without .parquet files. Give one table: {_listed(READERS)}.")
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path.")
    if path.suffix.lower() not in READERS:
        kind = f"unknown extension {path.suffix!r}" if path.suffix else "no file extension"
        raise InputError(f"{path}: {kind}. Give one of {_listed(READERS)}.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty. Give a table with a header and at least one row.")


def list_files(path: Path) -> list[Path]:
    """Return the files of a table: itself, or the .parquet files of a folder by name, but for hidden ones and `_metadata`."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.glob("*.parquet") if not file.name.startswith((".", "_")))


def hash_table(path: Path) -> str:
    """Return the SHA-256 of a table's bytes in hexadecimal; of a folder, that of its files' names and hashes."""
    if not path.is_dir():
        return hash_file(path)
    files = [(file.name, hash_file(file)) for file in list_files(path)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _is_parquet(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".parquet"


def _decoded_lines(path: Path) -> Iterator[str]:
    """Yield the physical lines of a UTF-8 file, so that a broken byte is found on its own line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                utf16 = number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
                what = "the file is UTF-16" if utf16 else f"byte 0x{raw[error.start]:02x} is not UTF-8"
                raise InputError(f"{path}, line {number}: {what}. Save the table as UTF-8.") from None


def _read_delimited(path: Path, delimiter: str) -> Rows:
    records = _delimited_records(path, delimiter)
    _, header = next(records, (1, None))
    if header is None:
        raise InputError(f"{path}: no header row. Give a table with a header and at least one row.")
    names = [name.strip() for name in header]
    _check_names(path, names)
    for line, cells in records:
        if len(cells) != len(names):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells where the header has {len(names)}. "
                "Put a cell with a delimiter, quote or line break in double quotes."
            )
        yield line, dict(zip(names, cells, strict=True))


def _delimited_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of every record that is not blank."""
    reader = csv.reader(_decoded_lines(path), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: {_explain_csv_error(error)}") from None
        if cells:
            yield line, cells


def _explain_csv_error(error: csv.Error) -> str:
    reason = str(error)
    if "field limit" in reason:
        limit = csv.field_size_limit()
        return f"a cell is longer than {limit:,} characters. Shorten it, or close its opening double quote."
    if "new-line" in reason:
        return "a carriage return stands outside quotes. Quote the cell, or save with \\n line ends."
    if "end of data" in reason:
        return "a double quote is opened and never closed. Close it, or double it inside a quoted cell."
    return f"unreadable quoting ({reason}). Double every quote inside a quoted cell."


def _read_json_lines(path: Path) -> Rows:
    for line, text in enumerate(_decoded_lines(path), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object_without_duplicates)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            message = f"{path}, line {line}: not readable JSON ({reason}). Put one object a line."
            raise InputError(message) from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise InputError(f"{path}, line {line}: a JSON {kind}, not an object. Put one object a line.")
        yield line, row


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} stands twice in an object")
    return row


def _read_parquet(path: Path, columns: Collection[str] | None) -> Rows:
    """Read the files of a table page by page, so that memory grows neither with the rows nor with those of a row group."""
    names = _parquet_columns(path)
    wanted = [name for name in names if columns is None or name in columns]
    number = 0
    for one in list_files(path):
        with _opening_parquet(one) as file:
            if set(file.schema_arrow.names) != set(names):
                raise InputError(
                    f"{one}: has the columns {_listed(file.schema_arrow.names)}, and {list_files(path)[0].name} has "
                    f"{_listed(names)}. Give all files of a folder the same columns."
                )
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row


def _parquet_columns(path: Path) -> tuple[str, ...]:
    first = list_files(path)[0]
    with _opening_parquet(first) as file:
        _check_names(first, file.schema_arrow.names)
        return tuple(file.schema_arrow.names)


@contextmanager
def _opening_parquet(path: Path) -> Iterator[Any]:
    parquet = _import_optional("pyarrow.parquet", "pyarrow", path)
    try:
        # Without a buffer it reads all pages of a column in a row group at once: 170 MB for a million short texts, not 100.
        with parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            yield file
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not a Parquet file ({first_line(error)}). Write it again.") from None


def _read_excel(path: Path) -> Rows:
    """Read the first sheet. Trailing cells without a header must be empty; empty rows are passed over."""
    openpyxl = _import_optional("openpyxl", "openpyxl", path)
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        records = book.worksheets[0].iter_rows(values_only=True)
        names = ["" if cell is None else str(cell).strip() for cell in next(records, ())]
        while names and not names[-1]:
            names.pop()
        _check_names(path, names)
        for number, cells in enumerate(records, start=2):
            if any(cell is not None for cell in cells[len(names) :]):
                message = f"{path}, row {number}: a cell beyond the {len(names)} named columns."
                raise InputError(f"{message} Name the column or empty the cell.")
            if any(cell is not None for cell in cells):
                padded = list(cells[: len(names)]) + [None] * (len(names) - len(cells))
                yield number, dict(zip(names, padded, strict=True))
    except InputError:
        raise
    except (zipfile.BadZipFile, ParseError, KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path}: not an .xlsx workbook ({first_line(error)}). Save it again.") from None


def _import_optional(module: str, package: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{path}: reading {path.suffix} needs {package}. Run pip install {package}, or save as .csv.") from None


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            what = f"column {name!r} stands twice" if name else "several columns have no name"
            raise InputError(f"{path}: {what} in the header. Give every column a name of its own.")


READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": lambda path: _read_delimited(path, ","),
    ".tsv": lambda path: _read_delimited(path, "\t"),
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": lambda path: _read_parquet(path, None),
    ".xlsx": _read_excel,
}


def _place(path: Path, line: int) -> str:
    unit = "row" if _is_parquet(path) or path.suffix.lower() == ".xlsx" else "line"
    return f"{path}, {unit} {line}"


def _listed(names: Iterable[str], limit: int = 20) -> str:
    shown = [quote_value(name, LONGEST_CELL) if not name.isprintable() or not name else name for name in names]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


@dataclass(frozen=True)
class NoLabel:
    """The first cell of a column that no label column has; of a column without any value, no cell of no line."""

    line: int | None = None
    cell: Any = None

    def __str__(self) -> str:
        return "is empty" if self.line is None else f"is {quote_value(self.cell, LONGEST_CELL)} on line {self.line}"


@dataclass(frozen=True)
class Columns:
    """The text column and the label columns of a table.

    Where the labels were not named, `others` holds every column that was left: what keeps it from being a
    label, or None for one that could be a label too.
    """

    text: str
    labels: tuple[str, ...]
    others: Mapping[str, NoLabel | None] = field(default_factory=dict)


def find_columns(path: str | Path, text_column: str | None = None, label_columns: Sequence[str] | None = None) -> Columns:
    """Return the columns to use: those named, else those found by name and content.

    Without `text_column`, the first of TEXT_COLUMNS present in any case. Without `label_columns`,
    DEFAULT_LABELS when all are present, else every other column that holds only 0, 1 and empty
    cells and at least one value; the table is read until every column is known to be no label.

    Raises:
        InputError: a column is missing, named twice or used for both, or no label column is found.
    """
    path = Path(path)
    names = read_columns(path)
    text = find_text_column(path, names, text_column)
    if label_columns is not None:
        check_label_names(path, label_columns, text, names)
        return Columns(text, tuple(label_columns))
    known = DEFAULT_LABELS if set(DEFAULT_LABELS) <= set(names) else ()
    if text in known:
        raise _used_twice(path, text)
    cells = judge_columns(path, [name for name in names if name and name not in (text, *known)])
    if known:
        return Columns(text, known, cells)
    labels = tuple(name for name, reason in cells.items() if reason is None)
    if not labels:
        raise _no_label_column(path, cells)
    if len(labels) > MOST_LABELS_FOUND:
        raise InputError(
            f"{path}: {len(labels)} columns hold only 0 and 1, more than {MOST_LABELS_FOUND} that would be taken unasked. "
            "Name the labels in --label_columns."
        )
    return Columns(text, labels, {name: reason for name, reason in cells.items() if reason is not None})


def find_text_column(path: Path, names: Sequence[str], text_column: str | None) -> str:
    """Return `text_column` when the table has it, or the column whose name is one of TEXT_COLUMNS."""
    if text_column is not None:
        if text_column not in names:
            raise InputError(f"{path}: no column {text_column!r}; found {_listed(names)}. Set --text_column.")
        return text_column
    for candidate in TEXT_COLUMNS:
        for name in names:
            if name.lower() == candidate:
                return name
    one_cell = len(names) == 1 and any(mark in names[0] for mark in ";|\t")
    hint = "Separate the cells by commas in .csv, by tabs in .tsv." if one_cell else "Set --text_column."
    raise InputError(f"{path}: no text column; found {_listed(names)}. {hint}")


def check_label_names(path: Path, labels: Sequence[str], text: str, names: Sequence[str]) -> None:
    """Check that the table has each label column, once, and that none is the text."""
    if not labels:
        raise InputError(f"{path}: no label column is named. Set --label_columns.")
    present, counts = set(names), Counter(labels)
    for label in labels:
        if label not in present:
            raise InputError(f"{path}: no column {label!r}; found {_listed(names)}. Set --label_columns.")
        if counts[label] > 1:
            raise InputError(f"{path}: label {label!r} is named twice. Name it once in --label_columns.")
    if text in present.intersection(labels):
        raise _used_twice(path, text)


def _used_twice(path: Path, text: str) -> InputError:
    return InputError(f"{path}: {text!r} is both text and label. Set --text_column or --label_columns.")


def judge_columns(path: Path, names: Sequence[str]) -> dict[str, NoLabel | None]:
    """Say of each column what keeps it from being a label; None when it holds only 0, 1 and empty cells, and a value."""
    open_columns = dict.fromkeys(names)
    with_value: set[str] = set()
    judged: dict[str, NoLabel | None] = dict.fromkeys(names)
    for line, row in read_rows(path):
        for name in tuple(open_columns):
            code = label_code(row.get(name))
            if code is None:
                del open_columns[name]
                judged[name] = NoLabel(line, row.get(name))
            elif code != UNKNOWN:
                with_value.add(name)
        if not open_columns:
            break
    return judged | {name: NoLabel() for name in open_columns if name not in with_value}


def _no_label_column(path: Path, cells: Mapping[str, NoLabel | None]) -> InputError:
    fractions = [f"{name!r} {reason}" for name, reason in cells.items() if reason is not None and _is_fraction(reason.cell)]
    if fractions:
        remedy = "Binarise fractions first, say 1 from 0.5 up."
        return InputError(f"{path}: no column holds only 0 and 1; {'; '.join(fractions[:3])}. {remedy}")
    return InputError(
        f"{path}: no label column holding only 0 and 1 among {_listed(list(cells)) or 'no columns'}. "
        "Add one column of 0 and 1 per label, or set --label_columns."
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


def _is_fraction(cell: Any) -> bool:
    try:
        return 0 < float(cell) < 1
    except (TypeError, ValueError, OverflowError):
        return False


def read_label_codes(path: Path, line: int, row: Row, label_names: Sequence[str]) -> list[int]:
    """Return the row's label codes: 0, 1 or UNKNOWN.

    Raises:
        InputError: a cell holds anything but 0, 1 or nothing.
    """
    codes = []
    for name in label_names:
        code = label_code(row.get(name))
        if code is None:
            cell = row.get(name)
            remedy = "Binarise fractions first, say 1 from 0.5 up." if _is_fraction(cell) else "Write 0 or 1, or leave it empty."
            raise InputError(f"{_place(path, line)}: label {name!r} is {quote_value(cell, LONGEST_CELL)}, not 0 or 1. {remedy}")
        codes.append(code)
    return codes


def clean_text(text: str, normalization: str) -> str:
    """Return the text in the Unicode form asked for (none, nfc or nfkc), without outer white space.

    Half a surrogate pair, as JSON keeps from a text cut short, becomes U+FFFD: it has no UTF-8.
    """
    if normalization != "none":
        form = cast(Literal["NFC", "NFKC"], normalization.upper())
        text = unicodedata.normalize(form, text)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.strip()


def cleaned_rows(
    path: Path, text_column: str, normalization: str, others: Collection[str] | None = None
) -> Iterator[tuple[int, Row, str]]:
    """Yield (line, row, cleaned text) of every data row; a missing text is empty.

    Args:
        others: Columns beside the text that are asked of the row; None for all.
    """
    for line, row in read_rows(path, None if others is None else (text_column, *others)):
        cell = row.get(text_column)
        if isinstance(cell, (bool, list, dict, bytes)):
            kind = type(cell).__name__
            place = _place(path, line)
            raise InputError(f"{place}: the text in {text_column!r} is a {kind}. Write it as a string.")
        missing = cell is None or (isinstance(cell, float) and math.isnan(cell))
        yield line, row, "" if missing else clean_text(str(cell), normalization)
