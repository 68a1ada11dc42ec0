"""Tables of comments: read, find the columns, clean the texts, split without leaks.

Texts are never held together: a table is streamed once to collect labels and hashes, and once more
when somebody tokenises. What stays in memory is under 40 bytes a row with five labels; splitting
takes 10 more.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError
from research.names import number_name
from research.settings.data import SEPARATOR_NAMES
from research.text.labels import UNKNOWN, Columns, LabelList, check_label_source, find_columns, open_labels
from research.text.tables import cleaned_rows, describe_delimiter, find_text_column, hash_table, read_columns

# Where a row came from; Comments.source holds positions in this tuple.
SOURCES = ("main", "validation", "test", "unlabelled")
MAIN, VALIDATION, TEST, UNLABELLED = range(4)
VIEWS = 4  # of training texts, which are in no part
PARTS = ("train", "validation", "test", "unlabelled")
# Draws of a split to choose from where texts repeat: at most so many, over about so many texts in all.
MAX_DRAWS = 10
DRAWN_TEXTS = 200_000
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Table:
    """One table that was read, and what was read from it.

    `name` is that of its source, or unlabelled_2, ... for those after the first; `delimiter` says what separates its
    cells where that is unusual; `spellings` how labels are written that are not written as 0 and 1.
    """

    name: str
    source: int
    path: Path
    text_column: str
    sha256: str
    rows: int
    dropped: int
    delimiter: str | None = None
    spellings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Comments:
    """All rows with a text, table after table, without the texts themselves.

    N rows, C labels. `labels` (N, C) float32 is 0, 1 or nan for unknown; `source` (N,) int8 is a
    position in SOURCES or VIEWS; `empty_rows` (E,) int64 are the data rows without a text, which are
    dropped, counted from 0 through all tables; equal `text_hash` (N,) uint64 means equal cleaned texts.
    `text_sha256` covers every cleaned text in order, `labels_sha256` the label names and values. `duplicate_texts` counts the
    main table's rows beyond the first of their text, `conflicting_texts` its texts that carry a 0
    and a 1 for the same label.
    """

    tables: tuple[Table, ...]
    text_normalization: str
    columns: Columns
    labels: NDArray[np.float32]
    source: NDArray[np.int8]
    empty_rows: NDArray[np.int64]
    text_hash: NDArray[np.uint64]
    text_sha256: str
    labels_sha256: str
    duplicate_texts: int
    conflicting_texts: int

    def __len__(self) -> int:
        return len(self.source)

    def count_used(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Return how many of some rows are of each table, by its name."""
        ends = np.cumsum([table.rows - table.dropped for table in self.tables])
        counts = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(ends))
        return {table.name: int(count) for table, count in zip(self.tables, counts, strict=True)}

    def count_texts(self, rows: NDArray[np.int64]) -> int:
        """Return how many distinct texts some rows hold."""
        hashes = self.text_hash[rows]
        hashes.sort()  # in place: np.unique makes three more arrays of the size
        return min(len(hashes), 1) + int(np.count_nonzero(hashes[1:] != hashes[:-1]))

    def find_source_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which data row of its table each of some rows is, counted from 0, rows without a text included."""
        # How many rows with a text stand before each one without.
        kept_before = self.empty_rows - np.arange(len(self.empty_rows))
        places = rows + np.searchsorted(kept_before, rows, side="right")
        starts = np.cumsum([0, *(table.rows for table in self.tables)])
        return places - starts[np.searchsorted(starts, places, side="right") - 1]

    @property
    def text_column(self) -> str:
        """The text column of the main table."""
        return self.columns.text

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels of the main table."""
        return self.columns.labels

    @property
    def dropped(self) -> int:
        """Rows left out because they hold no text."""
        return sum(table.dropped for table in self.tables)

    @property
    def file_sha256(self) -> dict[str, str]:
        """The tables' digests by their names."""
        return {table.name: table.sha256 for table in self.tables if table.source != VIEWS}

    def iter_texts(self) -> Iterator[str]:
        """Stream the cleaned texts again, in row order.

        Raises:
            InputError: a table no longer holds the texts it held; no changed text is yielded.
        """
        index = 0
        for table in self.tables:
            end = index + table.rows - table.dropped
            for _, _, text in cleaned_rows(table.path, table.text_column, self.text_normalization, ()):
                if not text:
                    continue
                if index == end or hash_text(text.encode()) != self.text_hash[index]:
                    raise InputError(f"{table.path}: changed since it was read. Run the command again.")
                yield text
                index += 1
            if index != end:
                raise InputError(f"{table.path}: changed since it was read. Run the command again.")

    def iter_texts_of(self, rows: NDArray[np.int64]) -> Iterator[str]:
        """Stream the texts of some rows, in the order of all rows; as `iter_texts` does."""
        wanted = np.zeros(len(self), dtype=bool)
        wanted[rows] = True
        return compress(self.iter_texts(), wanted.tobytes())

    def read_texts(self, rows: NDArray[np.int64]) -> dict[int, str]:
        """Return the texts of some rows by row, as `iter_texts` does."""
        return dict(zip(np.unique(rows).tolist(), self.iter_texts_of(rows), strict=True))


