"""A table in, the same table with a classifier's probabilities and decisions out; of any size, in flat memory.

The answers are kept beside the output while they are made, a record of fixed size for each row, and the table is
written when all are there. A record carries a hash of its row's text and logits: a command that goes on after a kill
reads the table again and takes over the records of the very texts it finds there, so neither a torn write nor a table
that has changed since can put an answer beside another text.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError
from research.logs import PhaseProgress
from research.shipping.scorers import Scorer, compute_logits, decide
from research.shipping.tables import STANDARD_STREAM, check_output_format, open_table, output_suffix
from research.storage.files import flush_folder
from research.text.tables import Row, cleaned_rows, describe_delimiter, find_text_column, read_columns

log = logging.getLogger(__name__)
CHUNK_ROWS = 2048
HASH_BYTES = 8


@dataclass(frozen=True)
class Table:
    """A table that has been read to its end once: its columns, which of them is the text, and its number of rows."""

    path: Path
    columns: tuple[str, ...]
    text_column: str
    num_rows: int

    def chunks(self, normalization: str) -> Iterator[list[tuple[Row, str]]]:
        """Yield (row, normalised text) of the rows in order, CHUNK_ROWS at a time."""
        rows = ((row, text) for _, row, text in cleaned_rows(self.path, self.text_column, normalization))
        while chunk := list(islice(rows, CHUNK_ROWS)):
            yield chunk


@dataclass(frozen=True)
class Summary:
    """What was answered: rows, those without a text, and how many rows each label was given to."""

    num_rows: int
    num_empty: int
    positives: dict[str, int]

    def __str__(self) -> str:
        given = ", ".join(f"{label} {count:,}" for label, count in self.positives.items())
        empty = f" ({self.num_empty:,} of them empty, without an answer)" if self.num_empty else ""
        return f"{self.num_rows:,} rows{empty}: {given}"


def check_table(path: Path, text_column: str | None, added: Sequence[str]) -> Table:
    """Read a table once, so that what is wrong with its last row is said before the first is answered.

    Args:
        added: The names of the columns that it is going to get.

    Raises:
        InputError: it cannot be read, has no text column, or has a column of those names already.
    """
    columns = read_columns(path)
    text = find_text_column(path, columns, text_column)
    if taken := [name for name in added if name in columns]:
        raise InputError(
            f"{path}: has a column {taken[0]!r} already, and what is there is not written over. Set --prefix, as in "
            "--prefix pred_, which goes before the name of every new column."
        )
    return Table(path, columns, text, sum(1 for _ in cleaned_rows(path, text, "none")))


def added_columns(labels: Sequence[str], prefix: str) -> dict[str, type]:
    """Return names and types of the columns that a table gets: probabilities, then decisions.

    Raises:
        InputError: two of them have one name.
    """
    columns: dict[str, type] = {f"{prefix}p_{label}": float for label in labels}
    if twice := [label for label in labels if prefix + label in columns]:
        raise InputError(f"--model: its label {twice[0]!r} is called as the probability of another. Rename the label.")
    return columns | {prefix + label: int for label in labels}


def predict_table(
    scorer: Scorer, source: str, target: str, *, text_column: str | None = None, prefix: str = "", overwrite: bool = False
) -> Summary:
    """Write a table again with a probability and a decision of each label in every row.

    Args:
        source: The table, or - for CSV from standard input, which is copied to a temporary file first.
        target: Where, or - for CSV to standard output.
        overwrite: Replace what stands there.

    Raises:
        InputError: something is wrong with the table or the paths; nothing has been written.
        OSError: the output cannot be written; the same command goes on from where it came to.
    """
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(_spooled_input()) if source == STANDARD_STREAM else Path(source)
        check_output_format(target, path)
        final = None if target == STANDARD_STREAM else Path(target)
        if final is not None:
            _check_target(final, path, overwrite)
        added = added_columns(scorer.labels, prefix)
        table = check_table(path, text_column, tuple(added))
        if (delimiter := describe_delimiter(path)) is not None:
            log.info("%s: %s", source, delimiter)
        if final is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="research_predict_")))
        else:
            folder = final.parent
        answers = stack.enter_context(open_answers(folder / f".{(final or path).name}.answers.tmp", scorer))
        complete_answers(scorer, table, answers)
        return write_answers(scorer, table, answers, final, output_suffix(target), prefix)


@contextlib.contextmanager
def _spooled_input() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="research_predict_") as folder:
        path = Path(folder) / "standard_input.csv"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


def _check_target(final: Path, source: Path, overwrite: bool) -> None:
    if final.is_dir():
        raise InputError(f"--output_path {final}: is a folder. Give a file.")
    if not final.parent.is_dir():
        raise InputError(f"--output_path {final}: there is no folder {final.parent}. Make it first.")
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise InputError(f"--output_path {final}: {final.parent} is not writable.")
    if final.exists() and source.exists() and final.samefile(source):
        raise InputError(f"--output_path {final}: is the table that is read. Give another file.")
    if final.exists() and not overwrite:
        raise InputError(f"--output_path {final}: is there already. Give another file, or --overwrite.")


class Answers:
    """The file of records: a line that says whose answers they are, then a hash and the logits of each row."""

    def __init__(self, file: BinaryIO, scorer: Scorer) -> None:
        self.file = file
        self.header = json.dumps({"labels": scorer.labels, **scorer.identity}, sort_keys=True).encode() + b"\n"
        self.dtype = np.dtype([("hash", f"V{HASH_BYTES}"), ("logits", "<f4", (len(scorer.labels),))])

    def rewind(self) -> None:
        """Go to the first record; a file of another model is emptied."""
        self.file.seek(0)
        if self.file.readline() != self.header:
            self.file.seek(0)
            self.file.truncate()
            self.file.write(self.header)

    def read(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the logits (n, C) of as many of the next texts as there are records of."""
        place = self.file.tell()
        content = self.file.read(len(texts) * self.dtype.itemsize)
        records = np.frombuffer(content, dtype=self.dtype, count=len(content) // self.dtype.itemsize)
        pairs = zip(texts, records, strict=False)
        right = [hash_answer(text, record["logits"]) == record["hash"].tobytes() for text, record in pairs]
        count = right.index(False) if False in right else len(right)
        self.file.seek(place + count * self.dtype.itemsize)
        return records["logits"][:count].astype(np.float32)

    def write(self, texts: Sequence[str], logits: NDArray[np.float32]) -> None:
        """Put records of texts where the file stands, and drop what stood behind it."""
        records = np.zeros(len(texts), dtype=self.dtype)
        records["logits"] = logits
        for record, text in zip(records, texts, strict=True):
            record["hash"] = np.void(hash_answer(text, record["logits"]))
        self.file.truncate()
        self.file.write(records.tobytes())
        self.file.flush()


def hash_answer(text: str, logits: NDArray[np.float32]) -> bytes:
    """Return a hash of a text and its logits."""
    return hashlib.blake2b(text.encode() + logits.tobytes(), digest_size=HASH_BYTES).digest()


@contextlib.contextmanager
def open_answers(path: Path, scorer: Scorer) -> Iterator[Answers]:
    """Open the records of an output for this process alone; they are deleted when the block ends without an error.

    Raises:
        InputError: another process is making the same output.
    """
    with open(path, "a+b") as handle, open(path, "r+b") as file:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path} is being written by another process. Wait for it, or give another --output_path.") from None
        yield Answers(file, scorer)
        path.unlink(missing_ok=True)


