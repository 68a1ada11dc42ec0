"""Claims about research.evaluation: metrics, thresholds, calibration, prediction order, cost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import nn
from transformers import BertConfig, BertModel

from research.evaluation.calibration import (
    compute_calibration,
    compute_calibration_error,
    fit_temperature,
    logit,
    sigmoid,
)
from research.evaluation.efficiency import compare_efficiency, count_parameters, measure_efficiency
from research.evaluation.metrics import (
    build_metrics,
    calibrate,
    choose_thresholds,
    compute_agreement,
    compute_metrics,
    compute_soft_loss,
    evaluate_model,
    majority_baseline,
)
from research.evaluation.predict import predict_logits
from research.kd.losses import soft_bce_loss

NAMES = ["bully", "threat", "spam"]
ROOT = Path(__file__).resolve().parents[2]


def random_case(num_rows: int = 200, num_labels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probs = rng.random((num_rows, num_labels)).round(2)  # ties, as real scores have
    labels = (rng.random(probs.shape) < probs * 0.7).astype(float)
    return labels, probs


def f1_at(labels: np.ndarray, probs: np.ndarray, threshold: float) -> float:
    predicted = probs >= threshold
    return 2 * (predicted & (labels == 1)).sum() / max(predicted.sum() + labels.sum(), 1)


class TinyClassifier(nn.Module):
    def __init__(self, hidden_size: int = 16, num_layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=24,
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Sequential(nn.Linear(hidden_size, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.classifier(states[:, 0])}


class LengthSortedLoader:
    """Rows of growing length, longest first, padded batch by batch."""

    def __init__(self, num_rows: int = 11, batch_size: int = 4) -> None:
        rng = np.random.default_rng(1)
        self.num_rows, self.batch_size = num_rows, batch_size
        self.rows = [torch.from_numpy(rng.integers(1, 50, size=length)) for length in rng.integers(2, 20, num_rows)]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = sorted(range(self.num_rows), key=lambda row: -len(self.rows[row]))
        for start in range(0, self.num_rows, self.batch_size):
            index = order[start : start + self.batch_size]
            input_ids = nn.utils.rnn.pad_sequence([self.rows[row] for row in index], batch_first=True)
            yield {
                "index": torch.tensor(index),
                "input_ids": input_ids,
                "attention_mask": (input_ids > 0).long(),
                "labels": torch.zeros(len(index), 3),
            }


def test_import_loads_neither_torch_nor_scikit_learn() -> None:
    check = (
        "import sys, research.evaluation.metrics, research.evaluation.predict, research.evaluation.efficiency; "
        "sys.exit(bool({'torch', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=60).returncode == 0


def test_length_sorted_loader_gives_rows_in_dataset_order() -> None:
    model, loader = TinyClassifier(), LengthSortedLoader()
    logits = predict_logits(model, loader, "cpu")
    assert logits.shape == (11, 3) and logits.dtype == np.float32
    model.eval()
    for row, input_ids in enumerate(loader.rows):
        with torch.inference_mode():
            alone = model(input_ids[None], torch.ones_like(input_ids[None]))["logits"][0]
        np.testing.assert_allclose(logits[row], alone.numpy(), atol=1e-5)


def test_a_loader_that_leaves_rows_out_is_caught() -> None:
    with pytest.raises(AssertionError, match="loader gave 11 of 12 rows"):
        predict_logits(TinyClassifier(), LengthSortedLoader(), "cpu", num_rows=12)


def test_prediction_restores_every_training_flag() -> None:
    model = TinyClassifier().train()
    model.encoder.eval()  # a frozen encoder stays in eval mode while its head trains
    before = [module.training for module in model.modules()]
    predict_logits(model, LengthSortedLoader(), "cpu")
    assert [module.training for module in model.modules()] == before
    assert True in before and False in before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_logits_match_cpu_logits() -> None:
    model, loader = TinyClassifier(), LengthSortedLoader()
    on_cpu = predict_logits(model, loader, "cpu")
    np.testing.assert_allclose(predict_logits(model.cuda(), loader, "cuda"), on_cpu, atol=1e-3)


def test_logits_that_are_not_finite_stop_the_evaluation() -> None:
    model = TinyClassifier()
    last = model.classifier[3]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.bias[1] = float("inf")
    with pytest.raises(FloatingPointError, match="logits of 11 of 11 rows are not finite"):
        predict_logits(model, LengthSortedLoader(), "cpu")


def test_sigmoid_is_exact_and_never_overflows() -> None:
    logits = np.array([-1e4, -30.0, -1.5, 0.0, 1.5, 30.0, 1e4], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        probs = sigmoid(logits)
    np.testing.assert_allclose(probs, torch.sigmoid(torch.from_numpy(logits).double()).numpy(), rtol=1e-12)
    assert probs[4] < probs[5] < 1.0


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
    assert scores["f1_macro"] == scores["f1_micro"] == scores["f1_weighted"] == 0
    assert all(np.isnan(scores[key]) for key in ("subset_accuracy", "lrap", "ece", "brier", "roc_auc_macro"))


def test_twelve_thousand_rows_take_under_a_third_of_a_second() -> None:
    labels, probs = random_case(12_000, 5)
    durations = []
    for _ in range(5):
        started = time.perf_counter()
        compute_metrics(labels, probs, 0.5, list("abcde"))
        durations.append(time.perf_counter() - started)
    assert min(durations) < 0.3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 1.0, np.nan]),
            st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1)),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_no_cut_beats_the_chosen_threshold(cells: list[tuple[float, float]]) -> None:
    labels, probs = np.array(cells).T
    threshold = choose_thresholds(labels[:, None], probs[:, None])[0]
    known = ~np.isnan(labels)
    labels, probs = labels[known], probs[known]
    if not labels.any():
        assert threshold == 0.5
        return
    best = max(f1_at(labels, probs, cut) for cut in [*probs, 2.0])
    assert 0 <= threshold <= 1
    assert f1_at(labels, probs, threshold) == best


def test_threshold_lies_midway_between_the_scores_it_parts() -> None:
    labels = np.array([[0.0], [0.0], [1.0], [1.0]])
    probs = np.array([[0.1], [0.2], [0.3], [0.9]])
    assert choose_thresholds(labels, probs) == pytest.approx([0.25])


def test_equal_f1_takes_the_cut_nearest_to_one_half() -> None:
    # Yes to the first or to all four: precision 1, recall 1/2 or precision 1/2, recall 1.
    labels = np.array([[1.0], [0.0], [0.0], [1.0]])
    probs = np.array([[0.9], [0.7], [0.3], [0.04]])
    assert f1_at(labels, probs, 0.8) == f1_at(labels, probs, 0.02)
    assert choose_thresholds(labels, probs) == pytest.approx([0.8])


def test_adjacent_floats_are_parted() -> None:
    low = 0.3
    high = np.nextafter(low, 1)
    threshold = choose_thresholds(np.array([[0.0], [1.0]]), np.array([[low], [high]]))[0]
    assert low < threshold <= high


def test_threshold_of_calibrated_scores_is_half_the_best_f1() -> None:
    rng = np.random.default_rng(0)
    probs = rng.beta(0.5, 2.0, size=(200_000, 1))
    labels = (rng.random(probs.shape) < probs).astype(float)
    threshold = choose_thresholds(labels, probs)[0]
    assert threshold == pytest.approx(f1_at(labels, probs, threshold) / 2, abs=0.03)


def test_calibration_error_is_near_zero_for_calibrated_scores_only() -> None:
    rng = np.random.default_rng(0)
    probs = rng.random((50_000, 2))
    labels = (rng.random(probs.shape) < probs).astype(float)
    assert compute_calibration_error(labels, probs) < 0.01
    assert compute_calibration_error(labels, probs**2) > 0.1


def test_calibration_error_matches_a_hand_computation() -> None:
    labels = np.array([[1.0], [0.0], [1.0], [np.nan]])
    probs = np.array([[0.91], [0.93], [0.55], [0.01]])
    table = compute_calibration(labels, probs, 5)
    assert table.count.tolist() == [0, 0, 1, 0, 2]
    assert table.observed_rate[4] == 0.5 and table.mean_prob[4] == pytest.approx(0.92)
    assert np.isnan(table.mean_prob[0]) and table.lower[4] == pytest.approx(0.8) and table.upper[4] == 1
    assert compute_calibration_error(labels, probs, 5) == pytest.approx((2 * 0.42 + 0.45) / 3)


def test_probability_one_belongs_to_the_last_bin() -> None:
    table = compute_calibration(np.array([1.0, 0.0]), np.array([1.0, 0.0]), 15)
    assert table.count[14] == 1 and table.count[0] == 1 and table.count.sum() == 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_undoes_a_known_scaling(temperature: float) -> None:
    rng = np.random.default_rng(0)
    calibrated = rng.normal(0, 2, size=(40_000, 2))
    labels = (rng.random(calibrated.shape) < sigmoid(calibrated)).astype(float)
    labels[::7] = np.nan
    assert fit_temperature(labels, calibrated * temperature) == pytest.approx(temperature, rel=0.05)


def test_temperature_stays_bounded_and_defaults_to_one() -> None:
    separated = fit_temperature(np.array([[1.0], [0.0]]), np.array([[3.0], [-3.0]]))
    assert 0.02 <= separated < 0.5
    assert fit_temperature(np.array([[np.nan]]), np.array([[3.0]])) == 1.0


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


def test_efficiency_counts_embeddings_apart() -> None:
    model = TinyClassifier()
    counts = count_parameters(model)
    assert counts["parameters_embeddings"] == (50 + 24 + 2) * 16 + 2 * 16  # words, positions, types, LayerNorm
    assert counts["parameters_head"] == 16 * 8 + 8 + 8 * 3 + 3
    assert counts["parameters_encoder"] == sum(p.numel() for p in model.encoder.encoder.parameters())
    assert counts["parameters_total"] == sum(p.numel() for p in model.parameters())


def test_model_without_an_encoder_is_all_encoder() -> None:
    assert count_parameters(nn.Linear(4, 3)) == {
        "parameters_total": 15,
        "parameters_embeddings": 0,
        "parameters_encoder": 15,
        "parameters_head": 0,
    }


def test_measured_efficiency_is_complete_and_positive() -> None:
    model = TinyClassifier().train()
    efficiency = measure_efficiency(model, list(LengthSortedLoader()), "cpu", time_budget_s=0.02)
    assert set(efficiency) == {
        *count_parameters(model),
        "size_mb",
        "latency_ms_batch1",
        "latency_ms_batch32",
        "throughput_per_s",
    }
    assert all(value > 0 for value in efficiency.values())
    assert efficiency["size_mb"] == pytest.approx(efficiency["parameters_total"] * 4 / 1e6)
    assert model.training and model.encoder.training


def test_timed_batches_hold_the_rows_asked_for_and_no_needless_padding() -> None:
    shapes = set()

    class Recorder(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            shapes.add((len(input_ids), bool(attention_mask.any(dim=0).all())))
            return {"logits": attention_mask.float()}

    measure_efficiency(Recorder(), list(LengthSortedLoader()), "cpu", time_budget_s=0.01)
    assert shapes == {(1, True), (32, True)}


def efficiency_of(millions: float, embeddings: float, latency_ms: float) -> dict[str, float]:
    return {
        "parameters_total": millions * 1e6,
        "parameters_embeddings": embeddings * 1e6,
        "parameters_encoder": (millions - embeddings - 0.2) * 1e6,
        "parameters_head": 0.2e6,
        "size_mb": millions * 4,
        "latency_ms_batch1": latency_ms,
        "latency_ms_batch32": latency_ms * 20,
        "throughput_per_s": 32_000 / (latency_ms * 20),
    }


def test_comparison_gives_ratios_above_one_for_a_cheaper_student() -> None:
    comparison = compare_efficiency(efficiency_of(110, 24.6, 40), efficiency_of(55, 12.3, 10))
    assert comparison["ratios"] == pytest.approx(
        {
            "compression": 2,
            "encoder_compression": 85.2 / 42.5,
            "size": 2,
            "latency_batch1": 4,
            "latency_batch32": 4,
            "throughput": 4,
        }
    )
    assert "2.00 times smaller" in comparison["remark"]


def test_remark_says_plainly_that_a_student_is_not_smaller() -> None:
    remark = compare_efficiency(efficiency_of(110, 24.6, 40), efficiency_of(135.3, 92.2, 50))["remark"]
    assert remark.startswith("the student is not smaller than the teacher: 135.3 M against 110.0 M parameters")
    assert "92.2 M" in remark and "only 0.80 times" in remark and "\n" not in remark


def test_thresholds_come_from_validation_and_serve_the_test_part() -> None:
    validation, test = random_case(seed=1), random_case(seed=2)
    scores, thresholds = evaluate_model(NAMES, validation=validation, test=test)
    cuts = choose_thresholds(*validation)
    assert list(thresholds.values()) == cuts.tolist()
    assert scores["test"]["tuned"] == compute_metrics(*test, cuts, NAMES)
    assert scores["test"]["at_0.5"] == compute_metrics(*test, 0.5, NAMES)
    assert scores["validation"]["tuned"]["f1_macro"] >= scores["validation"]["at_0.5"]["f1_macro"]


def test_logit_undoes_sigmoid_and_stays_finite_at_the_ends() -> None:
    logits = np.linspace(-30, 30, 121)
    np.testing.assert_allclose(logit(sigmoid(logits)), logits, rtol=1e-3)
    np.testing.assert_allclose(logit(sigmoid(logits[:80])), logits[:80], rtol=1e-5, atol=1e-12)
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()


def test_scaling_by_the_fitted_temperature_mends_a_model_that_is_too_sure() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3000, 2))
    labels = (rng.random(logits.shape) < sigmoid(logits)).astype(float)
    labels[:50, 0] = np.nan
    too_sure = sigmoid(3 * logits)
    scores, _ = evaluate_model(["a", "b"], validation=(labels, too_sure), test=(labels, too_sure))
    calibration = scores["test"]["calibration"]
    assert calibration["temperature"] == pytest.approx(3, rel=0.1)
    assert calibration["ece"] < 0.3 * scores["test"]["at_0.5"]["ece"]
    assert calibration["brier"] < scores["test"]["at_0.5"]["brier"]
    assert calibrate(labels, too_sure, 1.0)["brier"] == pytest.approx(scores["test"]["at_0.5"]["brier"])


@pytest.mark.parametrize("t_squared", [True, False])
def test_soft_loss_is_the_one_that_training_sees(t_squared: bool) -> None:
    rng = np.random.default_rng(0)
    teacher, student = (rng.normal(scale=3, size=(50, 3)).astype(np.float32) for _ in range(2))
    found = compute_soft_loss(sigmoid(teacher), sigmoid(student), 4.0, t_squared=t_squared)
    expected = soft_bce_loss(torch.from_numpy(student), torch.from_numpy(teacher), 4.0, t_squared=t_squared).mean()
    assert found["soft_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["soft_excess"] > 0
    assert compute_soft_loss(sigmoid(teacher), sigmoid(teacher), 4.0)["soft_excess"] == 0


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
