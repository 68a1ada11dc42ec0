"""Flags of the tables, of their columns, and of the parts that rows are put in."""

from __future__ import annotations

from dataclasses import dataclass

from research.flags import between, setting


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
    unlabelled_path: str | None = setting(
        None,
        "data",
        "table of further texts without labels, for the soft, hidden and attention losses",
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
