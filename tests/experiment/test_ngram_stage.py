"""--student_ngrams: fitted on the labelled training texts alone, their share chosen on validation, saved with the layers."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from support.tiny_lab import TinyLab, columns_of, read_metrics, read_table, repeated_bytes, write_table

import research_predict
from research.evaluation.calibration import sigmoid
from research.evaluation.metrics import take_best
from research.experiment import ngram_stage, training
from research.models.tfidf import INVERSE_PENALTIES, fit_labels

PARTS = {"validation": "validation_predictions.csv", "test": "predictions.csv"}
BOTH = ("student", "control")


def logits_in(run_dir: Path, part: str, model: str = "student") -> np.ndarray:
    return columns_of(run_dir / PARTS[part], f"logit_{model}_")


def facts_of(run_dir: Path, model: str = "student") -> dict[str, float]:
    return read_metrics(run_dir)["training"][model]["ngrams"]


def with_share(share: float, patch: pytest.MonkeyPatch) -> None:
    """Let validation choose the penalty alone."""
    patch.setattr(ngram_stage, "take_best", lambda scores: share if set(scores) == set(ngram_stage.SHARES) else take_best(scores))


@pytest.mark.parametrize("kind", ["", "--student_kind static --static_dim 8", "--trim_student_vocab 2 --pooling mean"])
def test_logits_are_those_of_layers_and_ngrams_in_their_shares(lab: TinyLab, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    flags = f"{kind} --with_control"
    layers = lab.done("layers", flags)
    runs = {}
    for share in (0.0, 0.3, 1.0):
        with_share(share, monkeypatch)
        runs[share] = lab.done(f"share_{share}", f"{flags} --student_ngrams 2")
    for model in BOTH:
        for part in PARTS:
            parts = {share: logits_in(run, part, model) for share, run in runs.items()}
            np.testing.assert_array_equal(parts[0.0], logits_in(layers, part, model))
            np.testing.assert_allclose(parts[0.3], 0.7 * parts[0.0] + 0.3 * parts[1.0], atol=2e-5)
            assert not np.allclose(parts[1.0], parts[0.0], atol=0.1)
    # The regression reads no layer, so it is the same for both.
    np.testing.assert_allclose(logits_in(runs[1.0], "test", "control"), logits_in(runs[1.0], "test"), atol=1e-6)


def test_share_and_penalty_are_those_of_the_best_validation_score(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lab.done("run", "--student_ngrams 3")
    facts = facts_of(run)
    with_share(0.0, monkeypatch)
    layers = logits_in(lab.done("layers", "--student_ngrams 3"), "validation")
    with_share(1.0, monkeypatch)
    ngrams = logits_in(lab.done("ngrams", "--student_ngrams 3"), "validation")
    truth = columns_of(run / PARTS["validation"], "true_")
    scores = [
        average_precision_score(truth, sigmoid((1 - share) * layers + share * ngrams), average="macro")
        for share in ngram_stage.SHARES
    ]
    best = int(np.argmax(np.round(scores, 9)))
    assert facts["share"] == ngram_stage.SHARES[best]
    validation = {"layers": scores[0], "ngrams": scores[-1], "together": scores[best]}
    assert facts["validation"] == pytest.approx(validation, abs=1e-6)


def test_labels_that_are_held_out_fit_nothing(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of two tables that differ in the labels of test rows answer alike; of validation rows, but for what they choose."""
    rows = read_table(lab.folder / "data" / "comments.csv")
    header = list(rows[0])
    labels = header[-5:]
    with_share(1.0, monkeypatch)
    monkeypatch.setattr(training, "INVERSE_PENALTIES", (1.0,))
    write_table(lab.folder / "train.csv", [header, *[list(row.values()) for row in rows[:50]]])
    answers = []
    for name, turned in (("straight", False), ("turned", True)):
        held = [[str(1 - int(row[key])) if turned and key in labels else row[key] for key in header] for row in rows[50:]]
        for part, of_part in (("val", held[:15]), ("test", held[15:])):
            write_table(lab.folder / f"{part}_{name}.csv", [header, *of_part])
        tables = f"--dataset_path train.csv --val_path val_{name}.csv --test_path test_{name}.csv"
        answers.append(logits_in(lab.done(name, f"{tables} --pipeline student_only --student_ngrams 2"), "test"))
    np.testing.assert_array_equal(answers[0], answers[1])


