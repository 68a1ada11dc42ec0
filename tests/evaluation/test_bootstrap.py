import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, hamming_loss

from research.evaluation import bootstrap as statistics


def load_benchmark(name):
    """Import a file of benchmarks/, which is no package."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


coverage = load_benchmark("coverage")


def make_case(num_rows=60, num_labels=3, seed=0, unknown=0.0):
    """Return labels (N, C), some of them nan, and probs (N, C) with ties."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_rows, num_labels)) < [0.5, 0.3, 0.1][:num_labels]).astype(float)
    probs = np.round(np.clip(0.3 * labels + 0.8 * rng.random(labels.shape), 0, 1), 1)
    labels[rng.random(labels.shape) < unknown] = np.nan
    return labels, probs


def plain(name, labels, probs, thresholds=None):
    return statistics.score_rows([statistics.build_metric(name, labels, probs, thresholds)], len(labels))[0]


def loop_f1_macro(labels, probs, rows):
    """Macro-F1 of drawn rows by counting one cell at a time."""
    scores = []
    for column in range(labels.shape[1]):
        hits = marked = 0
        for row in rows:
            if not math.isnan(labels[row, column]):
                called = probs[row, column] >= 0.5
                hits += called and labels[row, column] == 1
                marked += int(called) + int(labels[row, column])
        scores.append(2 * hits / marked if marked else 0.0)
    return sum(scores) / len(scores)


def rows_of(weights):
    """List the drawn rows of each resample, (N, R) counts."""
    return [np.repeat(np.arange(len(weights)), column.astype(int)) for column in weights.T]


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_bootstrap_equals_a_plain_loop_over_resamples(unknown):
    labels, probs = make_case(num_rows=12, unknown=unknown)
    (weights,) = statistics.draw_weights(12, 25, seed=3)
    expected = [loop_f1_macro(labels, probs, rows) for rows in rows_of(weights)]
    metric = statistics.build_metric("f1_macro", labels, probs)
    assert statistics.bootstrap([metric], 12, 25, seed=3)[0] == pytest.approx(expected, abs=1e-12)


def test_average_precision_of_resamples_equals_sklearn_on_the_drawn_rows():
    labels, probs = make_case(num_rows=40, num_labels=2)
    (weights,) = statistics.draw_weights(40, 10, seed=1)
    expected = [average_precision_score(labels[rows], probs[rows], average="macro") for rows in rows_of(weights)]
    metric = statistics.build_metric("average_precision_macro", labels, probs)
    assert metric(weights) == pytest.approx(expected, abs=1e-6)


def test_scores_equal_sklearn():
    labels, probs = make_case()
    called = (probs >= 0.5).astype(int)
    expected = {
        "f1_macro": f1_score(labels, called, average="macro", zero_division=0),
        "f1_micro": f1_score(labels, called, average="micro", zero_division=0),
        "average_precision_macro": average_precision_score(labels, probs, average="macro"),
        "subset_accuracy": np.mean((labels == called).all(axis=1)),
        "hamming_loss": hamming_loss(labels, called),
    }
    assert {name: plain(name, labels, probs) for name in expected} == pytest.approx(expected, abs=1e-6)


def test_unknown_cells_are_left_out_of_every_score():
    labels, probs = make_case(unknown=0.3)
    known = ~np.isnan(labels)
    called = probs >= 0.5
    macro = [f1_score(labels[k, c], called[k, c], zero_division=0) for c, k in enumerate(known.T)]
    precisions = [average_precision_score(labels[k, c], probs[k, c]) for c, k in enumerate(known.T)]
    complete = known.all(axis=1)
    assert plain("f1_macro", labels, probs) == pytest.approx(np.mean(macro))
    assert plain("average_precision_macro", labels, probs) == pytest.approx(np.mean(precisions), abs=1e-6)
    assert plain("hamming_loss", labels, probs) == pytest.approx(np.mean(labels[known] != called[known]))
    assert plain("subset_accuracy", labels, probs) == pytest.approx(np.mean((labels == called)[complete].all(axis=1)))


def test_label_without_positives_scores_zero_f1_and_no_average_precision():
    labels, probs = make_case(num_labels=2)
    labels[:, 1] = 0
    assert plain("f1_macro", labels, probs) == pytest.approx(plain("f1_macro", labels[:, :1], probs[:, :1]) / 2)
    assert plain("average_precision_macro", labels, probs) == pytest.approx(
        plain("average_precision_macro", labels[:, :1], probs[:, :1])
    )


def test_probability_at_the_threshold_is_a_yes():
    labels = np.array([[1.0], [0.0]])
    probs = np.array([[0.7], [0.69]])
    assert plain("f1_macro_tuned", labels, probs, [0.7]) == 1.0
    assert plain("f1_macro_tuned", labels, probs, [0.71]) == 0.0