def load_comments(
    dataset_path: str | Path,
    *,
    text_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    label_list_column: str | None = None,
    label_separator: str = "|",
    val_path: str | Path | None = None,
    test_path: str | Path | None = None,
    unlabelled_path: str | Path | Sequence[str | Path] | None = None,
    text_normalization: str = "nfc",
) -> Comments:
    """Read the main table and those given beside it; the arguments are the flags of the same names.

    The main table decides the labels, which --val_path and --test_path must have in the same columns. Another
    table's text column has the main one's name, or is found by name.

    Raises:
        InputError: a table, a column or a cell is not as it must be.
    """
    columns = find_columns(dataset_path, text_column, label_columns, _make_label_list(label_list_column, label_separator))
    named = label_columns is not None
    store = _RowStore()
    tables = [
        _load_table(name, path, source, Path(dataset_path), columns, named, text_normalization, store)
        for name, path, source in _list_tables(dataset_path, val_path, test_path, unlabelled_path)
    ]
    codes = np.frombuffer(store.label_codes, np.int8).reshape(-1, len(columns.labels))
    source_of_row = np.frombuffer(store.source, np.int8)
    text_hash = np.frombuffer(store.text_hash, np.uint64)
    main = source_of_row == MAIN
    duplicates, conflicts = count_repeats(text_hash[main], codes[main])
    labels_digest = hashlib.sha256(json.dumps(columns.labels).encode())
    labels_digest.update(codes.data)
    labels = codes.astype(np.float32)
    labels[codes == UNKNOWN] = np.nan
    return Comments(
        tables=tuple(tables),
        text_normalization=text_normalization,
        columns=columns,
        labels=labels,
        source=source_of_row,
        empty_rows=np.frombuffer(store.empty_rows, np.int64),
        text_hash=text_hash,
        text_sha256=store.text_digest.hexdigest(),
        labels_sha256=labels_digest.hexdigest(),
        duplicate_texts=duplicates,
        conflicting_texts=conflicts,
    )


def _list_tables(*of_sources: str | Path | Sequence[str | Path] | None) -> Iterator[tuple[str, Path, int]]:
    """Yield the name, path and source of every table, given one or several paths of each source."""
    for source, given in enumerate(of_sources):
        paths = (given,) if isinstance(given, str | Path) else given or ()
        for number, path in enumerate(paths, 1):
            yield number_name(SOURCES[source], number), Path(path), source


def _make_label_list(column: str | None, separator: str) -> LabelList | None:
    return None if column is None else LabelList(column, SEPARATOR_NAMES.get(separator, separator))


class _RowStore:
    """What is kept of every row while tables are read, in arrays that grow without boxing."""

    def __init__(self) -> None:
        self.label_codes = array("b")
        self.source = array("b")
        self.empty_rows = array("q")
        self.text_hash = array("Q")
        self.text_digest = hashlib.sha256()

    def add_empty(self) -> None:
        """Count a row that holds no text."""
        self.empty_rows.append(len(self.source) + len(self.empty_rows))

    def add(self, codes: Sequence[int], source: int, text: str) -> None:
        encoded = text.encode()
        self.label_codes.extend(codes)
        self.source.append(source)
        self.text_hash.append(hash_text(encoded))
        # The length goes first, so that moving a character from one text to the next changes the digest.
        self.text_digest.update(len(encoded).to_bytes(8, "little"))
        self.text_digest.update(encoded)


