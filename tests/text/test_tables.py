"""The delimiter of a .csv table is found and said, and no text decides it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.errors import InputError
from research.text.tables import DELIMITERS, SAMPLED_RECORDS, describe_delimiter, find_delimiter, read_rows

MARKS = "".join(DELIMITERS) + ' "\nক'


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_every_delimiter_is_found_and_said_where_it_is_no_comma(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "a.csv", *(delimiter.join(cells) for cells in (["text", "spam"], ["a, b", "0"], ["c; d", "1"])))
    path = path if delimiter not in ",;" else write(path, delimiter.join(["text", "spam"]), delimiter.join(["a", "1"]))
    assert find_delimiter(path) == delimiter
    said = describe_delimiter(path)
    assert said is None if delimiter == "," else DELIMITERS[delimiter] in str(said)
    assert [list(row) for _, row in read_rows(path)][0] == ["text", "spam"]


def test_only_csv_is_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "text;x\tspam", "a;b\t1")
    assert describe_delimiter(path) is None
    assert [row for _, row in read_rows(path)] == [{"text;x": "a;b", "spam": "1"}]


def test_texts_full_of_other_marks_do_not_part_a_table_with_commas(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,spam", *["a;b;c|d\te,1"] * 50)
    assert find_delimiter(path) == ","
    one_column = write(tmp_path / "b.csv", "text", *["a;b;c"] * 50)
    assert find_delimiter(one_column) == ","


def test_a_table_that_reads_well_with_commas_is_read_with_commas(tmp_path: Path) -> None:
    both = write(tmp_path / "a.csv", "text;x,spam", "a;b,1", "c;d,0")
    assert find_delimiter(both) == ","
    name_with_a_mark = write(tmp_path / "b.csv", "text; raw", "no mark here", "nor; here; one")
    assert find_delimiter(name_with_a_mark) == ","


def test_a_comma_in_the_header_of_another_delimiter_does_not_win(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text;bully, or not;spam", "one, two, three;0;1", "four;1;0")
    assert find_delimiter(path) == ";"
    quoted = write(tmp_path / "b.csv", '"text, raw";spam', '"a; b, c";1')
    assert find_delimiter(quoted) == ";"
    assert [row for _, row in read_rows(quoted)] == [{"text, raw": "a; b, c", "spam": "1"}]


def test_a_broken_row_is_told_by_the_delimiter_of_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text;spam", "a;1", "b;0;1", "c;0")
    with pytest.raises(InputError, match="line 3: 3 cells where the header has 2"):
        list(read_rows(path))
    late = write(tmp_path / "b.csv", "text;spam", *["a;1"] * SAMPLED_RECORDS, "b")
    with pytest.raises(InputError, match=f"line {SAMPLED_RECORDS + 2}: 1 cells"):
        list(read_rows(late))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(MARKS, min_size=1, max_size=8), st.sampled_from("01")), min_size=1, max_size=8),
    st.sampled_from(list(DELIMITERS)),
)
def test_any_texts_come_back_whatever_delimiter_they_were_written_with(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("tables") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("text", "spam"), *rows])
    assert [tuple(row.values()) for _, row in read_rows(path)] == rows
