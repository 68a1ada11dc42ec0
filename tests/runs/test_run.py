"""A finished run, read back from its directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.small_runs import LABELS, make_metrics, write_run

from research.errors import InputError
from research.runs.run import Run, load_run, result_line


def test_config_keeps_every_digit(tmp_path: Path) -> None:
    assert load_run(write_run(tmp_path / "run")).config["lr"] == 1.5e-6


def test_run_survives_the_round_trip(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    generator = np.random.default_rng(0)
    labels = (generator.random((20, 2)) < 0.4).astype(float)
    labels[0, 0] = np.nan
    predictions = run.predictions
    assert predictions.label_names == LABELS and predictions.index.tolist() == list(range(20))
    np.testing.assert_array_equal(predictions.labels, labels)
    np.testing.assert_allclose(predictions.probs["teacher"], generator.random((20, 2)), atol=5e-7)
    assert run.history[0]["learning_rate"] == 1.5e-6 and run.history[0]["hidden_loss"] is None
    assert run.metrics["student"]["test"]["tuned"]["ece"] is None


def test_unfinished_and_missing_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run directory"):
        load_run(tmp_path / "nowhere")
    path = write_run(tmp_path / "run")
    (path / "predictions.csv").unlink()
    with pytest.raises(InputError, match=r"predictions\.csv is missing"):
        _ = load_run(path).predictions
    (path / "metrics.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        load_run(path)


def test_result_line_is_the_run_and_its_headline() -> None:
    assert result_line("results/x", make_metrics()) == "results/x  student test f1_macro=0.7123 (teacher 0.7345)"
    assert result_line("x", make_metrics(("teacher",))) == "x  teacher test f1_macro=0.7345"


def test_run_of_one_split_is_its_own_fold(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    assert isinstance(run, Run) and run.folds == (run,) and run.num_folds == 1
