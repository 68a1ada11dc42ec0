"""What a report says first: scores with intervals, what they mean, and what a reader must know before believing them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.comparison_runs import LABELS, make_truth, write_scored_run
from support.small_runs import make_metrics, write_run

from research.evaluation.inference import Scored
from research.evaluation.metrics import build_metrics
from research.report.intervals import Resampled, resample_run
from research.report.run_page import write_report
from research.report.verdict import describe_verdict, list_improving
from research.runs.folds import aggregate_folds
from research.runs.run import Run, load_run


def report_of(path: Path) -> str:
    write_report(path, plots=False)
    return (path / "report.md").read_text(encoding="utf-8")


def make_resampled(teacher: float, student: float, spread: float = 0.01) -> Resampled:
    """Two models whose difference varies by `spread` from one resample to the next."""
    noise = spread * np.tile([1.0, -1.0], 500)
    values = {"teacher": (teacher, np.full(1000, teacher)), "student": (student, student + noise)}
    scores = {(model, "f1_macro"): Scored(np.array([plain]), resampled[None]) for model, (plain, resampled) in values.items()}
    return Resampled(100, None, scores, {})


def test_every_score_and_difference_has_its_interval(tmp_path: Path) -> None:
    path = write_scored_run(tmp_path / "run")
    resampled = resample_run(load_run(path))
    assert resampled is not None
    student, gap = resampled.score("student", "f1_macro"), resampled.difference("student", "teacher", "f1_macro")
    assert student is not None and gap is not None
    row = next(line for line in report_of(path).splitlines() if line.startswith("| macro-F1 at 0.5 |"))
    assert f"{student.value:.4f} ({student.low:.4f} to {student.high:.4f})" in row
    assert f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})" in row
    assert student.low < student.value < student.high and gap.low < gap.value < gap.high


def test_plain_scores_are_those_of_metrics_json(tmp_path: Path) -> None:
    run = load_run(write_scored_run(tmp_path / "run"))
    resampled = resample_run(run)
    assert resampled is not None
    for model in ("teacher", "control", "student"):
        scores = run.metrics[model]["test"]
        found = [resampled.score(model, name) for name in ("f1_macro", "f1_macro_tuned", "average_precision_macro")]
        wanted = [scores["at_0.5"]["f1_macro"], scores["tuned"]["f1_macro"], scores["at_0.5"]["average_precision_macro"]]
        assert [entry and entry.value for entry in found] == pytest.approx(wanted, abs=1e-6)
        for label in LABELS:
            of_label = resampled.f1_of(model, label)
            assert of_label is not None and of_label.low <= of_label.value <= of_label.high
            assert of_label.value == pytest.approx(scores["tuned"]["per_label"][label]["f1"], abs=1e-6)


def test_rows_of_one_text_are_drawn_together() -> None:
    """Every row four times, as four rows of one text, is no more evidence than every row once."""
    truth, generator = make_truth(100), np.random.default_rng(3)
    probs = np.clip(0.5 + 0.3 * (truth - 0.5) + 0.2 * generator.standard_normal(truth.shape), 0, 1)
    parts = {"student": {"validation": probs, "test": probs}}
    metrics = build_metrics(LABELS, dict.fromkeys(("train", "validation", "test"), truth), parts, {})

    def width(copies: int, clusters: np.ndarray | None) -> float:
        predictions = SimpleNamespace(
            index=np.arange(100 * copies),
            label_names=LABELS,
            labels=np.repeat(truth, copies, axis=0),
            probs={"student": np.repeat(probs, copies, axis=0)},
            text_cluster=np.arange(100 * copies) if clusters is None else clusters,
            complete=clusters is not None,
        )
        run: Any = SimpleNamespace(has=lambda name: True, predictions=predictions, scores=metrics)
        resampled = resample_run(run)
        found = None if resampled is None else resampled.score("student", "f1_macro")
        assert found is not None
        return found.high - found.low

    once = width(1, None)
    assert width(4, np.repeat(np.arange(100), 4)) == pytest.approx(once, rel=1e-5)
    assert width(4, None) < 0.6 * once


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (0.80, "these rows cannot tell the student from its teacher: the difference is +0.0000 (95 % interval -0.01"),
        (0.70, "the student is below its teacher by 0.1000 (95 % interval -0.1"),
        (0.90, "the student is above its teacher by 0.1000 (95 % interval +0.0"),
    ],
)
def test_the_first_sentence_says_what_the_difference_to_the_teacher_means(tmp_path: Path, student: float, words: str) -> None:
    run = Run(tmp_path, {"pipeline": "kd_only", "seed": 7, "split_seed": 42}, make_metrics())
    first = describe_verdict(run, make_resampled(0.80, student)).blocks[0]
    assert words in str(first)


def test_rows_and_seeds_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path, {"pipeline": "kd_only", "seed": 7, "split_seed": 42}, make_metrics())
    assert "Measured on 20 test rows, seed 7, split seed 42. Intervals" in str(describe_verdict(run, make_resampled(0.8, 0.8)))
    assert "interval" not in str(describe_verdict(run, None)).lower()


def test_a_model_whose_best_epoch_is_its_last_is_called_still_improving(tmp_path: Path) -> None:
    metrics = make_metrics()
    metrics["training"] |= {"teacher": {"best_epoch": 3, "epochs_run": 3}, "student": {"best_epoch": 2, "epochs_run": 5}}
    run = Run(tmp_path, {"pipeline": "kd_only"}, metrics)
    assert list_improving(run) == ["teacher"]
    text = str(describe_verdict(run, None))
    assert "Still improving: teacher." in text and "--teacher_epochs" in text and "'--epochs'" not in text
    metrics["training"]["teacher"] = {"source": "checkpoint"}
    assert list_improving(run) == [] and "Still improving" not in str(describe_verdict(run, None))


def test_an_interval_needs_what_can_be_scored(tmp_path: Path) -> None:
    resampled = Resampled(10, None, {("student", "f1_macro"): Scored(np.full(1, np.nan), np.full((1, 5), np.nan))}, {})
    assert resampled.score("student", "f1_macro") is None and resampled.score("teacher", "f1_macro") is None
    assert resampled.difference("student", "teacher", "f1_macro") is None
    path = write_run(tmp_path / "run")
    (path / "predictions.csv").unlink()
    assert resample_run(load_run(path)) is None
    assert "95 %" not in report_of(path)


def test_flags_that_differ_from_their_defaults_are_listed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")  # whose alpha is the default
    report = report_of(path)
    assert "| `--lr` | 1.5e-06 | 2e-05 |" in report and "`--kd_alpha`" not in report


def test_report_of_folds_opens_with_the_scores_of_all_rows(tmp_path: Path) -> None:
    pooled = {
        "rows": 240,
        "texts": 230,
        "scores": {"f1_macro": {model: {"value": 0.71234, "low": 0.7, "high": 0.73} for model in ("teacher", "student")}},
        "gap": {"f1_macro": {"value": -0.02, "low": -0.03, "high": -0.01}},
        "kept": {"share": 0.99, "f1_macro": {"bound": -0.02, "kept": False, "rows_needed": 9000}},
    }
    for fold in (1, 2):
        write_run(tmp_path / "run" / f"fold_{fold}")
    folds = [load_run(tmp_path / "run" / f"fold_{fold}") for fold in (1, 2)]
    (tmp_path / "run" / "config.json").write_text((tmp_path / "run" / "fold_1" / "config.json").read_text())
    write_report(tmp_path / "run", aggregate_folds([fold.metrics for fold in folds]) | {"pooled": pooled}, plots=False)
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "| macro-F1 at 0.5 | 0.7123 (0.7000 to 0.7300) | 0.7123 (0.7000 to 0.7300) | -0.0200 (-0.0300 to -0.0100) |" in report
    assert "the student is below its teacher by 0.0200 (95 % interval -0.0300 to -0.0100)" in report
    assert "over all 240 rows of 230 distinct texts" in report and "9,000 (macro-F1 at 0.5)" in report