def test_every_resample_draws_as_many_rows_as_there_are(monkeypatch):
    whole = np.concatenate(list(statistics.draw_weights(50, 40, seed=0)), axis=1)
    monkeypatch.setattr(statistics, "CHUNK_CELLS", 50 * 7)
    sliced = list(statistics.draw_weights(50, 40, seed=0))
    assert whole.shape == (50, 40)
    assert (whole.sum(axis=0) == 50).all()
    assert [part.shape[1] for part in sliced] == [7, 7, 7, 7, 7, 5]


def test_one_model_against_itself_differs_by_nothing_with_p_one():
    labels, probs = make_case()
    estimate, same, difference = statistics.compare_predictions(labels, probs, probs, resamples=200)
    assert estimate == same
    assert (difference.value, difference.low, difference.high, difference.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_interval_excludes_zero_exactly_when_p_is_below_one_minus_level():
    rng = np.random.default_rng(0)
    for shift in np.linspace(0, 4, 41):
        resampled = rng.standard_normal(500)
        difference = statistics.paired_difference(shift, shift + resampled, 0.0, np.zeros(500))
        assert (difference.low > 0) == (difference.p_value < 0.05)


def test_p_value_of_a_large_difference_survives_fifty_comparisons():
    labels, probs = make_case(num_rows=400)
    _, _, difference = statistics.compare_predictions(labels, labels, probs, resamples=500)
    assert statistics.holm([difference.p_value] + [0.9] * 49)[0] < 0.01


def test_interval_of_an_undefined_score_is_undefined():
    labels, probs = np.zeros((10, 2)), np.full((10, 2), 0.2)
    estimate, _, difference = statistics.compare_predictions(labels, probs, probs, "average_precision_macro", resamples=100)
    assert all(map(math.isnan, (estimate.value, estimate.low, difference.value, difference.p_value)))


def test_holm_equals_a_hand_computation():
    # Sorted: 0.005*4 = 0.02, 0.01*3 = 0.03, 0.03*2 = 0.06, then 0.04*1 = 0.04 lifted to 0.06.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_holm_leaves_out_comparisons_that_could_not_be_made():
    corrected = statistics.holm([math.nan, 0.02, 0.04])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.04, 0.04])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_the_plain_and_the_bonferroni_value(p_values):
    for plain_p, corrected in zip(p_values, statistics.holm(p_values), strict=True):
        assert plain_p <= corrected <= max(plain_p, min(1.0, len(p_values) * plain_p))


def test_paired_t_test_equals_scipy():
    from scipy.stats import ttest_1samp

    differences = [0.02, 0.035, 0.01, 0.018]
    assert statistics.paired_t_test(differences) == pytest.approx(ttest_1samp(differences, 0).pvalue)


def test_shared_training_rows_weaken_the_paired_t_test():
    differences = [0.02, 0.035, 0.01, 0.018]
    assert statistics.paired_t_test(differences, overlap=0.25) > statistics.paired_t_test(differences)


@pytest.mark.parametrize(("differences", "expected"), [([0.0, 0.0], 1.0), ([0.1, 0.1], 0.0), ([0.1], math.nan), ([], math.nan)])
def test_paired_t_test_of_degenerate_differences(differences, expected):
    assert statistics.paired_t_test(differences) == pytest.approx(expected, nan_ok=True)


def test_mean_and_std_of_one_seed_has_no_std():
    assert statistics.mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(statistics.mean_and_std([0.5])[1])


def test_intervals_keep_their_level_in_simulation():
    # Seeded, so the figures never move. Of 300 simulations a share of 95 % has a standard error of 1.3 %, a
    # share of 5 % likewise, so the bounds lie three away; benchmarks/coverage.py with 1,000 is the sharp form.
    settings = [coverage.Setting("f1_macro", 400, 0.3, 0.9)]
    measured = coverage.run(simulations=300, resamples=300, seed=1, settings=settings)
    (figures,) = measured["coverage"]
    assert 0.91 <= figures["difference_coverage"] <= 0.99
    assert 0.91 <= figures["score_coverage"] <= 0.99
    assert max(measured["false_claims_after_holm"].values()) <= 0.09


def test_simulated_models_reach_their_true_scores():
    for metric in ("f1_macro", "average_precision_macro"):
        setting = coverage.Setting(metric, 100_000, 0.0, 0.5)
        labels, (probs,) = coverage.simulate_rows(np.random.default_rng(0), setting, [2.0])
        assert plain(metric, labels, probs) == pytest.approx(coverage.true_score(metric, 2.0), abs=0.01)


def test_statistics_imports_neither_torch_nor_sklearn():
    code = "import sys, research.evaluation.bootstrap; print([n for n in ('torch', 'sklearn', 'scipy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
