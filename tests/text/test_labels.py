"""Labels as people write them: in words, in their own digits, and as lists in one column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.errors import InputError
from research.experiment.announce import describe_comments
from research.text.labels import find_columns, split_labels
from research_data import Comments, load_comments

NAN = float("nan")


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def load(path: Path, **arguments: Any) -> Comments:
    return load_comments(path, label_list_column="labels", **arguments)


def refusal(path: Path, **arguments: Any) -> str:
    """Return the message, of one line, that a table is refused with."""
    with pytest.raises(InputError) as caught:
        load_comments(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Columns of 0 and 1 in other spellings


@pytest.mark.parametrize(
    ("no", "yes", "spelling"),
    [
        ("no", "YES", "yes/no"),
        ("False", "true", "true/false"),
        ("০", "১", "Bengali digits"),
        ("०", "१", "Devanagari digits"),
        ("٠", "١", "Arabic-indic digits"),
    ],
)
def test_a_column_in_one_spelling_is_read_and_said(tmp_path: Path, no: str, yes: str, spelling: str) -> None:
    comments = load_comments(write(tmp_path / "a.csv", f"text,bully,spam\na,{no},{yes}\nb, {yes} ,\nc,{no},{no}\n"))
    np.testing.assert_array_equal(comments.labels, [[0, 1], [1, NAN], [0, 0]])
    lines = describe_comments(comments)
    assert f"{tmp_path / 'a.csv'}: {spelling} read as labels in bully, spam" in lines


def test_words_are_no_labels_unasked_beside_columns_of_0_and_1(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,spam,verified\na,0,yes\nb,1,no\n")
    columns = find_columns(path)
    assert columns.labels == ("spam",)
    assert str(columns.others["verified"]) == "holds only yes/no"
    named = load_comments(path, label_columns=["verified", "spam"])
    np.testing.assert_array_equal(named.labels, [[1, 0], [0, 1]])


def test_spellings_may_differ_from_column_to_column_and_from_table_to_table(tmp_path: Path) -> None:
    main = write(tmp_path / "a.csv", "text,bully,spam\na,no,১\nb,yes,০\n")
    test = write(tmp_path / "b.csv", "text,bully,spam\nc,1,true\n")
    comments = load_comments(main, test_path=test)
    np.testing.assert_array_equal(comments.labels, [[0, 1], [1, 0], [1, 1]])
    assert comments.tables[0].spellings == {"bully": "yes/no", "spam": "Bengali digits"}
    assert comments.tables[1].spellings == {"spam": "true/false"}


@pytest.mark.parametrize("named", [{}, {"label_columns": ["bully"]}])
def test_a_mixed_column_is_refused_with_counts(tmp_path: Path, named: dict[str, Any]) -> None:
    path = write(tmp_path / "a.csv", "text,bully\na,0\nb,yes\nc,1\nd,\ne,০\nf,1\n")
    message = refusal(path, **named)
    assert "'bully' is written in several ways" in message
    for part in (
        "0/1 in 3 cells (first on line 2)",
        "yes/no in 1 cell (first on line 3)",
        "Bengali digits in 1 cell (first on line 6)",
    ):
        assert part in message


def test_digits_of_two_scripts_are_a_mixture(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.csv", "text,bully\na,০\nb,१\n"))
    assert "Bengali digits in 1 cell" in message and "Devanagari digits in 1 cell" in message


@pytest.mark.parametrize("cell", ["maybe", "২", "০১", "yes no", "y", "৷", "½"])
def test_other_words_and_digits_are_no_labels(tmp_path: Path, cell: str) -> None:
    message = refusal(write(tmp_path / "a.csv", f"text,bully\na,yes\nb,{cell}\n"), label_columns=["bully"])
    assert "line 3" in message and repr(cell) in message and "not 0 or 1" in message


# Lists in one column


def test_the_labels_are_those_listed_in_order_of_code_points(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,labels\na,spam|bully\nb,\nc, threat | bully |\nd,spam\n")
    comments = load(path)
    assert comments.label_names == ("bully", "spam", "threat")
    np.testing.assert_array_equal(comments.labels, [[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]])
    assert any(line.startswith("labels that column 'labels' lists") for line in describe_comments(comments))


def test_an_empty_list_is_no_label_and_a_missing_one_unknown(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"labels": ["spam"]}, {"labels": []}, {"labels": ""}, {"labels": None}, {}]
    path = write_json(tmp_path / "a.jsonl", [{"text": f"text {n}", **row} for n, row in enumerate(rows)])
    np.testing.assert_array_equal(load(path).labels[:, 0], [1, 0, 0, NAN, NAN])


def test_parquet_and_excel_tell_empty_from_missing_as_far_as_they_can(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["a", "b", "c"], "labels": [["x", "y"], [], None]}), tmp_path / "a.parquet")
    np.testing.assert_array_equal(load(tmp_path / "a.parquet").labels, [[1, 1], [0, 0], [NAN, NAN]])
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed")
    book = openpyxl.Workbook()
    for row in (["text", "labels"], ["a", "x|y"], ["b", None]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    np.testing.assert_array_equal(load(tmp_path / "a.xlsx").labels, [[1, 1], [0, 0]])


@pytest.mark.parametrize(
    ("cell", "separator", "expected"),
    [
        ("a|b", "|", ["a", "b"]),
        ("a, b", ",", ["a", "b"]),
        ("a b  c", " ", ["a", "b", "c"]),
        ("a", "|", ["a"]),
        ("", "|", []),
        (" | ", "|", []),
        ('["a", "b|c"]', "|", ["a", "b|c"]),
        ("['a', \"it's\"]", "|", ["a", "it's"]),
        ("[]", "|", []),
        ("[3, 4]", "|", ["3", "4"]),
        (2, "|", ["2"]),
        (2.0, "|", ["2"]),
        (["e\u0301"], "|", ["\u00e9"]),
        (None, "|", None),
        (NAN, "|", None),
    ],
)
def test_a_cell_is_split_as_it_is_written(cell: Any, separator: str, expected: list[str] | None) -> None:
    assert split_labels(cell, separator) == expected


@pytest.mark.parametrize(
    "cell", ["['a' 'b']", "[a, b]", "[" * 5000 + "]", '[["a"]]', "[null]", True, 0.5, {"a": 1}, ["a", None], "a\0"]
)
def test_what_is_no_list_of_labels_is_refused_in_one_line(tmp_path: Path, cell: Any) -> None:
    rows = [{"text": "x", "labels": "b"}, {"text": "y", "labels": cell}]
    message = refusal(write_json(tmp_path / "a.jsonl", rows), label_list_column="labels")
    assert "line 2" in message and "'labels'" in message


def test_labels_that_the_main_table_lacks_are_named(tmp_path: Path) -> None:
    main = write(tmp_path / "a.csv", "text,labels\na,x\nb,y\n")
    other = write(tmp_path / "b.csv", "text,labels\nc,x|z\nd,w\ne,z\n")
    message = refusal(main, label_list_column="labels", val_path=other)
    assert message.startswith(str(other)) and "'z' (line 2), 'w' (line 3)" in message and "--label_columns" in message
    comments = load(main, val_path=other, label_columns=["z", "y", "x", "w"])
    assert comments.label_names == ("z", "y", "x", "w")
    np.testing.assert_array_equal(comments.labels[2:], [[1, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]])


def test_a_label_that_was_not_named_is_refused_and_not_dropped(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.csv", "text,labels\na,x\nb,y\n"), label_list_column="labels", label_columns=["x"])
    assert "'y' (line 3)" in message and "--label_columns" in message


@pytest.mark.parametrize(
    ("cells", "part"),
    [
        (["", ""], "no row lists a label"),
        (["0", "1"], "label itself"),
        (["a,b", "a"], "--label_separator"),
        (["a;b", "c"], "--label_separator"),
    ],
)
def test_what_is_hardly_a_list_of_labels_is_refused(tmp_path: Path, cells: list[str], part: str) -> None:
    rows = [{"text": f"text {n}", "labels": cell} for n, cell in enumerate(cells)]
    path = write_json(tmp_path / "a.jsonl", rows)
    assert part in refusal(path, label_list_column="labels")
    if cells[1] in ("a", "c"):  # a label with a comma is one where it is named
        assert load(path, label_columns=cells).label_names == tuple(cells)


def test_thousands_of_listed_labels_are_a_wrong_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,labels\n" + "".join(f"a,label {n}\n" for n in range(5002)))
    assert "more than 5000" in refusal(path, label_list_column="labels")


def test_the_list_is_a_column_of_every_labelled_table_and_not_the_text(tmp_path: Path) -> None:
    main = write(tmp_path / "a.csv", "text,labels\na,x\nb,y\n")
    other = write(tmp_path / "b.csv", "text,x,y\na,0,1\n")
    assert "no column 'labels'" in refusal(main, label_list_column="labels", test_path=other)
    assert "no column 'tags'" in refusal(main, label_list_column="tags")
    assert "both text and list" in refusal(main, label_list_column="text")
    unlabelled = load(main, unlabelled_path=write(tmp_path / "c.csv", "text\nc\n"))
    assert np.isnan(unlabelled.labels[2]).all()


def test_words_for_separators_stand_for_what_a_shell_would_lose(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.jsonl", [{"text": "a", "labels": "x y"}, {"text": "b", "labels": "y"}])
    np.testing.assert_array_equal(load(path, label_separator="space").labels, [[1, 1], [0, 1]])
    path = write_json(tmp_path / "b.jsonl", [{"text": "a", "labels": "x\ty"}, {"text": "b", "labels": "y"}])
    np.testing.assert_array_equal(load(path, label_separator="tab").labels, [[1, 1], [0, 1]])
