"""Thresholds: the cuts of every rule against a search over all of them, and what leaves them as they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from research.evaluation.calibration import logit, sigmoid
from research.evaluation.metrics import build_metrics
from research.evaluation.thresholds import CALIBRATION_RIDGE, SHRINKAGE, THRESHOLD_RULES, choose_thresholds, fit_logistic
from research_config import ExperimentConfig


def f1_at(labels: np.ndarray, probs: np.ndarray, threshold: float) -> float:
    predicted = probs >= threshold
    return 2 * (predicted & (labels == 1)).sum() / max(predicted.sum() + labels.sum(), 1)


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


def draw_label(rows: int, seed: int, slope: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and logits of one label, (rows, 1), for which sigmoid(slope * z + shift) is calibrated."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, size=(rows, 1))
    return (rng.random(logits.shape) < expit(slope * logits + shift)).astype(float), logits


def test_rules_are_those_of_the_flag() -> None:
    flag = ExperimentConfig.__dataclass_fields__["threshold_rule"]
    assert tuple(THRESHOLD_RULES) == flag.metadata["choices"] and flag.default == "best_f1"


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_rules_leave_unknown_cells_out_and_labels_without_positives_at_one_half(rule: str) -> None:
    labels, logits = draw_label(300, seed=1)
    hidden = np.where(np.random.default_rng(0).random(labels.shape) < 0.3, np.nan, labels)
    known = ~np.isnan(hidden[:, 0])
    whole = np.concatenate([hidden, np.zeros_like(labels), np.full_like(labels, np.nan)], axis=1)
    probs = sigmoid(np.concatenate([logits, logits, logits], axis=1))
    altered = np.where(np.isnan(whole), 0.123, probs)
    found = choose_thresholds(whole, probs, rule)
    assert found[1:].tolist() == [0.5, 0.5]
    if rule != "shrunk":  # which looks at the other labels too
        assert found[0] == choose_thresholds(labels[known], probs[known, :1], rule)[0]
    np.testing.assert_array_equal(choose_thresholds(whole, altered, rule), found)


def test_calibration_equals_scikit_learn_where_the_ridge_is_weak_beside_the_rows() -> None:
    labels, logits = draw_label(20_000, seed=2, slope=0.6, shift=-1.5)
    fitted = LogisticRegression(C=np.inf, tol=1e-8).fit(logits, labels[:, 0])
    found = fit_logistic(labels[:, 0] == 1, logits[:, 0])
    assert found == pytest.approx((fitted.coef_[0, 0], fitted.intercept_[0]), abs=2e-3)


def test_calibration_minimises_cross_entropy_and_ridge_of_few_rows() -> None:
    labels, logits = draw_label(12, seed=3)

    def loss(slope: float, shift: float) -> float:
        probs = expit(slope * logits + shift)
        entropy = -(labels * np.log(probs) + (1 - labels) * np.log(1 - probs)).sum()
        return float(entropy + CALIBRATION_RIDGE / 2 * ((slope - 1) ** 2 + shift**2))

    slope, shift = fit_logistic(labels[:, 0] == 1, logits[:, 0])
    around = [loss(slope + 0.01 * right, shift + 0.01 * up) for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    assert loss(slope, shift) < min(around)


def test_calibration_of_parted_or_reversed_scores_is_finite_and_keeps_the_ranking() -> None:
    positive = np.array([False, False, True, True])
    slope, shift = fit_logistic(positive, np.array([-2.0, -1.0, 1.0, 2.0]))
    assert slope > 1 and np.isfinite([slope, shift]).all()
    assert fit_logistic(positive, np.array([2.0, 1.0, -1.0, -2.0]))[0] > 0
    assert np.isfinite(fit_logistic(np.array([True, True]), np.array([-1.0, 1.0]))).all()


def test_half_f1_is_the_cut_with_the_best_expected_f1_of_the_calibrated_probabilities() -> None:
    labels, logits = draw_label(3000, seed=4, slope=0.5, shift=-1.0)
    threshold = choose_thresholds(labels, sigmoid(logits), "half_f1")[0]
    slope, shift = fit_logistic(labels[:, 0] == 1, logits[:, 0])
    probs = expit(slope * logits[:, 0] + shift)
    expected = {cut: 2 * probs[probs >= cut].sum() / ((probs >= cut).sum() + probs.sum()) for cut in np.sort(probs)[::100]}
    best = max(expected.values())
    of_threshold = sigmoid(slope * logit(np.array(threshold)) + shift)
    yes = probs >= of_threshold
    assert of_threshold == pytest.approx(best / 2, abs=1e-3)
    assert 2 * probs[yes].sum() / (yes.sum() + probs.sum()) >= best


def test_half_f1_scores_better_on_new_rows_than_the_best_cut_of_few() -> None:
    """The reason for the rule: averaged over draws, where validation holds few rows."""
    new_labels, new_logits = draw_label(20_000, seed=99, slope=0.7, shift=-1.5)
    gains = []
    for seed in range(60):
        labels, logits = draw_label(150, seed, slope=0.7, shift=-1.5)
        cuts = [choose_thresholds(labels, sigmoid(logits), rule)[0] for rule in ("half_f1", "best_f1")]
        half, best = (f1_at(new_labels[:, 0], sigmoid(new_logits[:, 0]), cut) for cut in cuts)
        gains.append(half - best)
    assert np.mean(gains) > 2 * np.std(gains) / np.sqrt(len(gains))


def test_shrunk_cut_lies_between_the_label_s_own_and_the_common_one_by_its_positives() -> None:
    pairs = [draw_label(400, seed=5, shift=1.0), draw_label(400, seed=6, shift=-2.0)]
    labels, logits = (np.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True))
    probs = sigmoid(logits)
    cuts = np.unique(probs)
    midpoints = np.concatenate([cuts[:1], (cuts[1:] + cuts[:-1]) / 2])
    macro = [np.mean([f1_at(labels[:, label], probs[:, label], cut) for label in range(2)]) for cut in midpoints]
    common = logit(midpoints[np.argmax(macro)])
    share = labels.sum(axis=0) / (labels.sum(axis=0) + SHRINKAGE)
    expected = share * logit(choose_thresholds(labels, probs)) + (1 - share) * common
    np.testing.assert_allclose(logit(choose_thresholds(labels, probs, "shrunk")), expected, rtol=1e-9)


def test_every_model_of_a_run_gets_the_rule_and_no_score_at_one_half_changes() -> None:
    labels, logits = draw_label(200, seed=7)
    parts = {part: labels for part in ("train", "validation", "test")}
    probs = {model: dict.fromkeys(("validation", "test"), sigmoid(logits - 1)) for model in ("teacher", "student")}
    plain, half = (build_metrics(["a"], parts, probs, {}, threshold_rule=rule) for rule in ("best_f1", "half_f1"))
    cut = choose_thresholds(labels, sigmoid(logits - 1), "half_f1")[0]
    assert half["thresholds"] == {model: {"a": cut} for model in probs}
    assert cut != plain["thresholds"]["student"]["a"]
    assert half["student"]["test"]["at_0.5"] == plain["student"]["test"]["at_0.5"]
    assert half["student"]["test"]["tuned"]["per_label"]["a"]["threshold"] == cut
