"""Flags of the tables, of their columns, and of the parts that rows are put in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from research.errors import quote_value
from research.flags import between, setting

# Separators that a shell or a reader would lose.
SEPARATOR_NAMES = {"tab": "\t", "space": " "}


@dataclass(frozen=True)
class DataSettings:
    """Which rows a run has, and what of their texts reaches the models."""

    dataset_path: str = setting(
        "data/comments.csv",
        "data",
        "table of comments: .csv, .tsv, .jsonl, .xlsx (needs openpyxl), .parquet (needs pyarrow) or a folder of .parquet files",
        decides="data",
        kind="table",
        rows="main",
    )
    text_column: str | None = setting(
        None, "data", "column holding the text (default: found by its name)", decides="data", kind="column"
    )
    label_columns: tuple[str, ...] | None = setting(
        None,
        "data",
        "columns holding the 0/1 labels (default: bully sexual religious threat spam when all are present, "
        "else every other column that holds only 0 and 1)",
        decides="data",
        kind="column",
    )
    label_list_column: str | None = setting(
        None,
        "data",
        "instead of columns of 0 and 1: a column that lists the labels of each row, also one label alone or a list of JSON; the "
        "labels are those found there, sorted, or those named in --label_columns",
        decides="data",
        metavar="NAME",
        keyed_at_default=False,
    )
    label_separator: str = setting(
        "|",
        "data",
        "what stands between the labels in a cell of --label_list_column; tab and space by these words",
        decides="data",
        keyed_at_default=False,
    )
    unlabelled_path: str | tuple[str, ...] | None = setting(
        None,
        "data",
        "tables of further texts without labels, for the soft, hidden and attention losses; those that equal or nearly equal a "
        "validation or test text are left out",
        decides="distillation",
        kind="table",
        rows="unlabelled",
    )
    val_fraction: float = setting(
        0.1, "data", "share of the texts for validation, 0 to 0.9", check=between(0, 0.9, open_low=True), decides="data"
    )
    test_fraction: float = setting(
        0.1, "data", "share of the texts for the test part, 0 to 0.9", check=between(0, 0.9, open_low=True), decides="data"
    )
    val_path: str | None = setting(
        None, "data", "a table of its own for validation, instead of a share", decides="data", kind="table", rows="validation"
    )
    test_path: str | None = setting(
        None, "data", "a table of its own for the test part, instead of a share", decides="data", kind="table", rows="test"
    )
    data_fraction: float = setting(
        1.0,
        "data",
        "share of the training texts to use, 0 to 1; validation and test stay whole",
        check=between(0, 1, open_low=True),
        decides="data",
    )
    max_length: int = setting(128, "data", "longest text in tokens, special tokens included", check=between(4), decides="tokens")
    text_normalization: str = setting(
        "nfc", "data", "Unicode normalisation of the texts", choices=("none", "nfc", "nfkc"), decides=("data", "tokens")
    )


def check_data_flags(config: Any) -> list[str]:
    """Return the problems with the data flags that show without reading a table."""
    problems = []
    columns = config.label_columns
    if columns == ():
        problems.append("--label_columns: names no column; leave it out to have the columns found")
    elif columns is not None and len(set(columns)) < len(columns):
        problems.append(f"--label_columns: a column is named twice in {quote_value(' '.join(columns))}")
    if config.label_list_column is None and config.text_column is not None and config.text_column in (columns or ()):
        problems.append(f"--text_column: {quote_value(config.text_column)} is also one of --label_columns")
    if config.label_list_column is None and config.label_separator != DataSettings.label_separator:
        problems.append("--label_separator: stands between the labels of --label_list_column, which is not given")
    if config.label_list_column is not None and config.label_list_column == config.text_column:
        problems.append(f"--label_list_column: {quote_value(config.label_list_column)} is also --text_column")
    if config.num_folds > 1 and config.test_path:
        problems.append("--num_folds: folds make their own test parts; drop --test_path")
    shares = (0 if config.val_path else config.val_fraction) + (0 if config.test_path else config.test_fraction)
    if shares >= 1:
        problems.append(f"--val_fraction: must be under 1 together with --test_fraction, got {shares:g}")
    return problems