def complete_answers(scorer: Scorer, table: Table, answers: Answers) -> None:
    """Answer every row that has no record yet."""
    answers.rewind()
    chunks = table.chunks(scorer.text_normalization)
    done, rest = 0, []
    for chunk in chunks:
        texts = [text for _, text in chunk]
        found = len(answers.read(texts))
        done += found
        if found < len(chunk):
            rest = texts[found:]
            break
    if done:
        log.info("%s of %s rows were answered before", f"{done:,}", f"{table.num_rows:,}")
    with PhaseProgress("predicting", table.num_rows, "rows", done) as progress:
        while rest:
            answers.write(rest, answer_texts(scorer, rest))
            progress.advance(len(rest))
            rest = [text for _, text in next(chunks, [])]


def answer_texts(scorer: Scorer, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return logits (N, C), nan for empty texts."""
    logits = np.full((len(texts), len(scorer.labels)), np.nan, dtype=np.float32)
    rows = [row for row, text in enumerate(texts) if text]
    if rows:
        logits[rows] = compute_logits(scorer, [texts[row] for row in rows])
    return logits


def write_answers(scorer: Scorer, table: Table, answers: Answers, final: Path | None, suffix: str, prefix: str) -> Summary:
    """Write the table with its answers, whole or not at all where it is a file.

    Raises:
        InputError: the table has changed since it was answered.
    """
    temporary = None if final is None else final.with_name(f".{final.name}.tmp")
    added = added_columns(scorer.labels, prefix)
    answers.rewind()
    num_rows = num_empty = 0
    positives = np.zeros(len(scorer.labels), dtype=np.int64)
    with open_table(temporary, suffix, table.path, table.columns, added) as write:
        for chunk in table.chunks(scorer.text_normalization):
            logits = answers.read([text for _, text in chunk])
            if len(logits) < len(chunk):
                raise InputError(f"{table.path}: changed while it was read. Run the same command again.")
            probs, decisions = decide(scorer, logits)
            answered = np.asarray(np.isfinite(logits).all(axis=1))
            write([row | cells for (row, _), cells in zip(chunk, _cells(added, probs, decisions, answered), strict=True)])
            num_rows += len(chunk)
            num_empty += int((~answered).sum())
            positives += decisions.sum(axis=0)
    if num_rows != table.num_rows:
        if temporary is not None:
            temporary.unlink()
        raise InputError(f"{table.path}: changed while it was read. Run the same command again.")
    if final is not None and temporary is not None:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, final)
        flush_folder(final.parent)
    return Summary(num_rows, num_empty, dict(zip(scorer.labels, positives.tolist(), strict=True)))


def _cells(
    added: Mapping[str, type], probs: NDArray[np.float64], decisions: NDArray[np.bool_], answered: NDArray[np.bool_]
) -> Iterator[dict[str, Any]]:
    """Yield the new cells of each row, None where there is no answer.

    Probabilities keep every digit, so that comparing them with the thresholds gives the decisions beside them.
    """
    for row, there in enumerate(answered):
        values = [*map(float, probs[row]), *map(int, decisions[row])] if there else [None] * len(added)
        yield dict(zip(added, values, strict=True))