def _load_table(
    name: str, path: Path, source: int, main: Path, columns: Columns, named: bool, normalization: str, store: _RowStore
) -> Table:
    text_column = columns.text
    if source != MAIN:
        names = read_columns(path)
        text_column = find_text_column(path, names, columns.text if columns.text in names else None)
        if source != UNLABELLED:
            check_label_source(path, columns, text_column, names)
    labels = None if source == UNLABELLED else open_labels(path, columns, main, named=named)
    unknown = [UNKNOWN] * len(columns.labels)
    rows = kept = 0
    needed = () if source == UNLABELLED else None
    for line, row, text in cleaned_rows(path, text_column, normalization, needed):
        if text:
            store.add(unknown if labels is None else labels.read(line, row), source, text)
            kept += 1
        else:
            store.add_empty()
        rows += 1
    if not kept:
        raise InputError(f"{path}: all {rows} texts in {text_column!r} are empty. Set --text_column.")
    spellings = {} if labels is None else labels.finish()
    return Table(name, source, path, text_column, hash_table(path), rows, rows - kept, describe_delimiter(path), spellings)


def hash_text(encoded: bytes) -> int:
    """Return 64 bits that name a text; two of a million texts collide with probability 3e-8."""
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def count_repeats(text_hash: NDArray[np.uint64], codes: NDArray[np.int8]) -> tuple[int, int]:
    """Return (rows beyond the first of their text, texts with a 0 and a 1 for one label)."""
    order = np.argsort(text_hash, kind="stable")
    _, starts = np.unique(text_hash[order], return_index=True)
    positive = np.maximum.reduceat(codes[order] == 1, starts, axis=0)
    negative = np.maximum.reduceat(codes[order] == 0, starts, axis=0)
    return len(text_hash) - len(starts), int((positive & negative).any(axis=1).sum())


@dataclass(frozen=True, eq=False)
class Split:
    """Row numbers of each part, ascending, int64; no text stands in two of the first three.

    `leaked` counts, by the part they were taken from, the rows left out because their text also
    stands in a part that is held out; `train` counts main rows that also stand in --val_path or
    --test_path. `near_duplicates` counts those whose text nearly equals a held-out one, once they were
    looked for: `unlabelled` rows, which are left out, and `train` rows, which stay.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    unlabelled: NDArray[np.int64]
    leaked: dict[str, int]
    near_duplicates: dict[str, int] = field(default_factory=dict)


def split_comments(
    comments: Comments,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    data_fraction: float = 1.0,
    fold: int | None = None,
    num_folds: int = 1,
) -> Split:
    """Split the distinct texts of the main table, label by label alike; equal texts stay together.

    Fractions are of the main table's distinct texts. A text counts as positive for a label when any
    of its rows is. A table of its own is a part as a whole (validation gives up texts it shares with
    test), and its texts are taken out of training. `data_fraction` thins the training texts only, so
    validation and test are the same at every value. With `num_folds` over 1, `fold` (from 0) is the
    test part and validation comes from the rest. The order of the table's rows does not matter.

    Raises:
        InputError: too few texts for the parts asked for.
    """
    assert num_folds == 1 or (fold is not None and 0 <= fold < num_folds)
    rows = [np.flatnonzero(comments.source == source) for source in range(len(SOURCES))]
    if num_folds > 1 and len(rows[TEST]):
        raise InputError("--num_folds: folds make their own test parts. Drop --test_path.")
    validation = _without_texts_of(comments, rows[VALIDATION], rows[TEST])
    main = _without_texts_of(comments, rows[MAIN], np.concatenate([validation, rows[TEST]]))
    shares = _Shares(
        validation=0.0 if len(rows[VALIDATION]) else val_fraction,
        test=1 / num_folds if num_folds > 1 else 0.0 if len(rows[TEST]) else test_fraction,
    )
    texts, text_of_row = group_texts(comments, main)
    _check_enough_texts(comments, len(texts), shares, num_folds)
    part_of_text = _choose_parts(texts, shares, seed, fold, num_folds)
    _thin_training(part_of_text, texts, data_fraction, seed)
    part_of_row = part_of_text[text_of_row]
    if not len(rows[VALIDATION]):
        validation = main[part_of_row == VALIDATION]
    test = rows[TEST] if len(rows[TEST]) else main[part_of_row == TEST]
    train = main[part_of_row == TRAIN]
    unlabelled = _without_texts_of(comments, rows[UNLABELLED], np.concatenate([validation, test]))
    _check_parts(comments, train, validation, test, len(texts))
    leaked = {
        "train": len(rows[MAIN]) - len(main),
        "validation": len(rows[VALIDATION]) - len(validation) if len(rows[VALIDATION]) else 0,
        "unlabelled": len(rows[UNLABELLED]) - len(unlabelled),
    }
    return Split(train, validation, test, unlabelled, leaked)


# A text's part; validation and test are numbered as the sources are.
TRAIN, UNUSED = 0, 3


@dataclass(frozen=True)
class _Shares:
    """Shares of the main table's distinct texts; 0 for a part that is a table of its own."""

    validation: float
    test: float

    @property
    def train(self) -> float:
        return 1 - self.validation - self.test


