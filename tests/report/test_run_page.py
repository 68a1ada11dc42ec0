"""A run's report, on runs made with numpy alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.builders import ROOT
from support.small_runs import CONFIG, LABELS, make_metrics, write_run

from research.report.run_page import write_report
from research.runs.directory import RunDirectory
from research.runs.folds import aggregate_folds
from research.runs.run import load_run


def test_same_run_twice_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name / "run") for name in ("a", "b"))
    for path in (first, second):
        write_report(path)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len([path for path in files if path.suffix == ".png"]) == 4
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)


def test_report_of_folds_links_each_fold(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as run:
        run.claim(CONFIG)
        folds = [load_run(write_run(run.path / f"fold_{number}")) for number in (1, 2)]
        run.write_metrics(aggregate_folds([fold.metrics for fold in folds]))
    write_report(run.path)
    report = (run.path / "report.md").read_text(encoding="utf-8")
    assert "[fold_2](fold_2/report.md)" in report and "± 0.0000 over 2 folds" in report


def test_report_tells_the_files_and_escapes_labels(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    write_report(path)
    report = (path / "report.md").read_text(encoding="utf-8")
    assert "**0.7123**" in report and "keeps 97.0 % of its teacher's 0.7345" in report
    assert r"| a\|b&lt;script&gt; | teacher |" in report and "<script>" not in report
    assert "Nothing gained." in report and "python research_main.py --seed 1" in report
    assert all((path / "plots" / name).is_file() and name in report for name in ("training.png", "reliability.png"))


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_report_copes_with_one_model_and_few_files(tmp_path: Path, model: str) -> None:
    path = write_run(tmp_path / "run", (model,))
    for name in ("history.csv", "predictions.csv", "efficiency.json", "environment.json"):
        (path / name).unlink()
    write_report(path)
    report = (path / "report.md").read_text(encoding="utf-8")
    assert f"Macro-F1 of the {model}" in report and "Agreement" not in report and "label_f1.png" in report


def test_report_lists_what_each_part_holds(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    counts = {"bully": {"positive": 30, "known": 80}, "a|b<script>": {"positive": 5, "known": 50}}
    part = {"rows": 80, "distinct_texts": 79, "labels": counts}
    empty = part | {"rows": 0}
    dataset = {
        "label_names": list(LABELS),
        "parts": {"test": part, "train": part, "unlabelled": empty, "validation": part},
        "dropped_rows": {"main": 3, "test": 0},
        "duplicate_texts": 2,
        "conflicting_texts": 0,
        "leaked_rows": {"train": 1},
    }
    versions = {"python": "3.11.7"}
    RunDirectory(path).write_environment({"dataset": dataset, "data": {"dataset_sha256": "f" * 64}, "versions": versions})
    write_report(path)
    report = (path / "report.md").read_text(encoding="utf-8")
    assert "| Count | train | validation | test |" in report
    assert "| Positives: bully | 30 (37.5 %) |" in report and "5 (10.0 %) of 50 known" in report
    assert "3 rows without a text (main 3)" in report and "1 rows left out" in report and "contradicting" not in report
    assert "| python | 3.11.7 |" in report and "ffff" not in report and "label_names" not in report


def test_report_tells_the_training_of_each_model(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    write_report(path)
    report = (path / "report.md").read_text(encoding="utf-8")
    assert "| teacher | 1 | 2 | 0 |" in report and "| student | 1 | 2 | 0 |" in report
    assert "Student: total loss 0.5000 after the first epoch" in report and "{" not in report
    metrics = make_metrics()
    metrics["training"]["teacher"] = {"source": "checkpoint"}
    write_report(path, metrics)
    report = (path / "report.md").read_text(encoding="utf-8")
    assert "read from --teacher_checkpoint" in report and "| teacher | – |" not in report


def test_report_before_metrics_is_the_report_after(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    write_report(path)
    after = (path / "report.md").read_bytes()
    for name in ("metrics.json", "report.md"):
        (path / name).unlink()
    write_report(path, make_metrics())
    assert (path / "report.md").read_bytes() == after
    assert RunDirectory(path).status() == "unfinished"


def test_neither_torch_nor_matplotlib_is_imported() -> None:
    code = (
        "import sys, research.runs.run, research.runs.directory, research.report.figures, research.report.run_page; "
        "sys.exit(sorted({'torch', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_report_shows_the_spread_of_what_was_timed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    timed = {"parameters_total": 10, "throughput_per_s": 50.0}
    ratios = {"ratios": {"compression": 4.0, "throughput": 3.5}, "ratio_ranges": {"throughput": [3.1, 4.2]}}
    RunDirectory(path).write_efficiency({"teacher": timed, "student": timed, **ratios, "remark": "smaller"})
    write_report(path, plots=False)
    report = (path / "report.md").read_text(encoding="utf-8")
    assert "| 4.00 × |" in report and "| 3.50 × (3.10 to 4.20) |" in report and "in which both models are timed in turn" in report
