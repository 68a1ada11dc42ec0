"""--pipeline tfidf: the same split and results directory as any run, without a model to load."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.builders import LABELS, QUICK_EXTRAS, make_table

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


def test_labels_in_one_column_with_another_delimiter_give_the_same_run(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (lab / "data" / "comments.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, part in (("main", rows[:90]), ("test", rows[90:])):
        listed = [(row["text"], "|".join(label for label in sorted(LABELS) if row[label] == "1")) for row in part]
        plain = [(row["text"], *(row[label] for label in sorted(LABELS))) for row in part]
        write_rows(lab / f"{name}_listed.csv", [("text", "tags"), *listed], delimiter=";")
        write_rows(lab / f"{name}_plain.csv", [("text", *sorted(LABELS)), *plain])
    flags = "--dataset_path main_{0}.csv --test_path test_{0}.csv --output_dir results/{0}"
    assert run(flags.format("plain") + f" --label_columns {' '.join(sorted(LABELS))}") == 0
    assert run(flags.format("listed") + " --label_list_column tags") == 0
    said = capsys.readouterr().err
    assert "main_listed.csv: cells are separated by semicolons" in said and "test_listed.csv: cells are" in said
    for name in ("metrics.json", "predictions.csv"):
        assert (lab / "results/plain" / name).read_bytes() == (lab / "results/listed" / name).read_bytes(), name
    config = lab / "results/listed/config.json"
    assert run(f"--config {config} --output_dir results/again") == 0
    assert (lab / "results/again/config.json").read_bytes() == config.read_bytes()
    assert run(flags.format("listed") + " --label_list_column tags") == 0  # finished already
    assert run(flags.format("listed")) == 2  # another config


def test_texts_without_n_grams_in_common_are_refused_before_anything_is_written(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(chr(0x4E00 + 2 * row) + chr(0x4E01 + 2 * row), row % 2, row % 3 // 2) for row in range(60)]
    write_rows(lab / "apart.csv", [("text", "a", "b"), *((text, str(a), str(b)) for text, a, b in rows)])
    for flags in ("", "--dry_run"):
        assert run(f"--dataset_path apart.csv --label_columns a b --output_dir results/apart {flags}") == 2
        assert "error: --pipeline tfidf: 48 training texts have no n-grams in common" in capsys.readouterr().err
    assert not (lab / "results").exists()


def write_rows(path: Path, rows: Sequence[Sequence[str]], delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
