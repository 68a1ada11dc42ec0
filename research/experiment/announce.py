"""What is said of a run's tables before anything is computed: columns, labels, rows and parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from research.errors import escape_controls
from research.text.labels import DEFAULT_LABELS
from research_data import MAIN, PARTS, UNLABELLED, Comments, Split, Table

# More labels or columns than these would hide the lines around theirs.
MOST_NAMED = 20


def describe_comments(comments: Comments) -> list[str]:
    """Return what was read: rows, how a table is written where that is unusual, labels, and how they were chosen unasked."""
    main = comments.tables[0]
    of_main = comments.text_hash[comments.source == MAIN]
    texts = count(len(np.unique(of_main)), "distinct text")
    rows = f"{main.path}: {count(len(of_main), 'row')}, {texts} in column '{comments.text_column}'"
    if comments.dropped:
        rows += f"; left out: {count(comments.dropped, 'row')} without a text"
    if comments.conflicting_texts:
        rows += f"; with a 0 and a 1 for one label: {count(comments.conflicting_texts, 'text')}"
    lines = (rows, *map(_describe_writing, comments.tables), _describe_labels(comments), _describe_columns(comments))
    return [escape_controls(line) for line in lines if line]


def _describe_writing(table: Table) -> str | None:
    """Say how a table is written where that is not with commas, 0 and 1."""
    labels_of: dict[str, list[str]] = {}
    for label, spelling in table.spellings.items():
        labels_of.setdefault(spelling, []).append(label)
    notes = [f"{spelling} read as labels in {join_names(labels)}" for spelling, labels in labels_of.items()]
    notes = notes if table.delimiter is None else [table.delimiter, *notes]
    return f"{table.path}: {'; '.join(notes)}" if notes else None


def _describe_labels(comments: Comments) -> str:
    labels = comments.labels[comments.source != UNLABELLED]
    known = ~np.isnan(labels)
    shares = []
    for name, positives, of_label in zip(comments.label_names, (labels == 1).sum(axis=0), known.T, strict=True):
        share = f"{name} {_percent(positives, of_label.sum())}"
        unknown = len(of_label) - of_label.sum()
        shares.append(share + (f" ({_percent(unknown, len(of_label))} unknown)" if unknown else ""))
    listed = comments.columns.label_list
    what = "labels" if listed is None else f"labels that column '{listed.column}' lists"
    return f"{what}, with their share of positives: {join_names(shares)}"


def _describe_columns(comments: Comments) -> str | None:
    others = comments.columns.others
    if not others:
        return None
    known = comments.label_names == DEFAULT_LABELS
    held = "one spelling of no and yes" if comments.tables[0].spellings else "0, 1"
    chosen = "the five known ones" if known else f"every column that holds only {held} and empty cells"
    left = join_names([f"{name} ({reason or 'holds only 0 and 1'})" for name, reason in others.items()])
    return f"label columns: {chosen}; left: {left}. --label_columns names others."


def warn_of_columns(comments: Comments) -> str | None:
    """Name the columns that look like labels beside the five known ones, which are taken without them."""
    unused = [name for name, reason in comments.columns.others.items() if reason is None]
    if not unused:
        return None
    return escape_controls(
        f"{join_names(unused)} also hold{'s' if len(unused) == 1 else ''} only 0 and 1, but no label is made of it, since "
        f"{', '.join(comments.label_names)} are there; name every label in --label_columns to have it"
    )


def describe_parts(comments: Comments, split: Split) -> list[str]:
    """Return a line with each part's rows and distinct texts, and what there is to say of rows left out or nearly repeated."""
    parts = {part: getattr(split, part) for part in PARTS}
    counts = [f"{part} {len(rows):,} ({comments.count_texts(rows):,})" for part, rows in parts.items() if len(rows)]
    lines = [f"rows (distinct texts) of each part: {', '.join(counts)}"]
    leaked = [f"{count:,} of {part}" for part, count in split.leaked.items() if count]
    if leaked:
        lines.append(f"left out, since their texts also stand in a part that is held out: {', '.join(leaked)}")
    near = split.near_duplicates
    if near.get("unlabelled"):
        lines.append(f"left out, since their texts nearly equal one that is held out: {near['unlabelled']:,} of unlabelled")
    if near.get("train"):
        lines.append(f"kept, though their texts nearly equal one of test: {near['train']:,} of train")
    used = comments.count_used(split.unlabelled)
    further = [f"{table.path} {used[table.name]:,} of {table.rows:,}" for table in comments.tables if table.source == UNLABELLED]
    if further:
        lines.append(f"unlabelled rows used of each table: {', '.join(further)}")
    return [escape_controls(line) for line in lines]


def count(number: int, noun: str) -> str:
    """Return a number of things, as in "1 row" and "10,041 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else "no known cell"


def join_names(names: Sequence[str]) -> str:
    """Return names with commas between, of many the first ones and how many more there are."""
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
