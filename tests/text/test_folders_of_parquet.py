"""A folder of Parquet files is the table of their rows, read as a stream."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.errors import InputError
from research.flags import find_missing
from research.text.tables import hash_table, read_columns, read_rows
from research_data import load_comments

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
TEXTS = [f"text number {number}" for number in range(30)]


def write(path: Path, texts: list[str | None], **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"text": texts, **columns}), path, row_group_size=4)
    return path


def write_folder(folder: Path) -> Path:
    """Write 30 rows as three files, whose order is that of their names, beside what no table is made of."""
    for name, start in (("part-2", 20), ("part-0", 0), ("part-1", 10)):
        numbers = list(range(start, start + 10))
        write(folder / f"{name}.parquet", list(TEXTS[start : start + 10]), number=numbers, spam=[n % 2 for n in numbers])
    for name in ("_SUCCESS", "_metadata.parquet", ".part-3.parquet.tmp", ".hidden.parquet"):
        (folder / name).write_text("no table")
    return folder


def test_rows_are_those_of_the_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts")
    assert read_columns(folder) == ("text", "number", "spam")
    rows = list(read_rows(folder))
    assert [row["text"] for _, row in rows] == TEXTS
    assert [line for line, _ in rows] == list(range(1, 31))
    assert next(read_rows(folder, ("text",))) == (1, {"text": TEXTS[0]})


def test_comments_of_a_folder_are_those_of_one_file(tmp_path: Path) -> None:
    one = write(tmp_path / "one.parquet", list(TEXTS), spam=[number % 2 for number in range(30)])
    folder = write_folder(tmp_path / "texts")
    whole, shards = (load_comments(path, label_columns=["spam"], unlabelled_path=path) for path in (one, folder))
    assert shards.text_sha256 == whole.text_sha256 and shards.labels_sha256 == whole.labels_sha256
    rows = np.arange(60)
    assert shards.find_source_rows(rows).tolist() == whole.find_source_rows(rows).tolist() == 2 * list(range(30))
    assert list(shards.iter_texts()) == list(whole.iter_texts()) == 2 * TEXTS


def test_hash_changes_with_any_file_and_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts")
    first = hash_table(folder)
    assert hash_table(write_folder(tmp_path / "again")) == first
    (folder / "part-2.parquet").rename(folder / "part-3.parquet")
    second = hash_table(folder)
    write(folder / "part-1.parquet", ["another"], number=[1], spam=[0])
    assert len({first, second, hash_table(folder)}) == 3


def test_changed_file_is_noticed_when_the_texts_are_read_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts")
    comments = load_comments(folder, label_columns=["spam"])
    write(folder / "part-1.parquet", ["another"] * 10, number=[1] * 10, spam=[0] * 10)
    with pytest.raises(InputError, match="changed since it was read"):
        list(comments.iter_texts())


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts")
    write(folder / "part-1.parquet", ["a"], other=[1])
    with pytest.raises(
        InputError, match=re.escape(f"{folder / 'part-1.parquet'}: has the columns text, other, and part-0.parquet")
    ):
        list(read_rows(folder))
    (folder / "part-1.parquet").write_text("no table")
    with pytest.raises(InputError, match=re.escape(f"{folder / 'part-1.parquet'}: not a Parquet file")):
        list(read_rows(folder))


def test_label_that_is_none_is_found_by_its_row_in_all_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts")
    with pytest.raises(InputError, match=re.escape(f"{folder}, row 3: label 'number' is 2, not 0 or 1")):
        load_comments(folder, label_columns=["number"])


def test_folder_without_such_files_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    assert find_missing(str(write_folder(tmp_path / "texts")), "table") is None
    (tmp_path / "empty").mkdir()
    assert "is a folder without .parquet files" in str(find_missing(str(tmp_path / "empty"), "table"))
    with pytest.raises(InputError, match=r"is a folder without \.parquet files"):
        next(read_rows(tmp_path / "empty"))
