"""The tables of metrics and loss components: what is in them reaches every reader, and a row is all that a new one takes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.builders import ROOT
from support.comparison_runs import write_scored_run

from research.components import COMPONENT_NAMES, LOSS_COMPONENTS
from research.evaluation import bootstrap, gain
from research.evaluation.metrics import OVERALL_METRICS, compute_agreement
from research.names import LABEL_SCORES, METRIC_OF, METRICS, MODELS, SCORES_PER_EPOCH, THRESHOLDS, metrics_of
from research.report import figures, run_page
from research.report.trackers import final_scores
from research.runs.formats import HISTORY_COLUMNS
from research.runs.run import Run, load_run

STORED = {metric.name for metric in METRICS if not metric.tuned}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_scored_run(tmp_path_factory.mktemp("names") / "run"))


def test_metrics_json_holds_every_metric_at_both_thresholds(run: Run) -> None:
    for thresholds in THRESHOLDS:
        scores = run.metrics["student"]["test"][thresholds]
        assert set(scores) == STORED | {"per_label"}
        assert all(set(of_label) == set(LABEL_SCORES) for of_label in scores["per_label"].values())
    scaled = run.metrics["student"]["test"]["calibration"]
    assert set(scaled) == {"temperature", *(metric.name for metric in metrics_of("probabilities"))}


def test_a_metric_is_a_mean_over_labels_or_has_a_function() -> None:
    assert {metric.name for metric in METRICS if metric.mean_of is None} == set(OVERALL_METRICS)
    assert {metric.mean_of for metric in METRICS} - {None} <= set(LABEL_SCORES)


def test_report_shows_every_metric_and_every_score_of_a_label(run: Run) -> None:
    report = (run.path / "report.md").read_text(encoding="utf-8")
    headers = {cell for line in report.splitlines() if line.startswith("| ") for cell in line.strip("| ").split(" | ")}
    assert {METRIC_OF[name].short for name in STORED} <= headers
    assert set(LABEL_SCORES.values()) <= headers
    assert set(run_page.AGREEMENT_NAMES) == set(compute_agreement(np.eye(2), np.eye(2), ("a", "b")))


def test_history_and_curves_have_every_component_and_every_score_of_an_epoch(run: Run) -> None:
    with (run.path / "history.csv").open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file))
    expected = {*COMPONENT_NAMES, *(f"val_{name}" for name in SCORES_PER_EPOCH)}
    assert expected <= set(header) == {*HISTORY_COLUMNS, *COMPONENT_NAMES}
    optional = {component.name for component in LOSS_COMPONENTS if component.optional}
    assert set(COMPONENT_NAMES) - set(HISTORY_COLUMNS) == optional
    assert expected == {*figures.LOSS_CURVES, *figures.SCORE_CURVES}


def test_trackers_are_sent_every_metric(run: Run) -> None:
    sent = final_scores(run)
    assert all("/".join((model, "test", *METRIC_OF[name].path)) in sent for model in MODELS for name in STORED)


def test_what_can_be_resampled_has_a_row_and_can_be_compared() -> None:
    assert set(bootstrap.RESAMPLED) <= STORED
    assert set(bootstrap.RESAMPLED) <= set(bootstrap.COMPARED_METRICS) <= set(METRIC_OF)
    assert set(gain.GAIN_METRICS) <= set(bootstrap.COMPARED_METRICS)


NEW_METRICS = """
    Metric("ap_weighted", "weighted AP", "Weighted AP", "ranking", "average_precision", by_support=True, per_epoch=True),
    Metric("f1_micro_tuned", "micro-F1", "Micro-F1, tuned", tuned=True),
"""
NEW_COMPONENT = """
    LossComponent("margin_loss", "margin", "logits"),
"""
USE_THEM = """
import json
from pathlib import Path
from support.comparison_runs import write_scored_run
from research.compare.scores import compare_runs
from research.report.figures import LOSS_CURVES, SCORE_CURVES
from research.runs.run import load_run
run = load_run(write_scored_run(Path("run")))
print(json.dumps({
    "stored": run.metrics["student"]["test"]["tuned"]["ap_weighted"],
    "report": (run.path / "report.md").read_text(encoding="utf-8"),
    "history": run.history[0],
    "curves": [*LOSS_CURVES, *SCORE_CURVES],
    "compared": compare_runs([run.path], metrics=["f1_micro_tuned"], resamples=100).baseline.estimate.value,
}))
"""


def test_a_new_metric_and_a_new_loss_component_are_a_row_each(tmp_path: Path) -> None:
    """Done to a copy of the project, since the tables are read when the modules are imported."""
    for name in ("research", "tests/support"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "research_config.py", tmp_path)
    for name, end, rows in (("names", ")\nMETRIC_OF", NEW_METRICS), ("components", ")\nCOMPONENT_NAMES", NEW_COMPONENT)):
        path = tmp_path / "research" / f"{name}.py"
        text = path.read_text(encoding="utf-8")
        assert text.count(end) == 1
        path.write_text(text.replace(end, rows + end), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, tmp_path / "tests")))}
    done = subprocess.run(
        [sys.executable, "-c", USE_THEM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["stored"] < 1 and 0 < found["compared"] < 1
    assert "Weighted AP" in found["report"]
    assert {"val_ap_weighted", "margin_loss"} <= set(found["history"]) & set(found["curves"])
