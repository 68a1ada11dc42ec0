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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
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
LONGEST_CELL = 40
# What may separate the cells of a .csv table, by what a reader calls it; the first that fits is taken.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Where the header alone leaves the delimiter open, it is decided by so many records.
SAMPLED_RECORDS = 1000
PARQUET_ROWS, PARQUET_BUFFER = 4096, 1 << 20
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
            raise InputError(f"{path}: is a folder without .parquet files. Give one table: {list_names(READERS)}.")
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path.")
    if path.suffix.lower() not in READERS:
        kind = f"unknown extension {path.suffix!r}" if path.suffix else "no file extension"
        raise InputError(f"{path}: {kind}. Give one of {list_names(READERS)}.")
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


def find_delimiter(path: Path) -> str:
    """Return what separates the cells of a .csv table: a comma, unless its header and first records speak for another.

    Only what parts the header into several cells is considered. Where that holds for more than the comma, the one
    decides under which most of the first records have the header's number of cells in a row, at equal numbers the
    comma. So marks within texts decide nothing while the header has commas alone.
    """
    candidates = [delimiter for delimiter in DELIMITERS if _count_fitting(path, delimiter, records=0) is not None]
    if candidates in ([], [","]):
        return ","
    fitting = {delimiter: _count_fitting(path, delimiter) or 0 for delimiter in candidates}
    best = max(candidates, key=lambda delimiter: fitting[delimiter])
    return best if fitting[best] else ","


def _count_fitting(path: Path, delimiter: str, records: int = SAMPLED_RECORDS) -> int | None:
    """Return how many of the first records have the header's number of cells; None where that is less than two."""
    found = _delimited_records(path, delimiter)
    fitting = 0
    try:
        _, header = next(found, (1, []))
        if len(header) < 2:
            return None
        for _, cells in islice(found, records):
            if len(cells) != len(header):
                break
            fitting += 1
    except InputError:  # told with its place by whoever reads the table, if it is read so at all
        return fitting or None
    return fitting


def describe_delimiter(path: Path) -> str | None:
    """Say what separates the cells of a table where that is no matter of course: in a .csv of other than commas."""
    if path.suffix.lower() != ".csv" or (delimiter := find_delimiter(path)) == ",":
        return None
    return f"cells are separated by {DELIMITERS[delimiter]}"


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
                    f"{one}: has the columns {list_names(file.schema_arrow.names)}, and {list_files(path)[0].name} has "
                    f"{list_names(names)}. Give all files of a folder the same columns."
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
    ".csv": lambda path: _read_delimited(path, find_delimiter(path)),
    ".tsv": lambda path: _read_delimited(path, "\t"),
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": lambda path: _read_parquet(path, None),
    ".xlsx": _read_excel,
}


def place_of(path: Path, line: int) -> str:
    """Return where a data row stands, for a message."""
    unit = "row" if _is_parquet(path) or path.suffix.lower() == ".xlsx" else "line"
    return f"{path}, {unit} {line}"


def list_names(names: Iterable[str], limit: int = 20) -> str:
    """Return names with commas between, of many the first ones and how many more there are."""
    shown = [quote_value(name, LONGEST_CELL) if not name.isprintable() or not name else name for name in names]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def find_text_column(path: Path, names: Sequence[str], text_column: str | None) -> str:
    """Return `text_column` when the table has it, or the column whose name is one of TEXT_COLUMNS."""
    if text_column is not None:
        if text_column not in names:
            raise InputError(f"{path}: no column {text_column!r}; found {list_names(names)}. Set --text_column.")
        return text_column
    for candidate in TEXT_COLUMNS:
        for name in names:
            if name.lower() == candidate:
                return name
    one_cell = len(names) == 1 and any(mark in names[0] for mark in ";|\t")
    hint = "Separate the cells alike in every row, in .tsv by tabs." if one_cell else "Set --text_column."
    raise InputError(f"{path}: no text column; found {list_names(names)}. {hint}")


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
            place = place_of(path, line)
            raise InputError(f"{place}: the text in {text_column!r} is a {kind}. Write it as a string.")
        missing = cell is None or (isinstance(cell, float) and math.isnan(cell))
        yield line, row, "" if missing else clean_text(str(cell), normalization)
