"""Claims about research_data: faults name their place, texts stream unchanged, splits do not leak."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from support.strategies import TABLE_BYTES

import research_data as data
from research.errors import InputError
from research.text import tables
from research.text.labels import DEFAULT_LABELS, MOST_LABELS_FOUND, find_columns

PROJECT = Path(data.__file__).resolve().parent
REAL_DATA = PROJECT.parent / "shared" / "data"
HEADER = "text,bully,sexual,religious,threat,spam\n"


def real_table(name: str) -> Path:
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not at {REAL_DATA}")
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path: Path, texts: list[str], labels: np.ndarray) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *DEFAULT_LABELS])
        writer.writerows([text, *row] for text, row in zip(texts, labels.tolist(), strict=True))
    return path


def make_table(path: Path, rows: int, *, start: int = 0) -> Path:
    labels = (np.random.default_rng(start).random((rows, 5)) < [0.6, 0.2, 0.1, 0.1, 0.3]).astype(int)
    return write_rows(path, [f"comment {start + index}" for index in range(rows)], labels)


def split(comments: data.Comments, **changes) -> data.Split:
    arguments = {"val_fraction": 0.1, "test_fraction": 0.1, "seed": 42, **changes}
    return data.split_comments(comments, **arguments)


def fault(path: Path, *places: str, **arguments) -> str:
    """Load a faulty table; check that the message is one line, names the file and each place."""
    with pytest.raises(InputError) as caught:
        data.load_comments(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for place in places:
        assert place in message
    return message


# Faults in a table


def test_missing_file_is_named(tmp_path):
    fault(tmp_path / "none.csv", "no such file")


def test_folder_is_refused(tmp_path):
    fault(tmp_path, "is a folder")


def test_unknown_extension_lists_the_known_ones(tmp_path):
    fault(write(tmp_path / "a.xls", "x"), "'.xls'", ".csv, .tsv, .jsonl")


def test_empty_file_is_refused(tmp_path):
    fault(write(tmp_path / "a.csv", ""), "empty")


def test_file_of_blank_lines_has_no_header(tmp_path):
    fault(write(tmp_path / "a.csv", "\n\n"), "no header")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_header_alone_holds_no_data(tmp_path, name):
    fault(write(tmp_path / name, HEADER), "no data rows")


def test_broken_utf8_names_its_physical_line(tmp_path):
    content = HEADER.encode() + b'"two\nlines",0,0,0,0,0\nok,0,0,0,0,0\nbad \xff,0,0,0,0,0\n'
    fault(write(tmp_path / "a.csv", content), "line 5", "0xff", "UTF-8")


def test_utf16_is_recognised(tmp_path):
    fault(write(tmp_path / "a.csv", (HEADER + "a,0,0,0,0,0\n").encode("utf-16")), "line 1", "UTF-16")


@pytest.mark.parametrize(("row", "cells"), [("b,0,0\n", "3 cells"), ("b,0,0,0,0,0,7\n", "7 cells")])
def test_wrong_number_of_cells_names_the_line(tmp_path, row, cells):
    fault(write(tmp_path / "a.csv", HEADER + '"two\nlines",0,0,0,0,0\n' + row), "line 4", cells)


def test_duplicate_column_is_named(tmp_path):
    fault(write(tmp_path / "a.csv", "text,spam,spam\na,0,1\n"), "'spam'", "twice")


def test_two_columns_without_a_name_are_refused(tmp_path):
    fault(write(tmp_path / "a.csv", "text,spam,,\na,0,,\n"), "no name")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('"open,0,0,0,0,0\n', "never closed"),
        ('"a"b,0,0,0,0,0\n', "quoting"),
        ("a\rb,0,0,0,0,0\n", "carriage"),
    ],
)
def test_bad_quoting_names_the_line_the_row_starts_on(tmp_path, row, reason):
    fault(write(tmp_path / "a.csv", HEADER + "a,0,0,0,0,0\n" + row), "line 3", reason)


def test_too_large_cell_names_the_line(tmp_path):
    row = "x" * (csv.field_size_limit() + 1) + ",0,0,0,0,0\n"
    fault(write(tmp_path / "a.csv", HEADER + row), "line 2", "131,072")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "list"),
        ("{", "JSON"),
        ("3", "int"),
        ('{"text": "a", "text": "b"}', "'text'"),
        ("[" * 100_000, "nested"),
        ("1" * 5000, "JSON"),
    ],
)
def test_bad_json_names_the_line(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "spam": 0}\n\n' + line + "\n")
    fault(path, "line 3", reason)


@pytest.mark.parametrize("cell", ["2", "0.5", "maybe", "-1", "nan"])
def test_label_that_is_not_binary_names_line_column_and_value(tmp_path, cell):
    path = write(tmp_path / "a.csv", HEADER + f"a,0,0,0,0,0\nb,0,0,0,{cell},0\n")
    message = fault(path, "line 3", "'threat'", repr(cell))
    assert ("Binarise" in message) == (cell == "0.5")


def test_json_text_that_is_a_list_names_the_line(tmp_path):
    fault(write(tmp_path / "a.jsonl", '{"text": ["a"], "spam": 0}\n'), "line 1", "'text'", "list")


def test_table_without_any_text_is_refused(tmp_path):
    fault(write(tmp_path / "a.csv", HEADER + " ,0,0,0,0,0\n"), "all 1 texts")


def test_fault_in_the_test_table_names_that_table(tmp_path):
    main = make_table(tmp_path / "main.csv", 20)
    with pytest.raises(InputError, match=r"test\.csv: no column 'bully'; found text, spam"):
        data.load_comments(main, test_path=write(tmp_path / "test.csv", "text,spam\na,0\n"))


@pytest.mark.parametrize(("suffix", "package"), [(".xlsx", "openpyxl"), (".parquet", "pyarrow")])
def test_missing_package_is_named(tmp_path, monkeypatch, suffix, package):
    for module in ("openpyxl", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    fault(write(tmp_path / f"a{suffix}", "x"), f"pip install {package}")


# Columns


def test_missing_columns_list_those_found(tmp_path):
    path = write(tmp_path / "a.csv", "text,spam\na,0\n")
    fault(path, "'body'", "found text, spam", text_column="body")
    fault(path, "'threat'", "found text, spam", label_columns=["threat"])


def test_label_named_twice_or_equal_to_the_text_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", "text,spam\na,0\n")
    fault(path, "'spam'", "twice", label_columns=["spam", "spam"])
    fault(path, "both text and label", label_columns=["text"])


def test_no_label_column_is_an_error(tmp_path):
    fault(write(tmp_path / "a.csv", "text,name\na,b\n"), "no label column", "name")


def test_no_text_column_is_an_error_and_a_wrong_delimiter_is_suspected(tmp_path):
    fault(write(tmp_path / "a.csv", "words,spam\na,0\n"), "no text column", "--text_column")
    fault(write(tmp_path / "b.csv", "text;spam\na;0;1\n"), "Separate the cells alike in every row")
    fault(write(tmp_path / "b.tsv", "text;spam\na;0\n"), "in .tsv by tabs")


def test_text_column_is_found_in_any_case(tmp_path):
    path = write(tmp_path / "a.csv", "Id,Tweet,spam\n7,a,0\n8,b,1\n")
    columns = find_columns(path)
    assert (columns.text, columns.labels) == ("Tweet", ("spam",))


def test_column_without_values_or_name_is_no_label(tmp_path):
    path = write(tmp_path / "a.csv", ",text,none,half,spam\n0,a,,0,0.0\n1,b,,,1.0\n")
    assert find_columns(path).labels == ("half", "spam")


def test_default_labels_win_over_other_binary_columns(tmp_path):
    path = write(tmp_path / "a.csv", "is_female,spam,threat,religious,sexual,bully,text\n1,0,0,0,0,1,a\n")
    columns = find_columns(path)
    assert columns.labels == DEFAULT_LABELS
    assert columns.others == {"is_female": None}


def test_column_that_is_no_label_is_named_with_its_first_other_cell(tmp_path):
    content = "Gender,text,hate,likes,score,nothing\n,a,0,1,0,\n,b,1,0,1,\nfemale,c,1,0,7,\n"
    columns = find_columns(write(tmp_path / "a.csv", content))
    assert columns.labels == ("hate", "likes")
    assert {name: str(reason) for name, reason in columns.others.items()} == {
        "Gender": "is 'female' on line 4", "score": "is '7' on line 4", "nothing": "is empty",
    }  # fmt: skip
    assert find_columns(tmp_path / "a.csv", label_columns=["hate"]).others == {}


@pytest.mark.parametrize("header", ["text,bully", "text,bully,bully"])
def test_table_of_60000_columns_is_read_at_once(tmp_path, header):
    """Each name was looked for among all others, which took minutes."""
    more = [f"c{number}" for number in range(60_000)]
    path = write(tmp_path / "a.csv", "".join(",".join([row, *cells]) + "\n" for row, cells in (
        (header, more), ("a" + ",0" * header.count(","), ["x"] * 60_000), ("b" + ",1" * header.count(","), ["x"] * 60_000)
    )))  # fmt: skip
    started = time.monotonic()
    if header.endswith(",bully,bully"):
        fault(path, "'bully' stands twice")
    else:
        assert data.load_comments(path).label_names == ("bully",)
        fault(path, "'hate'", "and 59982 more", label_columns=["hate"])
    assert time.monotonic() - started < 5


def test_thousands_of_binary_columns_are_no_labels_unless_they_are_named(tmp_path):
    names = [f"c{number}" for number in range(MOST_LABELS_FOUND + 1)]
    path = write(tmp_path / "a.csv", f"text,{','.join(names)}\na{',0' * len(names)}\nb{',1' * len(names)}\n")
    fault(path, "5001 columns hold only 0 and 1", "--label_columns")
    assert find_columns(path, label_columns=names).labels == tuple(names)


def test_key_that_only_a_later_json_line_has_is_a_column(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "spam": 1}\n{"text": "b", "troll": 1}\n')
    comments = data.load_comments(path)
    assert comments.label_names == ("spam", "troll")
    np.testing.assert_array_equal(comments.labels, [[1, np.nan], [np.nan, 1]])


# Cells and texts


def test_every_spelling_of_a_label_is_read(tmp_path):
    cells = [0, 1, 0.0, 1.0, True, False, None, "0", "1", "0.0", " 1.0 ", ""]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": "a", "spam": c}) + "\n" for c in cells))
    nan = np.nan
    expected = [0, 1, 0, 1, 1, 0, nan, 0, 1, 0, 1, nan]
    np.testing.assert_array_equal(data.load_comments(path).labels[:, 0], expected)


def test_rows_without_text_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + "a,0,0,0,0,0\n  ,1,1,1,1,1\n,0,0,0,0,0\nb,1,0,0,0,0\n")
    comments = data.load_comments(path)
    assert comments.dropped == 2
    assert comments.find_source_rows(np.arange(2)).tolist() == [0, 3]
    assert list(comments.iter_texts()) == ["a", "b"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_every_row_knows_its_place_in_its_table_whatever_was_dropped_before_it(tmp_path, share):
    draw, paths, expected = random.Random(1), [], []
    for number in range(4):
        empty = [row > 0 and draw.random() < share for row in range(50)]
        texts = ["" if dropped else f"comment {number} {row}" for row, dropped in enumerate(empty)]
        paths.append(write(tmp_path / f"{number}.csv", HEADER + "".join(f"{text},0,1,0,0,0\n" for text in texts)))
        expected += [row for row, dropped in enumerate(empty) if not dropped]
    comments = data.load_comments(paths[0], test_path=paths[1], unlabelled_path=paths[2:])
    assert comments.find_source_rows(np.arange(len(comments))).tolist() == expected
    some = np.array([len(comments) - 1, 0, 2])
    assert comments.find_source_rows(some).tolist() == [expected[row] for row in some]


def test_distinct_texts_of_some_rows_are_counted(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + "".join(f"{text},0,0,0,0,0\n" for text in "abacab"))
    comments = data.load_comments(path)
    for rows in ([], [0], [0, 2], [1, 3, 5], list(range(6))):
        assert comments.count_texts(np.array(rows, dtype=np.int64)) == len({"abacab"[row] for row in rows})


def test_line_breaks_quotes_and_nul_inside_a_text_survive(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + '"one\n\n""two"", three\0",0,0,0,0,0\n')
    assert list(data.load_comments(path).iter_texts()) == ['one\n\n"two", three\0']


def test_byte_order_mark_changes_nothing(tmp_path):
    content = (HEADER + "ক,0,0,0,0,1\n").encode()
    plain = data.load_comments(write(tmp_path / "a.csv", content))
    marked = data.load_comments(write(tmp_path / "b.csv", b"\xef\xbb\xbf" + content))
    assert (plain.text_sha256, plain.labels_sha256) == (marked.text_sha256, marked.labels_sha256)


def test_jsonl_and_tsv_equal_csv(tmp_path):
    texts = ["one\ntwo", 'say "no"', "a, b", "খ"]
    labels = np.array([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    paths = [write_rows(tmp_path / "a.csv", texts, labels)]
    rows = [{"text": t, **dict(zip(DEFAULT_LABELS, row.tolist(), strict=True))} for t, row in zip(texts, labels, strict=True)]
    paths.append(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    with (tmp_path / "a.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    paths.append(tmp_path / "a.tsv")
    loaded = [data.load_comments(path) for path in paths]
    assert len({(c.text_sha256, c.labels_sha256) for c in loaded}) == 1
    assert [list(c.iter_texts()) for c in loaded] == [texts] * 3


def test_excel_equals_csv(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["text", "spam", None], ["a\nb", 1], [None, None], ["c", None]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    comments = data.load_comments(tmp_path / "a.xlsx")
    assert list(comments.iter_texts()) == ["a\nb", "c"]
    np.testing.assert_array_equal(comments.labels, [[1], [np.nan]])
    fault(write(tmp_path / "b.xlsx", "no zip"), "not an .xlsx")


def test_parquet_equals_csv(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["a\nb", "c"], "spam": [1.0, None]}), tmp_path / "a.parquet")
    comments = data.load_comments(tmp_path / "a.parquet")
    assert list(comments.iter_texts()) == ["a\nb", "c"]
    np.testing.assert_array_equal(comments.labels, [[1], [np.nan]])
    fault(write(tmp_path / "b.parquet", "no parquet"), "not a Parquet")


def test_normalization_composes_and_half_a_surrogate_pair_can_be_encoded():
    assert tables.clean_text(" e\u0301 ", "nfc") == "\u00e9"
    assert tables.clean_text("e\u0301", "none") == "e\u0301"
    assert tables.clean_text("\ufb01", "nfkc") == "fi"
    assert tables.clean_text("cut \ud83d", "nfc") == "cut \ufffd"


def test_texts_equal_after_normalization_are_one_text(tmp_path):
    path = write(tmp_path / "a.csv", "text,spam\ne\u0301,1\n\u00e9 ,0\n")
    nfc = data.load_comments(path)
    assert (nfc.duplicate_texts, nfc.conflicting_texts) == (1, 1)
    assert data.load_comments(path, text_normalization="none").duplicate_texts == 0


@pytest.mark.parametrize("content", ["a,0,0,0,0,0\nX,0,0,0,0,0\n", "a,0,0,0,0,0\n", "a,0,0,0,0,0\n" * 3])
def test_changed_table_stops_the_second_reading(tmp_path, content):
    path = write(tmp_path / "a.csv", HEADER + "a,0,0,0,0,0\nb,0,0,0,0,0\n")
    comments = data.load_comments(path)
    write(path, HEADER + content)
    with pytest.raises(InputError, match=r"a\.csv: changed since"):
        list(comments.iter_texts())


def test_digests_tell_texts_and_labels_apart(tmp_path):
    first = data.load_comments(write(tmp_path / "a.csv", "text,spam\nab,0\nc,1\n"))
    other_labels = data.load_comments(write(tmp_path / "b.csv", "text,spam\nab,1\nc,1\n"))
    moved_character = data.load_comments(write(tmp_path / "c.csv", "text,spam\na,0\nbc,1\n"))
    assert first.text_sha256 == other_labels.text_sha256 != moved_character.text_sha256
    assert first.labels_sha256 == moved_character.labels_sha256 != other_labels.labels_sha256
    assert first.file_sha256 != other_labels.file_sha256


# Splits


@pytest.fixture
def repeated(tmp_path) -> data.Comments:
    """300 texts, every third of them in three rows, the last of which has other labels."""
    rng = np.random.default_rng(0)
    numbers = np.concatenate([np.arange(300), np.arange(0, 300, 3), np.arange(0, 300, 3)])
    labels = (rng.random((len(numbers), 5)) < 0.3).astype(int)
    return data.load_comments(write_rows(tmp_path / "a.csv", [f"text {n}" for n in numbers], labels))


def texts_of(comments: data.Comments, rows: np.ndarray) -> set[int]:
    return set(comments.text_hash[rows].tolist())


def test_split_uses_every_row_once_and_no_text_twice(repeated):
    parts = split(repeated)
    rows = np.concatenate([parts.train, parts.validation, parts.test])
    assert sorted(rows.tolist()) == list(range(len(repeated)))
    texts = [texts_of(repeated, part) for part in (parts.train, parts.validation, parts.test)]
    assert len(set.union(*texts)) == sum(map(len, texts)) == 300
    assert len(texts[1]) == pytest.approx(30, abs=3)
    assert len(texts[2]) == pytest.approx(30, abs=3)


def test_same_seed_gives_the_same_split_and_another_seed_another(repeated):
    first, same, other = split(repeated), split(repeated), split(repeated, seed=43)
    np.testing.assert_array_equal(first.test, same.test)
    np.testing.assert_array_equal(first.train, same.train)
    assert first.test.tolist() != other.test.tolist()


def test_order_of_the_rows_does_not_change_the_split(tmp_path):
    path = make_table(tmp_path / "a.csv", 100)
    comments = data.load_comments(path)
    header, *lines = path.read_text().splitlines(keepends=True)
    turned = data.load_comments(write(tmp_path / "b.csv", header + "".join(reversed(lines))))
    assert texts_of(comments, split(comments).test) == texts_of(turned, split(turned).test)


def test_data_fraction_thins_training_only(repeated):
    whole, half = split(repeated), split(repeated, data_fraction=0.5)
    np.testing.assert_array_equal(whole.test, half.test)
    np.testing.assert_array_equal(whole.validation, half.validation)
    assert set(half.train.tolist()) < set(whole.train.tolist())
    assert len(texts_of(repeated, half.train)) == pytest.approx(120, abs=4)


def test_folds_partition_the_texts(repeated):
    folds = [split(repeated, fold=fold, num_folds=4) for fold in range(4)]
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(len(repeated)))
    for fold in folds:
        parts = [texts_of(repeated, part) for part in (fold.train, fold.validation, fold.test)]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 300
        assert len(parts[1]) == pytest.approx(30, abs=3)


def test_given_tables_are_whole_parts_and_their_texts_leave_training(tmp_path):
    main = make_table(tmp_path / "main.csv", 50)
    validation = make_table(tmp_path / "validation.csv", 10, start=45)
    test = make_table(tmp_path / "test.csv", 10, start=54)
    unlabelled = write(tmp_path / "more.csv", "post\ncomment 3\ncomment 54\nnew\n")
    comments = data.load_comments(main, val_path=validation, test_path=test, unlabelled_path=unlabelled)
    parts = split(comments)
    assert comments.source[parts.test].tolist() == [data.TEST] * 10
    assert comments.find_source_rows(parts.validation).tolist() == list(range(9))
    assert comments.find_source_rows(parts.train).tolist() == list(range(45))
    assert comments.find_source_rows(parts.unlabelled).tolist() == [0, 2]
    assert np.isnan(comments.labels[parts.unlabelled]).all()
    assert parts.leaked == {"train": 5, "validation": 1, "unlabelled": 1}


def test_several_unlabelled_tables_are_read_one_after_the_other_and_counted_each(tmp_path):
    main = make_table(tmp_path / "main.csv", 50)
    further = [write(tmp_path / "a.csv", 'text\nnew 1\ncomment 3\n""\n'), write(tmp_path / "b.tsv", "post\tx\nnew 2\t1\n")]
    comments = data.load_comments(main, unlabelled_path=further)
    assert [table.name for table in comments.tables] == ["main", "unlabelled", "unlabelled_2"]
    assert list(comments.iter_texts())[50:] == ["new 1", "comment 3", "new 2"]
    assert comments.source[50:].tolist() == [data.UNLABELLED] * 3
    assert comments.file_sha256["unlabelled_2"] == hashlib.sha256(further[1].read_bytes()).hexdigest()
    one = data.load_comments(main, unlabelled_path=further[:1])
    assert one.text_sha256 == data.load_comments(main, unlabelled_path=further[0]).text_sha256 != comments.text_sha256
    summary = data.summarize_data(comments, split(comments))
    assert summary["dropped_rows"] == {"main": 0, "unlabelled": 1, "unlabelled_2": 0}
    assert summary["tables"]["unlabelled_2"] == {"rows": 1, "used": 1}
    assert summary["tables"]["unlabelled"]["rows"] == 3
    assert summary["tables"]["main"]["used"] == 50
    further[1].write_text("post\tx\nother\t1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"b\.tsv: changed since it was read"):
        list(comments.iter_texts())


def test_unlabelled_texts_do_not_change_the_split(tmp_path):
    main = make_table(tmp_path / "main.csv", 50)
    plain = split(data.load_comments(main))
    more = split(data.load_comments(main, unlabelled_path=make_table(tmp_path / "more.csv", 30, start=40)))
    np.testing.assert_array_equal(plain.train, more.train)
    np.testing.assert_array_equal(plain.test, more.test)


def test_too_few_texts_name_the_counts(tmp_path):
    comments = data.load_comments(make_table(tmp_path / "a.csv", 2))
    with pytest.raises(InputError, match=r"a\.csv: 2 distinct texts give .* training, .* validation and .* test"):
        split(comments)
    with pytest.raises(InputError, match="2 distinct texts for 3 folds"):
        split(comments, fold=0, num_folds=3)
    with pytest.raises(InputError, match="leave no texts to train on"):
        split(comments, fold=0, num_folds=2, val_fraction=0.5)


def test_test_table_that_holds_every_training_text_is_refused(tmp_path):
    main = make_table(tmp_path / "a.csv", 10)
    with pytest.raises(InputError, match="every text also stands in"):
        split(data.load_comments(main, test_path=main))


def test_one_label_can_be_split(tmp_path):
    content = "text,spam\n" + "".join(f"t{n},{n % 2}\n" for n in range(100))
    comments = data.load_comments(write(tmp_path / "a.csv", content))
    parts = split(comments)
    assert comments.labels[parts.test].mean() == pytest.approx(0.5, abs=0.1)


# Statistics


def test_class_weight_is_negatives_over_positives_of_known_cells():
    nan = np.nan
    labels = np.array([[1, 0, 1, nan], [0, 0, 1, nan], [0, nan, 1, nan], [nan, 0, 1, nan]], np.float32)
    weights, warnings = data.compute_class_weights(labels, ["a", "b", "c", "d"])
    assert weights.dtype == np.float32
    assert weights.tolist() == [2, 1, 1, 1]
    assert [warning.split(";")[0] for warning in warnings] == [
        "label 'b' has no positive row to train on",
        "label 'c' has no negative row to train on",
        "label 'd' has no positive row to train on",
    ]


def test_description_counts_rows_texts_and_labels(repeated):
    parts = split(repeated)
    summary = data.summarize_data(repeated, parts)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["parts"]["train"]["rows"] == len(parts.train)
    assert sum(summary["parts"][name]["distinct_texts"] for name in ("train", "validation", "test")) == 300
    positive = sum(summary["parts"][name]["labels"]["spam"]["positive"] for name in ("train", "validation", "test"))
    assert positive == int(repeated.labels[:, 4].sum())
    assert summary["parts"]["unlabelled"]["rows"] == 0


def test_reading_tables_imports_no_model_library():
    code = "import sys, research_data; print({'torch', 'transformers', 'sklearn'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# Real data


def test_bn_cyberbully5_keeps_its_counts_and_splits_alike():
    path = real_table("bn_cyberbully5.csv")
    comments = data.load_comments(path, text_normalization="none")
    assert len(comments) == 12_546
    assert len(np.unique(comments.text_hash)) == 10_206
    assert (comments.duplicate_texts, comments.conflicting_texts) == (2_340, 367)
    assert comments.label_names == DEFAULT_LABELS
    assert np.nansum(comments.labels, axis=0).tolist() == [8052, 2059, 1607, 1422, 1089]
    assert sum("\n" in text for text in comments.iter_texts()) >= 300
    parts = split(comments)
    texts = [texts_of(comments, part) for part in (parts.train, parts.validation, parts.test)]
    assert len(set.union(*texts)) == sum(map(len, texts)) == 10_206
    for part in (parts.train, parts.validation, parts.test):
        difference = comments.labels[part].mean(axis=0) - comments.labels.mean(axis=0)
        assert np.abs(difference).max() < 0.015


def test_gender_and_profession_are_no_labels():
    path = real_table("bn_cyberbully5.csv")
    assert set(find_columns(path).others) == {"Gender", "Profession"}
    assert None not in find_columns(path).others.values()


@pytest.mark.parametrize(
    ("name", "text_column", "labels"),
    [
        ("bn_toxic6.csv", "text", "vulgar hate religious threat troll Insult"),
        ("brighter_mar.csv", "text", "anger disgust fear joy sadness surprise"),
        ("jigsaw_sample.csv", "comment_text", "toxic severe_toxic obscene threat insult identity_hate"),
    ],
)
def test_columns_of_real_tables_are_found(name, text_column, labels):
    columns = find_columns(real_table(name))
    assert (columns.text, columns.labels) == (text_column, tuple(labels.split()))


def test_ethos_is_refused_for_its_fractions():
    path = real_table("ethos_multilabel.csv")
    assert "Binarise" in fault(path, "0.833333333", "line 3")
    assert "Binarise" in fault(path, "line 4", "'gender'", label_columns=["gender"])


# Fuzzing


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(content=TABLE_BYTES)
def test_any_bytes_load_or_are_refused_in_one_line(suffix, content):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / f"a{suffix}", content)
        try:
            comments = data.load_comments(path)
        except InputError as error:
            message = str(error)
        else:
            message = ""
            assert len(list(comments.iter_texts())) == len(comments) > 0
        assert "\n" not in message
