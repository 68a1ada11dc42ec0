"""--pipeline tfidf: the same split and results directory as any run, without a model to load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.builders import QUICK_EXTRAS, make_table

import research_main
from research.compare.scores import compare_runs
from research.evaluation.calibration import sigmoid
from research.models.tfidf import load_tfidf
from research.runs.run import load_run

QUICK = "--pipeline tfidf --num_threads 1"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_table(tmp_path / "data" / "comments.csv", rows=120)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(flags: str) -> int:
    return research_main.main(f"{QUICK} {flags}".split(), QUICK_EXTRAS)


def test_two_directories_hold_the_same_bytes_and_a_model_that_answers_as_the_predictions_do(lab: Path) -> None:
    assert run("--output_dir results/a") == run("--output_dir results/b") == 0
    first, second = (lab / "results" / name for name in "ab")
    for name in ("metrics.json", "predictions.csv", "validation_predictions.csv", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    model, settings = load_tfidf(first / "student")
    lines = (lab / "data" / "comments.csv").read_text(encoding="utf-8-sig").splitlines()[1:]
    predictions = load_run(first).predictions
    texts = [lines[row].split(",")[0] for row in predictions.index.tolist()]
    np.testing.assert_allclose(sigmoid(model.predict_logits(texts)), predictions.probs["student"], rtol=1e-6)
    assert settings["thresholds"] == load_run(first).metrics["thresholds"]["student"]
    assert settings.keys() == {"labels", "text_normalization", "thresholds"}
    assert (first / "student" / "training_texts.npy").is_file()


def test_costs_and_report_are_those_of_a_model_without_seeds(lab: Path) -> None:
    assert run("--output_dir results/a") == 0
    costs = json.loads((lab / "results/a/efficiency.json").read_text(encoding="utf-8"))
    training = load_run(lab / "results/a").metrics["training"]["student"]
    assert costs["student"]["parameters_total"] == 5 * (training["ngrams"] + 1)
    assert {"latency_ms_batch1", "latency_ms_batch32", "throughput_per_s", "size_mb"} <= costs["student"].keys()
    report = (lab / "results/a/report.md").read_text(encoding="utf-8")
    assert "Macro-F1 of the student" in report and "from text to logits" in report and "seed 42" not in report.split("split")[0]


def test_folds_and_sweeps_leave_what_the_single_commands_do(lab: Path) -> None:
    assert run("--num_folds 2 --output_dir results/folds") == 0
    whole = load_run(lab / "results/folds")
    assert whole.metrics["pooled"]["rows"] == 120 and whole.num_folds == 2
    (result,) = compare_runs([whole.path], resamples=200).results
    assert result.estimate.value == pytest.approx(
        whole.metrics["pooled"]["scores"]["average_precision_macro"]["student"]["value"]
    )
    assert run("--sweep class_weights=on,off --output_dir results/sweep") == 0
    assert run("--no-class_weights --output_dir results/alone") == 0
    swept = lab / "results/sweep/class_weights_off"
    assert (swept / "predictions.csv").read_bytes() == (lab / "results/alone/predictions.csv").read_bytes()
    weighted = lab / "results/sweep/class_weights_on/predictions.csv"
    assert weighted.read_bytes() != (swept / "predictions.csv").read_bytes()


def test_select_by_chooses_the_penalty(lab: Path) -> None:
    path = lab / "data" / "comments.csv"
    header, *rows = path.read_text(encoding="utf-8-sig").splitlines()
    rng = np.random.default_rng(0)
    noisy = [f"{row.split(',')[0]},{','.join(map(str, rng.integers(0, 2, 5)))}" for row in rows]
    path.write_text("\n".join([header, *noisy]) + "\n", encoding="utf-8")
    assert run("--select_by f1_micro --output_dir results/a") == 0
    lines = [line for line in (lab / "results/a/run.log").read_text(encoding="utf-8").splitlines() if "inverse penalty" in line]
    scores = {float(line.split("penalty ")[1].split(":")[0]): float(line.split("f1_micro ")[1]) for line in lines}
    chosen = load_run(lab / "results/a").metrics["training"]["student"]["inverse_penalty"]
    assert len(set(scores.values())) > 1
    assert scores[chosen] == max(scores.values())
