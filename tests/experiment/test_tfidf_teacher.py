"""--teacher_tfidf: n-grams answer for each text by a fit that has not seen it, as one more voice in the mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from support.builders import LABELS, QUICK_EXTRAS
from support.tiny_lab import TinyLab, columns_of, read_metrics, read_table, repeated_bytes, write_table

import research_main
from research.experiment import tfidf_teacher
from research.experiment.context import RunContext
from research.experiment.inputs import Views
from research.experiment.tfidf_teacher import asked_rows, fit_answers, part_texts
from research.models.tfidf import TfidfTrainer


@pytest.fixture
def context(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> RunContext:
    """Return what a run hands to the fit, with a single penalty, so that labels choose none."""
    kept: list[RunContext] = []
    fit = tfidf_teacher.fit_answers

    def keeping(context: RunContext) -> tuple[np.ndarray, dict[str, Any]]:
        kept.append(context)
        return fit(context)

    monkeypatch.setattr(tfidf_teacher, "INVERSE_PENALTIES", (1.0,))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tfidf_teacher, "fit_answers", keeping)
        lab.done("run", "--teacher_tfidf --pipeline baseline --no-class_weights")
    return kept[0]


def with_labels(context: RunContext, labels: np.ndarray) -> RunContext:
    comments = dataclasses.replace(context.inputs.comments, labels=labels)
    return dataclasses.replace(context, inputs=dataclasses.replace(context.inputs, comments=comments))


def test_no_answer_for_a_training_text_has_seen_its_labels(context: RunContext) -> None:
    comments, train = context.inputs.comments, context.inputs.split.train
    part = part_texts(comments.text_hash[train])
    labels = comments.labels.copy()
    labels[train[part == 0]] = 1 - labels[train[part == 0]]
    before, after = fit_answers(context)[0], fit_answers(with_labels(context, labels))[0]
    same = (before == after).all(axis=1)
    assert same[: len(train)][part == 0].all() and not same[: len(train)][part != 0].any() and not same[len(train) :].any()


def test_no_answer_for_a_view_has_seen_the_labels_of_its_text(context: RunContext) -> None:
    inputs = context.inputs
    train = inputs.split.train
    # As views, other texts: those of validation and test, two of each training row.
    others = np.resize(np.concatenate([inputs.split.validation, inputs.split.test]), (len(train), 2))
    viewed = dataclasses.replace(
        context, inputs=dataclasses.replace(inputs, views=Views(others, np.broadcast_to(train[:, None], others.shape)))
    )
    labels, part = inputs.comments.labels.copy(), part_texts(inputs.comments.text_hash[train])
    labels[train[part == 0]] = 1 - labels[train[part == 0]]
    before, after = fit_answers(viewed)[0], fit_answers(with_labels(viewed, labels))[0]
    assert len(before) == len(asked_rows(viewed.inputs))
    same = (before == after).all(axis=1)[-others.size :].reshape(others.shape)
    assert same[part == 0].all() and not same[part != 0].any()
    np.testing.assert_array_equal(before[: -others.size], fit_answers(context)[0])


def test_an_unlabelled_text_that_is_a_training_text_is_answered_as_that(context: RunContext) -> None:
    split = context.inputs.split
    both = dataclasses.replace(split, unlabelled=np.concatenate([split.train[3:6], split.test[:1]]))
    answers = fit_answers(dataclasses.replace(context, inputs=dataclasses.replace(context.inputs, split=both)))[0]
    plain, num_train = fit_answers(context)[0], len(split.train)
    np.testing.assert_array_equal(answers[num_train : num_train + 3], plain[3:6])
    np.testing.assert_array_equal(np.delete(answers, np.s_[num_train : num_train + 4], axis=0), plain)
    np.testing.assert_array_equal(answers[num_train + 3], answers[-len(split.test)])


def test_labels_of_validation_and_test_rows_change_nothing(context: RunContext) -> None:
    labels = np.full_like(context.inputs.comments.labels, np.nan)
    train = context.inputs.split.train
    labels[train] = context.inputs.comments.labels[train]
    (before, facts), (after, same_facts) = fit_answers(context), fit_answers(with_labels(context, labels))
    np.testing.assert_array_equal(before, after)
    assert facts == same_facts == {"source": "tfidf", "inverse_penalty": 1.0, "ngrams": facts["ngrams"], "parts": 5}


def test_validation_and_test_are_answered_by_a_fit_of_all_training_texts(context: RunContext) -> None:
    inputs = context.inputs
    texts = list(inputs.comments.iter_texts())
    train, rows = inputs.split.train, asked_rows(inputs)
    model = TfidfTrainer([texts[row] for row in train], inputs.comments.labels[train], np.ones(len(LABELS))).fit(1.0)
    wanted = model.predict_logits([texts[row] for row in rows[len(train) :]])
    np.testing.assert_array_equal(fit_answers(context)[0][len(train) :], wanted)


def test_parts_are_of_distinct_texts() -> None:
    text_hash = np.array([7, 3, 7, 5, 9, 3, 11, 13, 15, 17, 19], np.uint64)
    part = part_texts(text_hash)
    assert part[0] == part[2] and part[1] == part[5]
    sizes = np.bincount(part[np.unique(text_hash, return_index=True)[1]])
    assert sizes.tolist() == [2, 2, 2, 2, 1]
    np.testing.assert_array_equal(part, part_texts(text_hash))
    assert part_texts(np.array([4, 4], np.uint64)).tolist() == [0, 0]


def test_it_is_one_more_voice_and_is_scored_by_itself(lab: TinyLab) -> None:
    plain, both = lab.done("plain"), lab.done("both", "--teacher_tfidf --with_control")
    scores = read_metrics(both)["teachers"]
    assert scores.keys() == {"teacher", "teacher_tfidf"} and scores["teacher"]["test"] == read_metrics(plain)["teacher"]["test"]
    alone, mean = (columns_of(run / "predictions.csv", "teacher_") for run in (plain, both))
    other = 2 * mean - alone  # the n-grams' probabilities, if the mean is one
    assert ((other > -1e-6) & (other < 1 + 1e-6)).all() and not np.allclose(other, alone)
    assert read_metrics(both)["training"]["teacher_tfidf"]["source"] == "tfidf"
    report = (both / "report.md").read_text(encoding="utf-8")
    assert "| teacher_tfidf |" in report and "may have seen test rows" not in report
    assert lab.entries("tfidf_teachers") and not any("teacher_tfidf" in path.name for path in both.iterdir())


def test_two_directories_hold_the_same_bytes_and_the_second_fits_nothing(lab: TinyLab) -> None:
    first = lab.done("first", "--teacher_tfidf")
    status, errors = lab.run("--teacher_tfidf --seed 7 --output_dir results/seed")
    assert status == 0 and "fitting without part" not in errors
    assert repeated_bytes(lab.done("second", "--teacher_tfidf --cache_dir another")) == repeated_bytes(first)


def test_beside_a_table_every_row_has_an_answer(lab: TinyLab) -> None:
    rows = read_table(lab.folder / "data" / "comments.csv")
    text = next(iter(rows[0]))
    write_table(lab.folder / "probs.csv", [[text, *LABELS], [rows[0][text], *[0.5] * 5]])
    run = lab.done("run", "--teacher_probs_path probs.csv --teacher_tfidf --rank_loss_weight 1")
    metrics = read_metrics(run)
    assert metrics["teachers"].keys() == {"teacher_probs", "teacher_tfidf"} and "f1_macro" in metrics["teacher"]["test"]["at_0.5"]


def test_the_plan_says_whether_there_are_answers(lab: TinyLab) -> None:
    def plan(word: str) -> str:
        errors = lab.run("--teacher_tfidf --dry_run --output_dir results/run")[1]
        return next(line for line in errors.splitlines() if line.startswith(word))

    assert "answers of character n-grams" in plan("to compute:")
    lab.done("other", "--teacher_tfidf --pipeline baseline")
    assert "answers of character n-grams" in plan("there already:")


def test_folds_have_a_fit_each(lab: TinyLab) -> None:
    lab.done("folds", "--teacher_tfidf --num_folds 2")
    assert len(lab.entries("tfidf_teachers")) == 2


def test_texts_of_a_fit_without_ngrams_in_common_are_refused_before_anything_is_written(lab: TinyLab) -> None:
    # One word that two texts share: the fit that leaves one of them out has none.
    words = [chr(0x4E00 + 2 * row) + chr(0x4E01 + 2 * row) for row in range(60)]
    rows = [[f"{word} shared" if row < 20 else word, row % 2, row % 3 // 2] for row, word in enumerate(words)]
    for name, part in {"train": [*rows[:1], *rows[20:50], *rows[1:2]], "rest": rows[50:]}.items():
        write_table(lab.folder / f"{name}.csv", [["text", "a", "b"], *part])
    line = lab.refused("--teacher_tfidf --dataset_path train.csv --val_path rest.csv --label_columns a b")
    assert "error: --teacher_tfidf: " in line and "those that answer for the others, have no n-grams in common" in line


def test_a_pipeline_without_a_teacher_says_that_it_does_not_read_it(lab: TinyLab) -> None:
    flags = ["--pipeline", "student_only", "--teacher_tfidf", "--output_dir", "results/run"]
    assert research_main.main(flags, QUICK_EXTRAS) == 2
