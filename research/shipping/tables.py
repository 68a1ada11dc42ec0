"""Tables that are written row by row, in the formats that `research.text.tables` reads."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from research.errors import InputError
from research.text.tables import Row, find_delimiter

Write = Callable[[Sequence[Row]], None]
STANDARD_STREAM = "-"


def check_output_format(path: str, source: Path) -> None:
    """Refuse to write a table in a format that is not known, or that cannot hold what the source holds.

    Raises:
        InputError: one of these.
    """
    suffix = output_suffix(path)
    if suffix not in WRITERS:
        raise InputError(f"--output_path {path}: must end in one of {', '.join(WRITERS)}, or be {STANDARD_STREAM} for CSV.")
    if suffix == ".parquet":
        if source.suffix.lower() not in (".parquet", ".csv", ".tsv"):
            raise InputError(f"--output_path {path}: columns of {source.suffix} have no type of their own. Write .jsonl instead.")
        _import_arrow(path)


def output_suffix(path: str) -> str:
    """Return the format of an output by its name; what goes to standard output is CSV."""
    return ".csv" if path == STANDARD_STREAM else Path(path).suffix.lower()


@contextmanager
def open_table(
    path: Path | None, suffix: str, source: Path, columns: Sequence[str], added: Mapping[str, type]
) -> Iterator[Write]:
    """Open a table for writing and give a function that writes some rows to it.

    Args:
        path: Where; standard output for None, in which case the format is one of text.
        columns: The source's, in order; in .jsonl a row may lack some.
        added: Names and types, float or int, of the columns after them, in which None stands for nothing.
    """
    with WRITERS[suffix](path, source, columns, added) as write:
        yield write


@contextmanager
def _open_text(path: Path | None) -> Iterator[io.TextIOBase]:
    if path is not None:
        with open(path, "w", encoding="utf-8", newline="") as file:
            yield file
        return
    # The bytes that a file would hold, whatever the terminal's encoding.
    file = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="", write_through=True)
    try:
        yield file
        file.flush()
    finally:
        file.detach()


@contextmanager
def _delimited(path: Path | None, delimiter: str, columns: Sequence[str], added: Mapping[str, type]) -> Iterator[Write]:
    with _open_text(path) as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        names = [*columns, *added]
        writer.writerow(names)
        yield lambda rows: writer.writerows([[format_cell(row.get(name)) for name in names] for row in rows])


def _csv(path: Path | None, source: Path, *columns: Any) -> AbstractContextManager[Write]:
    """Write cells with the separators of the source where that is a .csv too."""
    return _delimited(path, find_delimiter(source) if source.suffix.lower() == ".csv" else ",", *columns)


def _tsv(path: Path | None, _source: Path, *columns: Any) -> AbstractContextManager[Write]:
    return _delimited(path, "\t", *columns)


def format_cell(cell: Any) -> str:
    """Return a cell of any format as a text: nothing for None, JSON for lists and objects."""
    if cell is None:
        return ""
    if isinstance(cell, list | dict):
        return json.dumps(cell, ensure_ascii=False, default=str)
    return str(cell).encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _json_lines(path: Path | None, _source: Path, _columns: Sequence[str], _added: Mapping[str, type]) -> Iterator[Write]:
    def line(row: Row) -> str:
        text = json.dumps(row, ensure_ascii=False, default=str)
        # Half a surrogate pair, which JSON can spell and UTF-8 cannot.
        return (text if _encodes(text) else json.dumps(row, default=str)) + "\n"

    with _open_text(path) as file:
        yield lambda rows: file.writelines(line(row) for row in rows)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _parquet(path: Path | None, source: Path, columns: Sequence[str], added: Mapping[str, type]) -> Iterator[Write]:
    """Write the source's columns in their own types; cells of a table of text are texts."""
    arrow, parquet = _import_arrow(str(path))
    assert path is not None
    if source.suffix.lower() == ".parquet":
        schema = parquet.read_schema(source)
    else:
        schema = arrow.schema([(name, arrow.string()) for name in columns])
    for name, kind in added.items():
        schema = schema.append(arrow.field(name, arrow.float64() if kind is float else arrow.int8()))
    with parquet.ParquetWriter(path, schema) as writer:
        yield lambda rows: writer.write_table(arrow.Table.from_pylist(list(rows), schema))


def _import_arrow(path: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: writing .parquet needs pyarrow. Run pip install pyarrow, or write .csv.") from None
    return pyarrow, pyarrow.parquet


WRITERS: dict[str, Callable[..., AbstractContextManager[Write]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
