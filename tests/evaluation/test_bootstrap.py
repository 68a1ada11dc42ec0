import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, hamming_loss

from research.evaluation import bootstrap as statistics


def make_case(num_rows=60, num_labels=3, seed=0, unknown=0.0):
    """Return labels (N, C), some of them nan, and probs (N, C) with ties."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_rows, num_labels)) < [0.5, 0.3, 0.1][:num_labels]).astype(float)
    probs = np.round(np.clip(0.3 * labels + 0.8 * rng.random(labels.shape), 0, 1), 1)
    labels[rng.random(labels.shape) < unknown] = np.nan
    return labels, probs


def plain(name, labels, probs, thresholds=None):
    return statistics.score_texts([statistics.build_metric(name, labels, probs, thresholds)], len(labels))[0]


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


def test_a_label_without_known_cells_is_left_out_of_macro_f1():
    labels, probs = make_case()
    labels[:, 1] = np.nan
    assert plain("f1_macro", labels, probs) == pytest.approx(plain("f1_macro", labels[:, ::2], probs[:, ::2]))


def test_a_label_whose_known_cells_were_not_drawn_is_left_out_of_that_resample():
    labels, probs = make_case(num_labels=2)
    labels[1:, 1] = np.nan
    metric, alone = (statistics.build_metric("f1_macro", labels[:, :end], probs[:, :end]) for end in (2, 1))
    weights = np.ones((60, 1))
    weights[0] = 0
    assert metric(weights) == alone(weights)


@pytest.mark.parametrize("name", statistics.COMPARED_METRICS)
def test_a_drawn_text_brings_all_its_rows(name):
    labels, probs = make_case(num_rows=30, unknown=0.2)
    text = np.repeat(np.arange(10), 3)
    metric, rows = (
        statistics.build_metric(name, labels, probs, [0.4] * 3, text),
        statistics.build_metric(name, labels, probs, [0.4] * 3),
    )
    (weights,) = statistics.draw_weights(10, 25, seed=3)
    np.testing.assert_allclose(metric(weights), rows(np.repeat(weights, 3, axis=0)), rtol=1e-6)


def test_repeated_texts_widen_the_spread():
    labels, probs = make_case(num_rows=300)
    labels, probs = np.repeat(labels, 4, axis=0), np.repeat(probs, 4, axis=0)
    by_text = statistics.build_metric("f1_macro", labels, probs, text=np.repeat(np.arange(300), 4))
    by_row = statistics.build_metric("f1_macro", labels, probs)
    spreads = statistics.bootstrap([by_text], 300, 1000).std(), statistics.bootstrap([by_row], 1200, 1000).std()
    assert spreads[0] / spreads[1] == pytest.approx(2, rel=0.1)  # 300 texts say as much as 300 rows


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


def test_statistics_imports_neither_torch_nor_sklearn():
    code = "import sys, research.evaluation.bootstrap; print([n for n in ('torch', 'sklearn', 'scipy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
