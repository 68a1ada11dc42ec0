"""Metrics against scikit-learn and by hand, unknown cells, thresholds, and which part decides what."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from support.classifiers import NAMES, random_case

from research.evaluation.calibration import (
    sigmoid,
)
from research.evaluation.metrics import (
    build_metrics,
    compute_agreement,
    compute_metrics,
    compute_soft_loss,
    evaluate_model,
    majority_baseline,
)
from research.evaluation.thresholds import choose_thresholds
from research.kd.losses import soft_bce_loss


def test_metrics_match_scikit_learn_on_complete_labels() -> None:
    labels, probs = random_case()
    thresholds = np.array([0.3, 0.5, 0.62])
    scores = compute_metrics(labels, probs, thresholds, NAMES)
    predicted = (probs >= thresholds).astype(int)
    expected = {
        "f1_macro": sk.f1_score(labels, predicted, average="macro"),
        "f1_micro": sk.f1_score(labels, predicted, average="micro"),
        "f1_weighted": sk.f1_score(labels, predicted, average="weighted"),
        "precision_macro": sk.precision_score(labels, predicted, average="macro"),
        "recall_macro": sk.recall_score(labels, predicted, average="macro"),
        "subset_accuracy": sk.accuracy_score(labels, predicted),
        "hamming_loss": sk.hamming_loss(labels, predicted),
        "lrap": sk.label_ranking_average_precision_score(labels, probs),
        "average_precision_macro": sk.average_precision_score(labels, probs, average="macro"),
        "roc_auc_macro": sk.roc_auc_score(labels, probs, average="macro"),
        "brier": np.mean((labels - probs) ** 2),
    }
    assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert set(scores) == {*expected, "ece", "per_label"}
    assert list(scores["per_label"]) == NAMES


def test_metrics_match_a_hand_computation() -> None:
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], dtype=float)
    probs = np.array([[0.9, 0.2], [0.5, 0.4], [0.6, 0.1], [0.1, 0.8]])
    scores = compute_metrics(labels, probs, 0.5, ["bully", "spam"])
    assert scores["per_label"]["bully"] == {
        "precision": pytest.approx(2 / 3),
        "recall": 1.0,
        "f1": pytest.approx(0.8),
        "average_precision": pytest.approx(0.5 * 1 + 0.5 * 2 / 3),
        "roc_auc": pytest.approx(3 / 4),
        "support": 2,
        "predicted": 3,
        "known": 4,
        "threshold": 0.5,
    }
    assert scores["per_label"]["spam"]["f1"] == pytest.approx(2 / 3)
    assert scores["subset_accuracy"] == 0.5
    assert scores["hamming_loss"] == 0.25


def test_unknown_cells_are_left_out_of_every_metric() -> None:
    labels, probs = random_case()
    labels[::3, 1] = np.nan
    labels[5:9, 2] = np.nan
    scores = compute_metrics(labels, probs, 0.5, NAMES)
    altered = np.where(np.isnan(labels), 1 - probs, probs)
    thresholds, altered_thresholds = choose_thresholds(labels, probs), choose_thresholds(labels, altered)
    assert compute_metrics(labels, altered, 0.5, NAMES) == scores
    np.testing.assert_array_equal(thresholds, altered_thresholds)

    known = ~np.isnan(labels)
    complete = known.all(axis=1)
    predicted = (probs >= 0.5).astype(int)
    assert scores["per_label"]["threat"]["known"] == known[:, 1].sum()
    per_label = [sk.f1_score(labels[known[:, c], c], predicted[known[:, c], c]) for c in range(3)]
    assert scores["f1_macro"] == pytest.approx(np.mean(per_label))
    assert scores["f1_micro"] == pytest.approx(sk.f1_score(labels[known], predicted[known]))
    assert scores["hamming_loss"] == pytest.approx(np.mean(labels[known] != predicted[known]))
    assert scores["subset_accuracy"] == pytest.approx(sk.accuracy_score(labels[complete], predicted[complete]))
    expected_lrap = sk.label_ranking_average_precision_score(labels[complete], probs[complete])
    assert scores["lrap"] == pytest.approx(expected_lrap)


def test_label_without_positives_scores_zero_f1_and_no_ranking_figures() -> None:
    labels, probs = random_case()
    labels[:, 1] = 0
    scores = compute_metrics(labels, probs, 0.5, NAMES)
    bully, threat, spam = (scores["per_label"][name] for name in NAMES)
    assert threat["f1"] == 0 and np.isnan(threat["average_precision"]) and np.isnan(threat["roc_auc"])
    assert scores["f1_macro"] == pytest.approx((bully["f1"] + spam["f1"]) / 3)
    assert scores["roc_auc_macro"] == pytest.approx((bully["roc_auc"] + spam["roc_auc"]) / 2)


@pytest.mark.filterwarnings("error")
def test_labels_that_are_never_known_give_no_warning_and_no_crash() -> None:
    scores = compute_metrics(np.full((4, 3), np.nan), np.full((4, 3), 0.7), 0.5, NAMES)
    assert scores["f1_micro"] == scores["f1_weighted"] == 0
    assert all(np.isnan(scores[key]) for key in ("f1_macro", "subset_accuracy", "lrap", "ece", "brier", "roc_auc_macro"))


def test_a_label_without_a_known_cell_is_left_out_of_every_mean() -> None:
    labels, probs = random_case()
    labels[:, 1] = np.nan
    scores, without = compute_metrics(labels, probs, 0.5, NAMES), compute_metrics(labels[:, ::2], probs[:, ::2], 0.5, NAMES[::2])
    for name in ("f1_macro", "f1_weighted", "precision_macro", "recall_macro", "average_precision_macro"):
        assert scores[name] == without[name]
    assert np.isnan(scores["per_label"][NAMES[1]]["f1"])
    assert scores["per_label"][NAMES[1]]["known"] == 0


def test_twelve_thousand_rows_take_under_a_third_of_a_second() -> None:
    labels, probs = random_case(12_000, 5)
    durations = []
    for _ in range(5):
        started = time.perf_counter()
        compute_metrics(labels, probs, 0.5, list("abcde"))
        durations.append(time.perf_counter() - started)
    assert min(durations) < 0.3


def test_agreement_matches_a_hand_computation() -> None:
    teacher = np.array([[0.9, 0.2], [0.6, 0.2], [0.1, 0.2]])
    student = np.array([[0.8, 0.3], [0.4, 0.6], [0.1, 0.1]])
    assert compute_agreement(teacher, student, ["bully", "spam"]) == {
        "decisions_equal": pytest.approx(4 / 6),
        "rows_equal": pytest.approx(2 / 3),
        "probability_mae": pytest.approx((0.1 + 0.1 + 0.2 + 0.4 + 0 + 0.1) / 6),
        "probability_correlation": pytest.approx(np.corrcoef(teacher[:, 0], student[:, 0])[0, 1]),
    }
    assert np.isnan(compute_agreement(teacher * 0, student, ["bully", "spam"])["probability_correlation"])


def test_majority_baseline_takes_majorities_from_training_only() -> None:
    train_labels = np.array([[1, 0], [1, 0], [0, 1], [np.nan, np.nan], [np.nan, 0]])
    labels = np.array([[1, 1], [1, 0], [0, 1], [0, 1]], dtype=float)
    # The first label is always yes: precision 1/2, recall 1; the second always no.
    assert majority_baseline(train_labels, labels) == {
        "f1_macro": pytest.approx((2 / 3 + 0) / 2),
        "f1_micro": pytest.approx(2 * 2 / (4 + 5)),
        "subset_accuracy": 0.25,
    }


def test_thresholds_come_from_validation_and_serve_the_test_part() -> None:
    validation, test = random_case(seed=1), random_case(seed=2)
    scores, thresholds = evaluate_model(NAMES, validation=validation, test=test)
    cuts = choose_thresholds(*validation)
    assert list(thresholds.values()) == cuts.tolist()
    assert scores["test"]["tuned"] == compute_metrics(*test, cuts, NAMES)
    assert scores["test"]["at_0.5"] == compute_metrics(*test, 0.5, NAMES)
    assert scores["validation"]["tuned"]["f1_macro"] >= scores["validation"]["at_0.5"]["f1_macro"]


@pytest.mark.parametrize("t_squared", [True, False])
def test_soft_loss_is_the_one_that_training_sees(t_squared: bool) -> None:
    rng = np.random.default_rng(0)
    teacher, student = (rng.normal(scale=3, size=(50, 3)).astype(np.float32) for _ in range(2))
    found = compute_soft_loss(sigmoid(teacher), sigmoid(student), 4.0, t_squared=t_squared)
    expected = soft_bce_loss(torch.from_numpy(student), torch.from_numpy(teacher), 4.0, t_squared=t_squared).mean()
    assert found["soft_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["soft_excess"] > 0
    assert compute_soft_loss(sigmoid(teacher), sigmoid(teacher), 4.0)["soft_excess"] == 0
    shift = np.array([0.5, 0.0, -1.0])[: teacher.shape[1]]
    shifted = compute_soft_loss(sigmoid(teacher + shift), sigmoid(student), 4.0, t_squared=t_squared, teacher_shift=shift)
    assert shifted["soft_loss"] == pytest.approx(found["soft_loss"], rel=1e-6)


@pytest.mark.parametrize("models", [("teacher",), ("student",), ("teacher", "student"), ("teacher", "control", "student")])
def test_metrics_hold_only_the_models_present(models: tuple[str, ...]) -> None:
    labels = {part: random_case(seed=seed)[0] for seed, part in enumerate(("train", "validation", "test"))}
    probs: dict[str, dict[str, Any]] = {
        model: {part: random_case(seed=9 + seed)[1] for part in ("validation", "test")} for seed, model in enumerate(models)
    }
    metrics = build_metrics(NAMES, labels, probs, {"best_epoch": 3})
    expected = {"labels", "rows", "headline", "thresholds", "majority_baseline", "training", *models}
    expected |= {"agreement"} if {"teacher", "student"} <= set(models) else set()
    assert set(metrics) == expected | ({"control_agreement"} if "control" in models else set())
    assert metrics["rows"] == {"train": 200, "validation": 200, "test": 200}
    assert set(metrics["thresholds"]) == set(models)
    assert metrics["headline"] == {
        "model": models[-1],
        "part": "test",
        "metric": "f1_macro",
        "value": metrics[models[-1]]["test"]["at_0.5"]["f1_macro"],
    }