def test_saved_student_labels_texts_as_the_run_did(lab: TinyLab) -> None:
    run = lab.done("run", "--student_ngrams 3")
    facts = facts_of(run)
    assert facts["share"] > 0
    card = (run / "student" / "README.md").read_text(encoding="utf-8")
    shown = f"a share of {facts['share']:.1f} of its logits is that of a logistic regression on {facts['ngrams']} n-grams"
    assert shown in card and "| --student_ngrams | 3 |" in card
    assert f"| student | {facts['ngrams']} | 3 |" in (run / "report.md").read_text(encoding="utf-8")
    flags = ["--model", str(run / "student"), "--dataset_path", "data/comments.csv", "--output_path", "labelled.csv"]
    assert research_predict.main([*flags, "--prefix", "new_", "--num_threads", "1"]) == 0
    labelled = columns_of(lab.folder / "labelled.csv", "new_p_")
    index = [int(row["index"]) for row in read_table(run / PARTS["test"])]
    np.testing.assert_allclose(labelled[index], sigmoid(logits_in(run, "test")), atol=1e-6)


def test_every_fold_and_the_best_trial_of_a_search_have_their_own(lab: TinyLab) -> None:
    run = lab.done("folds", "--student_ngrams 2 --num_folds 2 --with_control --search lr=1e-3,5e-3")
    first, second = (facts_of(run / f"fold_{fold}") for fold in (1, 2))
    assert first["validation"] != second["validation"]
    trials = read_metrics(run / "fold_1")["training"]["student"]["trials"]
    best = max(trial["validation"] for trial in trials)
    assert first["validation"]["layers"] == pytest.approx(best)  # type: ignore[index]


def test_two_directories_hold_the_same_bytes(lab: TinyLab) -> None:
    first = lab.done("first", "--student_ngrams 3 --with_control")
    assert repeated_bytes(lab.done("second", "--student_ngrams 3 --with_control --cache_dir another")) == repeated_bytes(first)


def test_a_validation_part_that_has_no_score_gives_the_ngrams_no_share(lab: TinyLab) -> None:
    rows = read_table(lab.folder / "data" / "comments.csv")
    header = list(rows[0])
    for part, of_part, labels in (("train", rows[:50], None), ("val", rows[50:65], "0"), ("test", rows[65:], None)):
        written = [[row[header[0]], *(labels or row[key] for key in header[1:])] for row in of_part]
        write_table(lab.folder / f"{part}.csv", [header, *written])
    tables = "--dataset_path train.csv --val_path val.csv --test_path test.csv"
    status, errors = lab.run(f"{tables} --pipeline student_only --student_ngrams 1 --output_dir results/run")
    assert status == 0
    said = "student: its n-grams get no share of its logits: validation has no mAP. Choose another --select_by."
    assert f"warning: {said}" in errors
    facts = facts_of(lab.folder / "results" / "run")
    assert facts["share"] == 0 and set(facts["validation"].values()) == {None}  # type: ignore[attr-defined]


def test_of_regressions_no_more_than_the_best_and_the_last_are_held(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    held = []

    def fit(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        weights, bias = fit_labels(*arguments)
        made.append(weakref.ref(weights))
        held.append(sum(each() is not None for each in made))
        return weights, bias

    monkeypatch.setattr(ngram_stage, "fit_labels", fit)
    lab.done("run", "--student_ngrams 1 --with_control")  # whose control has the same n-grams
    assert len(held) == len(INVERSE_PENALTIES) > max(held)
    assert max(held) <= 3  # with the one that was fitted before, whose name is not given anew until it returns


def test_what_cannot_be_is_one_line(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    native = lab.run("--student_ngrams 2 --student_head native --output_dir results/native")
    assert native[0] == 2 and "error: --student_ngrams: no stock model has a place for n-grams" in native[1]
    assert lab.refused("--student_ngrams 4").startswith("error: --student_ngrams: ")
    monkeypatch.setattr("research.models.ngram_table.LEAST_TEXTS", 1000)
    status, errors = lab.run("--student_ngrams 2 --output_dir results/run")
    assert status == 2 and "error: --student_ngrams: no piece stands in 2 of the " in errors
