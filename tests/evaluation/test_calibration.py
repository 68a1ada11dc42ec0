"""Calibration: error, bins, and the temperature that mends it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from research.evaluation.calibration import (
    compute_calibration,
    compute_calibration_error,
    fit_temperature,
    logit,
    sigmoid,
)
from research.evaluation.metrics import calibrate, evaluate_model


def test_sigmoid_is_exact_and_never_overflows() -> None:
    logits = np.array([-1e4, -30.0, -1.5, 0.0, 1.5, 30.0, 1e4], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        probs = sigmoid(logits)
    np.testing.assert_allclose(probs, torch.sigmoid(torch.from_numpy(logits).double()).numpy(), rtol=1e-12)
    assert probs[4] < probs[5] < 1.0


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