def _without_texts_of(comments: Comments, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    if not len(rows) or not len(others):
        return rows
    held = np.sort(comments.text_hash[others])
    kept = np.empty(len(rows), dtype=bool)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        hashes = comments.text_hash[rows[start : start + ROWS_AT_ONCE]]
        nearest = np.minimum(np.searchsorted(held, hashes), len(held) - 1)
        kept[start : start + len(hashes)] = held[nearest] != hashes
    return rows[kept]


@dataclass(frozen=True, eq=False)
class Texts:
    """The T distinct texts of some rows: labels positive in any row, and what their rows add up to.

    `positives` (T, C) bool; `row_positives` (T, C) int32 and `row_counts` (T,) int64.
    """

    positives: NDArray[np.bool_]
    row_positives: NDArray[np.int32]
    row_counts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row_counts)

    def take(self, texts: NDArray[np.int64]) -> Texts:
        """Return some of the texts."""
        return Texts(self.positives[texts], self.row_positives[texts], self.row_counts[texts])


def group_texts(comments: Comments, rows: NDArray[np.int64]) -> tuple[Texts, NDArray[np.int64]]:
    """Return the distinct texts of `rows` and each row's text number.

    Texts are numbered in the order of their hashes, which the order of the rows does not change.
    An unknown label counts as 0.
    """
    _, text_of_row, row_counts = np.unique(comments.text_hash[rows], return_inverse=True, return_counts=True)
    row_positives = np.empty((len(row_counts), len(comments.label_names)), np.int32)
    for label in range(row_positives.shape[1]):
        row_positives[:, label] = np.bincount(text_of_row[comments.labels[rows, label] == 1], minlength=len(row_counts))
    return Texts(row_positives > 0, row_positives, row_counts), text_of_row


def _choose_parts(texts: Texts, shares: _Shares, seed: int, fold: int | None, num_folds: int) -> NDArray[np.int8]:
    """Return each text's part: TRAIN, VALIDATION or TEST."""
    if num_folds == 1:
        return assign_parts(texts, (shares.train, shares.validation, shares.test), (seed, 0))
    assert fold is not None
    folds = assign_parts(texts, (1 / num_folds,) * num_folds, (seed, 0))
    part = np.full(len(texts), TEST, np.int8)
    rest = np.flatnonzero(folds != fold)
    part[rest] = assign_parts(texts.take(rest), (shares.train, shares.validation), (seed, 1, fold))
    return part


def _thin_training(part: NDArray[np.int8], texts: Texts, data_fraction: float, seed: int) -> None:
    """Mark all but `data_fraction` of the training texts UNUSED, in place."""
    train = np.flatnonzero(part == TRAIN)
    if data_fraction < 1:
        kept = assign_parts(texts.take(train), (data_fraction, 1 - data_fraction), (seed, 2)) == 0
        part[train[~kept]] = UNUSED


def _check_enough_texts(comments: Comments, texts: int, shares: _Shares, num_folds: int) -> None:
    path = comments.tables[0].path
    if not texts:
        raise InputError(f"{path}: every text also stands in --val_path or --test_path. Give other texts.")
    if num_folds > texts:
        raise InputError(f"{path}: {texts} distinct texts for {num_folds} folds. Lower --num_folds.")
    if shares.train <= 1e-9:
        raise InputError(
            f"{path}: validation {shares.validation:g} and test {shares.test:g} leave no texts to train on. "
            "Lower --val_fraction" + (" or raise --num_folds." if num_folds > 1 else " or --test_fraction.")
        )


def _check_parts(
    comments: Comments,
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    test: NDArray[np.int64],
    texts: int,
) -> None:
    if not (len(train) and len(validation) and len(test)):
        raise InputError(
            f"{comments.tables[0].path}: {texts} distinct texts give {len(train)} training, "
            f"{len(validation)} validation and {len(test)} test rows; each part needs one. "
            "Give more texts, or change --val_fraction, --test_fraction or --data_fraction."
        )


