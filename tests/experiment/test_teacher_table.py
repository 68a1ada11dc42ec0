"""A table of probabilities teaches where it speaks, alone or as one more voice, and the labels teach the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import KEYWORDS, LABELS, make_table, make_texts
from support.tiny_lab import ROWS, TinyLab, columns_of, read_metrics, read_table, repeated_bytes, write_table

from research.errors import InputError
from research.experiment.teacher_table import TeacherTable, read_teacher_table
from research.kd.ensemble import LEAST_PROBABILITY
from research_data import Comments, Split, load_comments, split_comments

HEADER = ["text", *LABELS]


@pytest.fixture
def comments(tmp_path: Path) -> Comments:
    return load_comments(make_table(tmp_path / "comments.csv", rows=12))


def read(folder: Path, comments: Comments, rows: list[list[Any]], header: list[str] | None = None) -> TeacherTable:
    return read_teacher_table(write_table(folder / "probs.csv", [header or HEADER, *rows]), comments)


# Reading


def test_rows_are_found_by_their_cleaned_text_in_any_order_and_form(tmp_path: Path, comments: Comments) -> None:
    texts = make_texts(12)
    table = read(tmp_path, comments, [[f"  {texts[7]} ", 0, 1, 0.5, 0.25, 1e-3], [texts[2], 0.1, 0.2, 0.3, 0.4, 0.5]])
    np.testing.assert_allclose(table.probs[7], [0, 1, 0.5, 0.25, 1e-3], rtol=1e-6)
    np.testing.assert_allclose(table.probs[2], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    assert np.isnan(np.delete(table.probs, [2, 7], axis=0)).all()
    assert (table.texts, table.unknown_texts, table.differing_texts, table.warn()) == (2, 0, 0, None)
    assert table.count_covered(np.arange(5)) == 1 and table.is_complete(np.array([2, 7])) and not table.is_complete(np.arange(3))


def test_columns_are_found_by_name_and_others_are_passed_over(tmp_path: Path, comments: Comments) -> None:
    header = ["note", *reversed(LABELS), "Comment"]
    table = read(tmp_path, comments, [["x", 0.5, 0.4, 0.3, 0.2, 0.1, make_texts(12)[0]]], header)
    np.testing.assert_allclose(table.probs[0], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)


def test_another_delimiter_is_read_and_said(tmp_path: Path, comments: Comments) -> None:
    lines = [";".join(HEADER), *(f"{text};{';'.join(['0.5'] * 5)}" for text in make_texts(12))]
    (tmp_path / "probs.csv").write_text("\n".join(lines), encoding="utf-8")
    table = read_teacher_table(tmp_path / "probs.csv", comments)
    assert (table.probs == 0.5).all()
    split = split_comments(comments, val_fraction=0.2, test_fraction=0.2, seed=1)
    assert "cells are separated by semicolons" in table.describe(split)[0]


def test_repeated_texts_are_averaged_and_counted_where_they_differ(tmp_path: Path, comments: Comments) -> None:
    texts = make_texts(12)
    rows: list[list[Any]] = [
        [texts[0], 0.2, 0, 0, 0, 0],
        [texts[0], 0.6, "", 0, 0, 0],
        [texts[1], *[0.5] * 5],
        [texts[1], *[0.5] * 5],
    ]
    table = read(tmp_path, comments, [*rows, ["another", *[1] * 5]])
    np.testing.assert_allclose(table.probs[0], [0.4, 0, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(table.probs[1], 0.5)
    assert (table.texts, table.unknown_texts, table.differing_texts) == (3, 1, 1)
    assert "different probabilities of 1 text in several rows; their mean is taken" in str(table.warn())


def test_empty_cells_say_nothing_of_their_label(tmp_path: Path, comments: Comments) -> None:
    texts = make_texts(12)
    table = read(tmp_path, comments, [[texts[3], "", 0.5, " ", 0.5, 0.5], [texts[4], *[""] * 5]])
    assert np.isnan(table.probs[3]).tolist() == [True, False, True, False, False]
    assert (table.texts, table.count_covered(np.arange(12))) == (1, 1)


def test_start_up_line_says_of_how_many_rows_of_each_part_it_speaks(tmp_path: Path, comments: Comments) -> None:
    table = read(tmp_path, comments, [[text, *[0.5] * 5] for text in (*make_texts(12)[:5], "another")])
    split = Split(np.arange(6), np.arange(6, 9), np.arange(4, 12), np.arange(0), {})
    (line,) = table.describe(split)
    assert line.endswith(
        "probs.csv: probabilities of 6 distinct texts (1 text of it in no table); rows it speaks of: "
        "train 5 of 6 (83.3 %), validation 0 of 3 (0.0 %), test 1 of 8 (12.5 %)"
    )


@pytest.mark.parametrize(
    ("cell", "shown"),
    [("1.5", "'1.5'"), ("-0.1", "'-0.1'"), ("yes", "'yes'"), ("nan", "'nan'"), ("inf", "'inf'"), ("1e999", "'1e999'")],
)
def test_cell_that_is_no_probability_is_named(tmp_path: Path, comments: Comments, cell: str, shown: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, comments, [[make_texts(12)[0], 0, 0, 0, 0, 0], [make_texts(12)[1], 0, cell, 0, 0, 0]])
    assert f"probs.csv, line 3: the probability of 'sexual' is {shown}, not a number from 0 to 1" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_label_column_and_a_table_of_other_texts_are_refused(tmp_path: Path, comments: Comments) -> None:
    with pytest.raises(InputError, match=r"no column 'threat'; found text, bully.*bully, sexual, religious, threat, spam"):
        read(tmp_path, comments, [["x", 0, 0, 0, 0]], ["text", "bully", "sexual", "religious", "spam"])
    with pytest.raises(InputError, match="none of its 1 text with probabilities is a text of .*comments.csv"):
        read(tmp_path, comments, [["x", 0, 0, 0, 0, 0]])


# Runs


def write_probs(lab: TinyLab, rows: range = range(ROWS), high: float = 0.9) -> dict[str, list[float]]:
    """Write probs.csv with what the keywords of some texts say; return the probabilities by text."""
    texts = make_texts(ROWS)
    probs = {texts[row]: [high if keyword in texts[row] else 1 - high for keyword in KEYWORDS] for row in rows}
    write_table(lab.folder / "probs.csv", [HEADER, *([text, *cells] for text, cells in probs.items())])
    return probs


ALONE = "--teacher_probs_path probs.csv --teacher_path nobody/nothing"


def test_table_of_every_text_is_a_teacher_like_any_other_and_needs_no_model(lab: TinyLab) -> None:
    probs = write_probs(lab, high=1.0)
    run = lab.done("run", f"{ALONE} --with_control")
    table = read_table(lab.folder / "data" / "comments.csv")
    texts = [table[int(row["index"])]["text"] for row in read_table(run / "predictions.csv")]
    expected = np.clip([probs[text] for text in texts], LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    np.testing.assert_allclose(columns_of(run / "predictions.csv", "teacher_"), expected, atol=1e-6)
    metrics = read_metrics(run)
    assert metrics["teacher"]["test"]["at_0.5"]["f1_micro"] == 1.0
    assert metrics["teachers"]["teacher_probs"]["coverage"] == {"train": 1.0, "validation": 1.0, "test": 1.0}
    assert set(json.loads((run / "environment.json").read_text())["data"]["file_sha256"]) == {"main", "teacher_probs"}
    assert not (run / "teacher").exists() and set(json.loads((run / "efficiency.json").read_text())) == {"student"}
    assert not (lab.folder / "cache" / "teachers").exists()


def test_table_of_some_training_texts_leaves_the_others_to_the_labels_and_scores_no_teacher(lab: TinyLab) -> None:
    write_probs(lab, range(0, ROWS, 2))
    status, errors = lab.run(f"{ALONE} --with_control --output_dir results/run")
    assert status == 0, errors
    assert "probs.csv: probabilities of 40 distinct texts; rows it speaks of: train " in errors
    run = lab.folder / "results" / "run"
    metrics = read_metrics(run)
    assert "teacher" not in metrics and "kept" not in metrics and metrics["kd_gain"]["f1_macro"]["teacher"] is None
    found = metrics["teachers"]["teacher_probs"]
    assert 0 < found["coverage"]["train"] < 1 and found["rows"]["test"] == round(
        found["coverage"]["test"] * metrics["rows"]["test"]
    )
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "The student learned the other rows from the labels alone." in report and "What distillation gained" in report
    assert "Its table does not say which texts it was trained on" in report
    again = lab.done("again", f"{ALONE} --with_control")
    assert repeated_bytes(again) == repeated_bytes(run)


def test_table_of_no_validation_text_cannot_be_judged_and_says_so(lab: TinyLab) -> None:
    run = lab.done("whole", "--pipeline student_only")
    tested = {int(row["index"]) for name in ("predictions", "validation_predictions") for row in read_table(run / f"{name}.csv")}
    texts = make_texts(ROWS)
    rows = [[texts[row], *[0.5] * 5] for row in range(ROWS) if row not in tested]
    write_table(lab.folder / "probs.csv", [HEADER, *rows])
    status, errors = lab.run(f"{ALONE} --output_dir results/run")
    assert status == 0 and "no probabilities of validation rows, so --min_teacher_f1 cannot judge it" in errors
    scores = read_metrics(lab.folder / "results" / "run")["teachers"]["teacher_probs"]
    assert scores["test"]["at_0.5"]["f1_macro"] is None and scores["coverage"] == {"train": 1.0, "validation": 0.0, "test": 0.0}


def test_table_at_alpha_zero_teaches_nothing(lab: TinyLab) -> None:
    write_probs(lab)
    silent = lab.done("alpha_0", f"{ALONE} --kd_alpha 0")
    plain = lab.done("plain", "--pipeline student_only")
    for name, prefix in (("history.csv", "hard_loss"), ("predictions.csv", "logit_student")):
        np.testing.assert_allclose(columns_of(silent / name, prefix), columns_of(plain / name, prefix), rtol=1e-6)


def test_beside_a_model_the_table_is_one_more_voice_where_it_speaks(lab: TinyLab) -> None:
    probs = write_probs(lab, range(0, ROWS, 2))
    own = lab.done("own")
    both = lab.done("both", "--teacher_seeds 1 --teacher_probs_path probs.csv --kd_method hidden")
    table = read_table(lab.folder / "data" / "comments.csv")
    rows = read_table(both / "predictions.csv")
    alone = columns_of(own / "predictions.csv", "teacher_")
    expected = [
        (of_model + probs[text]) / 2 if (text := table[int(row["index"])]["text"]) in probs else of_model
        for row, of_model in zip(rows, alone, strict=True)
    ]
    np.testing.assert_allclose(columns_of(both / "predictions.csv", "teacher_"), expected, atol=1e-6)
    assert len(lab.entries("teachers")) == 1
    metrics = read_metrics(both)
    assert set(metrics["teachers"]) == {"teacher", "teacher_probs"}
    assert metrics["teachers"]["teacher"]["test"] == read_metrics(own)["teacher"]["test"]
    assert not (both / "student" / "training_texts.npy").exists()  # nobody knows what the table's maker has seen


def test_folds_each_say_what_the_table_covers_of_them(lab: TinyLab) -> None:
    write_probs(lab, range(60))
    run = lab.done("run", f"{ALONE} --num_folds 2 --with_control")
    shares = [read_metrics(run / f"fold_{fold}")["teachers"]["teacher_probs"]["coverage"]["test"] for fold in (1, 2)]
    assert np.mean(shares) == pytest.approx(0.75, abs=1e-6)
    assert lab.run(f"{ALONE} --num_folds 2 --with_control --output_dir results/run")[0] == 0
    write_probs(lab, range(61))
    status, errors = lab.run(f"{ALONE} --num_folds 2 --with_control --output_dir results/run")
    assert status == 2 and "was made from another content of probs.csv" in errors


def test_finished_run_notices_that_the_table_has_changed(lab: TinyLab) -> None:
    write_probs(lab)
    lab.done("run", ALONE)
    write_probs(lab, high=0.8)
    status, errors = lab.run(f"{ALONE} --output_dir results/run")
    assert status == 2 and "results/run was made from another content of probs.csv" in errors
    lab.done("run", f"{ALONE} --overwrite")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (f"{ALONE} --kd_method hidden", ("--kd_method: hidden needs the layers of a teacher", "--teacher_checkpoint")),
        (f"{ALONE} --student_init teacher", ("--student_init: teacher needs the layers of a teacher",)),
        (f"{ALONE} --pipeline baseline", ("--pipeline baseline scores the teacher", "lacks probabilities of some of the")),
        ("--teacher_probs_path none.csv", ("--teacher_probs_path: no such file: 'none.csv'",)),
    ],
)
def test_what_a_table_cannot_do_is_one_line(lab: TinyLab, flags: str, parts: tuple[str, ...]) -> None:
    write_probs(lab, range(40))
    error = lab.refused(flags)
    assert all(part in error for part in parts), error


def test_table_of_test_texts_alone_has_nothing_to_teach(lab: TinyLab) -> None:
    run = lab.done("whole", "--pipeline student_only")
    texts = make_texts(ROWS)
    rows = [[texts[int(row["index"])], *[0.5] * 5] for row in read_table(run / "predictions.csv")]
    write_table(lab.folder / "probs.csv", [HEADER, *rows])
    assert "has no probabilities of any of the 64 rows to learn from" in lab.refused(ALONE)
    lab.done("not_asked", f"--pipeline student_only {ALONE}")
