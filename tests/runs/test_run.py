"""A finished run, read back from its directory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.small_runs import LABELS, make_metrics, write_run

from research.errors import InputError
from research.evaluation.calibration import sigmoid
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
    logits = (2 * generator.standard_normal((20, 2))).astype(np.float32)
    np.testing.assert_array_equal(predictions.probs["teacher"], sigmoid(logits))
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


@pytest.mark.parametrize(
    ("column", "cell", "complaint"),
    [
        ("logit_student_", "1e99", "a finite logit, got 1e+99"),
        ("logit_teacher_", "inf", "a finite logit, got inf"),
        ("logit_student_", "", "a finite logit, got an empty cell"),
        ("text_cluster", "", "a row number, got an empty cell"),
        ("true_", "2", "0, 1 or empty, got 2"),
        ("index", "-1", "a row number, got -1"),
        ("index", "inf", "a row number, got inf"),
        ("index", "0.5", "a row number, got 0.5"),
    ],
)
def test_cell_that_no_run_writes_is_named(tmp_path: Path, column: str, cell: str, complaint: str) -> None:
    path = write_run(tmp_path / "run") / "predictions.csv"
    lines = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    place = next(place for place, name in enumerate(lines[0]) if name.startswith(column))
    lines[4][place] = cell
    path.write_text("".join(",".join(cells) + "\n" for cells in lines), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        _ = load_run(tmp_path / "run").predictions
    assert f"predictions.csv, data row 4: {column}" in str(caught.value) and complaint in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("headline", 1e9), ("headline", {}), ("labels", 3), ("labels", None)])
def test_metrics_without_labels_or_headline_are_named(tmp_path: Path, name: str, value: object) -> None:
    path = write_run(tmp_path / "run") / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    with pytest.raises(InputError, match=r"metrics\.json holds no labels or no headline"):
        load_run(tmp_path / "run")


def test_result_line_is_the_run_and_its_headline() -> None:
    assert result_line("results/x", make_metrics()) == "results/x  student test f1_macro=0.7123 (teacher 0.7345)"
    assert result_line("x", make_metrics(("teacher",))) == "x  teacher test f1_macro=0.7345"


def test_run_of_one_split_is_its_own_fold(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    assert isinstance(run, Run) and run.folds == (run,) and run.num_folds == 1