def assign_parts(texts: Texts, shares: Sequence[float], entropy: tuple[int, ...]) -> NDArray[np.int8]:
    """Return a part for each text, (T,) int8, so that every part has its share of each label.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011) deals out the rarest label
    first. It sees texts, while scores are over rows, and one text may stand in many rows (36 in
    bn_cyberbully5): so where texts repeat, the best of several draws is taken, by the largest
    difference between a part's share of positive rows and the whole's. On bn_cyberbully5 that
    brings the worst difference of a label from 1.7 points (at most 3.1) to 0.8 (1.1), 20 seeds.
    A draw takes 7 microseconds a text on one core: 0.07 s for 10,000 texts, 1.3 s for 200,000,
    8.5 s for a million, with 5 labels or 30; a quicker approximation is not worth its code.

    `shares` sum to 1; `entropy` seeds the draws.
    """
    wanted = [part for part, share in enumerate(shares) if share > 0]
    if not len(texts) or len(wanted) == 1:
        return np.full(len(texts), wanted[0], np.int8)
    chosen_shares = np.array([shares[part] for part in wanted]) / sum(shares)
    random_state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))
    repeats = texts.row_counts.max() > 1
    draws = min(MAX_DRAWS, 1 + DRAWN_TEXTS // len(texts)) if repeats else 1
    candidates = (_stratify(texts.positives, chosen_shares, random_state) for _ in range(draws))
    best = min(candidates, key=lambda parts: _rate_deviation(texts, parts, len(wanted)))
    return np.array(wanted, np.int8)[best]


def _stratify(
    positives: NDArray[np.bool_], shares: NDArray[np.float64], random_state: np.random.RandomState
) -> NDArray[np.int64]:
    # Imported here: it brings scikit-learn's model selection, a second that a reader of tables need not pay.
    from iterstrat.ml_stratifiers import IterativeStratification

    order = random_state.permutation(len(positives))
    parts = np.empty(len(positives), np.int64)
    parts[order] = IterativeStratification(labels=positives[order], r=shares, random_state=random_state)
    return parts


def _rate_deviation(texts: Texts, parts: NDArray[np.int64], num_parts: int) -> float:
    """Return the largest difference between a part's share of positive rows and the whole's.

    It is infinite when a part is empty.
    """
    if np.bincount(parts, minlength=num_parts).min() == 0:
        return math.inf
    whole = texts.row_positives.sum(axis=0) / texts.row_counts.sum()
    rates = [texts.row_positives[parts == part].sum(axis=0) / texts.row_counts[parts == part].sum() for part in range(num_parts)]
    return float(np.abs(np.stack(rates) - whole).max())


def compute_class_weights(labels: NDArray[np.float32], label_names: Sequence[str]) -> tuple[NDArray[np.float32], list[str]]:
    """Return negatives / positives of each label, (C,) float32, and a warning for each that has none.

    `labels` is (N, C) with nan for unknown cells, which count for neither. A label without positives
    or without negatives gets 1.
    """
    positives = (labels == 1).sum(axis=0)
    negatives = (labels == 0).sum(axis=0)
    usable = (positives > 0) & (negatives > 0)
    weights = np.where(usable, negatives / np.maximum(positives, 1), 1.0).astype(np.float32)
    warnings = []
    for index in np.flatnonzero(~usable).tolist():
        missing = "negative" if positives[index] else "positive"
        warnings.append(f"label {label_names[index]!r} has no {missing} row to train on; its weight is 1")
    return weights, warnings


def summarize_data(comments: Comments, split: Split) -> dict[str, Any]:
    """Return the counts for log and report: what was read, left out, and what each part holds."""
    parts: dict[str, Any] = {}
    for part in PARTS:
        rows: NDArray[np.int64] = getattr(split, part)
        columns = (comments.labels[rows, place] for place in range(len(comments.label_names)))
        parts[part] = {
            "rows": len(rows),
            "distinct_texts": comments.count_texts(rows),
            "labels": {
                name: {"positive": int((column == 1).sum()), "known": int((~np.isnan(column)).sum())}
                for name, column in zip(comments.label_names, columns, strict=True)
            },
        }
    used = comments.count_used(np.concatenate([getattr(split, part) for part in PARTS]))
    views = int((comments.source == VIEWS).sum())
    tables = [table for table in comments.tables if table.source != VIEWS]
    return {
        "text_column": comments.text_column,
        "label_names": list(comments.label_names),
        "rows": len(comments) - views,
        "views": views,
        "dropped_rows": {table.name: table.dropped for table in tables},
        "duplicate_texts": comments.duplicate_texts,
        "conflicting_texts": comments.conflicting_texts,
        "leaked_rows": dict(split.leaked),
        "near_duplicates": dict(split.near_duplicates),
        "tables": {table.name: {"rows": table.rows, "used": used[table.name]} for table in tables},
        "parts": parts,
    }
