"""predictions.csv: the numbers behind metrics.json come back from it, of files of version 0.1 what they held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score
from support.comparison_runs import LABELS, make_logits, make_truth, write_run

from research.compare.scores import compare_runs
from research.errors import InputError
from research.evaluation.calibration import sigmoid
from research.evaluation.metrics import build_metrics
from research.runs.directory import RunDirectory
from research.runs.formats import read_json
from research.runs.run import Predictions, read_predictions
from research_config import ExperimentConfig, saved_settings


def write_and_read(folder: Path, labels: np.ndarray, logits: np.ndarray) -> Predictions:
    rows = range(len(labels))
    names = [f"label_{column}" for column in range(labels.shape[1])]
    RunDirectory(folder).write_predictions("test", rows, [row // 2 for row in rows], names, labels, {"student": logits})
    return read_predictions(folder / "predictions.csv")


@given(hnp.arrays(np.float32, (5, 2), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_logits_come_back_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, logits: np.ndarray) -> None:
    read = write_and_read(tmp_path_factory.mktemp("run"), np.zeros((5, 2)), logits)
    np.testing.assert_array_equal(read.probs["student"], sigmoid(logits))
    assert read.text_cluster.tolist() == [0, 0, 1, 1, 2]
    assert read.complete


def test_a_confident_model_keeps_its_ranking(tmp_path: Path) -> None:
    # Six decimals put every probability under 5e-7 on one rank; this model's logits lie about -16.
    truth = make_truth(400)
    logits = make_logits(truth, 2.0, 1) - np.float32(16)
    read = write_and_read(tmp_path, truth, logits)
    expected = average_precision_score(truth, sigmoid(logits), average="macro")
    assert average_precision_score(truth, read.probs["student"], average="macro") == expected
    assert average_precision_score(truth, np.round(sigmoid(logits), 6), average="macro") < expected - 0.2


def write_scored(path: Path, logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Write a run whose metrics.json is computed as a run does; returns its scores on the test part."""
    probs = {"student": dict.fromkeys(("validation", "test"), sigmoid(logits))}
    metrics = build_metrics(LABELS, dict.fromkeys(("train", "validation", "test"), truth), probs, {})
    directory = RunDirectory(path)
    path.mkdir()
    directory.write_config(saved_settings(ExperimentConfig(label_columns=LABELS)))
    directory.write_predictions("test", range(len(truth)), range(len(truth)), LABELS, truth, {"student": logits})
    directory.write_metrics(metrics)
    scores = read_json(path / "metrics.json")["student"]["test"]
    return {"f1_macro_tuned": scores["tuned"]["f1_macro"], "average_precision_macro": scores["at_0.5"]["average_precision_macro"]}


@pytest.mark.parametrize("shift", [0, 11, 16])
def test_comparing_gives_the_scores_of_metrics_json(tmp_path: Path, shift: float) -> None:
    truth = make_truth(300)
    for metric, value in write_scored(tmp_path / "run", make_logits(truth, 2.0, 1) - np.float32(shift), truth).items():
        (result,) = compare_runs([tmp_path / "run"], metrics=[metric], resamples=100).results
        assert round(result.estimate.value, 6) == value, metric
        assert value > 0.5


def test_thresholds_keep_every_digit(tmp_path: Path) -> None:
    truth = make_truth(300)
    write_scored(tmp_path / "run", make_logits(truth, 2.0, 1) - np.float32(16), truth)
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert all(0 < cut < 5e-6 for cut in metrics["thresholds"]["student"].values())
    per_label = metrics["student"]["test"]["tuned"]["per_label"]
    assert {label: scores["threshold"] for label, scores in per_label.items()} == metrics["thresholds"]["student"]


def test_a_file_of_version_0_1_is_read_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text("index,true_a,student_a\n4,1,0.700001\n7,,0.25\n", encoding="utf-8")
    read = read_predictions(path)
    assert read.probs["student"].tolist() == [[0.700001], [0.25]]
    assert read.text_cluster.tolist() == read.index.tolist() == [4, 7]
    assert not read.complete


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ("index,true_a,student_a\n4,1,1e9\n", "student_<label> must be a probability from 0 to 1, got 1e"),
        ("index,true_a,student_a\n4,-5,0.5\n", "true_<label> must be 0, 1 or empty, got -5"),
        (
            "index,text_cluster,true_a,logit_student_a,student_a\n4,4,1,inf,1\n",
            "a finite logit, got inf",
        ),
        ("index,text_cluster,true_a,student_a\n4,4,1,0.5\n", "lacks logit_student_a"),
    ],
)
def test_numbers_that_cannot_be_are_named(tmp_path: Path, cells: str, words: str) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(cells, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_predictions(path)


def test_a_run_without_logits_still_compares(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [line.split(",") for line in (run / "predictions.csv").read_text().splitlines()]
    old = [place for place, name in enumerate(lines[0]) if name != "text_cluster" and not name.startswith("logit_")]
    text = "".join(",".join(line[place] for place in old) + "\n" for line in lines)
    (run / "predictions.csv").write_text(text)
    assert len(compare_runs([run], resamples=100).results) == 1
