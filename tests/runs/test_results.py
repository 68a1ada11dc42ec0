"""The run directory on disk and its report, on runs made with numpy alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.errors import InputError
from research.report import figures, fonts
from research.report.run_page import write_report
from research.runs.directory import RunDirectory
from research.runs.folds import aggregate_folds
from research.runs.formats import read_csv, write_json_atomic, write_text_atomic
from research.runs.run import Run, load_run, result_line

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("bully", "a|b<script>")
CONFIG = {
    "pipeline": "kd_only",
    "kd_alpha": 0.7,
    "lr": 1.5e-6,
    "label_columns": None,
    "teacher_checkpoint": None,
}


def make_scores(f1: float) -> dict[str, Any]:
    per_label = {label: {"f1": f1, "threshold": 0.4, "average_precision": None, "support": 3} for label in LABELS}
    scores = {"f1_macro": f1, "f1_micro": f1 + 0.01, "ece": float("nan"), "per_label": per_label}
    return {part: {"at_0.5": scores, "tuned": scores} for part in ("validation", "test")}


def make_metrics(models: tuple[str, ...] = ("teacher", "student"), student_f1: float = 0.7123) -> dict[str, Any]:
    f1 = {"teacher": 0.7345, "control": 0.7, "student": student_f1}
    return {
        "labels": list(LABELS),
        "rows": {"train": 80, "validation": 10, "test": 20},
        "headline": {"model": models[-1], "part": "test", "metric": "f1_macro", "value": f1[models[-1]]},
        "training": {model: {"best_epoch": 1, "epochs_run": 2, "skipped_steps": 0} for model in models},
        **{model: make_scores(f1[model]) for model in models},
    }


def write_run(path: Path, models: tuple[str, ...] = ("teacher", "student")) -> Path:
    generator = np.random.default_rng(0)
    labels = (generator.random((20, 2)) < 0.4).astype(float)
    labels[0, 0] = np.nan
    probs = {model: generator.random((20, 2)) for model in models}
    with RunDirectory(path) as run:
        run.claim(CONFIG)
        run.write_history([{"epoch": 1, "total_loss": 0.5, "learning_rate": 1.5e-6, "val_f1_macro": 0.6}])
        run.write_predictions("test", range(20), LABELS, labels, probs)
        run.write_efficiency({models[0]: {"size_mb": 1.5}, "ratios": {}, "remark": "nothing gained"})
        run.write_environment({"command_line": "python research_main.py --seed 1", "device": "cpu"})
        run.write_metrics(make_metrics(models))
    return path


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_text_atomic(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_plain_rounded_and_sorted(tmp_path: Path) -> None:
    value = {
        "b": float("nan"),
        "a": (np.float32(0.1), np.int64(3), np.array([1e-9, -1e-9])),
        "ক": np.bool_(True),
    }
    write_json_atomic(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [0.1, 3, [0.0, 0.0]], "b": None, "ক": True}
    assert text.index('"a"') < text.index('"b"') < text.index('"ক"') and "-0.0" not in text and text.endswith("}\n")


def test_status_follows_the_files(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.status() == "absent"
    with run:
        assert run.claim(CONFIG) == "absent"
        assert run.status() == "unfinished"
    assert not (run.path / ".lock").exists()
    with run:
        assert run.claim(CONFIG) == "unfinished"
        run.write_metrics(make_metrics())
    assert run.claim(CONFIG) == "finished"


def test_config_keeps_every_digit(tmp_path: Path) -> None:
    assert load_run(write_run(tmp_path / "run")).config["lr"] == 1.5e-6


def test_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from research.runs.directory import RunDirectory; RunDirectory(sys.argv[1]).claim({'pipeline': 'kd_only'})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with RunDirectory(tmp_path / "run") as run:
        run.claim({"pipeline": "kd_only"})
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert refused.returncode == 1 and "being written by another process" in refused.stderr
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_other_config_is_refused_with_its_flags(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"another config: --kd_alpha 0\.7 there, 0\.5 asked\. Use another"):
        RunDirectory(path).claim({**CONFIG, "kd_alpha": 0.5})


def test_only_unresolved_flags_may_stay_open(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run:
        run.claim(CONFIG)
        run.write_config({**CONFIG, "label_columns": ["bully"], "teacher_checkpoint": "t"})
    with pytest.raises(InputError, match="another config: --teacher_checkpoint t there, unset asked"):
        run.claim(CONFIG, unresolved=("label_columns",))
    with pytest.raises(InputError, match="another config: --label_columns bully there, unset asked"):
        run.claim({**CONFIG, "teacher_checkpoint": "t"})
    with run:
        assert run.claim({**CONFIG, "teacher_checkpoint": "t"}, unresolved=("label_columns",)) == "unfinished"


def test_finished_run_is_refused_for_a_table_of_other_content(tmp_path: Path) -> None:
    run = RunDirectory(write_run(tmp_path / "run"))
    run.write_environment({"data": {"file_sha256": {"main": "a", "test": "b"}}})
    paths = {"main": Path("comments.csv"), "test": Path("test.csv")}
    run.check_tables({"main": "a", "test": "b"}, paths)
    with pytest.raises(InputError, match=r"was made from another content of test\.csv\. Use another --output_dir"):
        run.check_tables({"main": "a", "test": "c"}, paths)


def test_overwrite_keeps_foreign_files(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    write_run(path / "fold_1")
    (path / "plots").mkdir()
    foreign = [path / "notes.txt", path / "plots" / "mine.png", path / "fold_1" / "mine.txt"]
    for file in foreign:
        file.write_text("mine")
    with RunDirectory(path) as run:
        assert run.claim({**CONFIG, "kd_alpha": 0.5}, overwrite=True) == "absent"
        assert run.status() == "unfinished"
        assert all(file.read_text() == "mine" for file in foreign)
        left = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {".lock"}
    assert left == {"config.json", "notes.txt", "plots/mine.png", "fold_1/mine.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_never_written(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="holds no run of this suite"):
        RunDirectory(tmp_path).claim(CONFIG, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_unwritable_place_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").claim(CONFIG)


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


def test_same_run_twice_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name / "run") for name in ("a", "b"))
    for path in (first, second):
        write_report(path)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len([path for path in files if path.suffix == ".png"]) == 4
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("history.csv", "epoch,total_loss\n1,0.5"),
        ("history.csv", "epoch,total_loss\n1\n"),
        ("history.csv", "epoch\nx\n"),
    ],
)
def test_half_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=name):
        read_csv(tmp_path / name)


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


def test_folds_give_mean_and_sample_deviation() -> None:
    total = aggregate_folds([make_metrics(student_f1=0.6), make_metrics(student_f1=0.8)])
    assert total["mean"]["student"]["test"]["at_0.5"]["f1_macro"] == pytest.approx(0.7)
    assert total["std"]["student"]["test"]["at_0.5"]["f1_macro"] == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert total["mean"]["student"]["test"]["tuned"]["per_label"]["bully"]["average_precision"] is None
    assert result_line("x", total) == "x  student test f1_macro=0.7000 ± 0.1414 (teacher 0.7345)"


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


def test_thinning_keeps_the_ends_and_moves_no_curve_further_than_can_be_seen() -> None:
    recall = np.linspace(0, 1, 50_001)
    points = np.stack([recall, 1 - recall**2], axis=1)
    thinned = figures.thin_points(points)
    assert len(thinned) < 3_000
    assert (thinned[[0, -1]] == points[[0, -1]]).all()
    assert np.abs(np.interp(recall, thinned[:, 0], thinned[:, 1]) - points[:, 1]).max() < 2e-3
    assert len(figures.thin_points(points[:1])) == 1


def test_precision_recall_shares_a_point_among_ties() -> None:
    truth = np.array([True, False, True, False])
    precision, recall = figures.precision_recall_points(truth, np.array([0.9, 0.5, 0.5, 0.1]))
    np.testing.assert_allclose(precision, [1, 2 / 3, 1 / 2])
    np.testing.assert_allclose(recall, [1 / 2, 1, 1])


def test_missing_font_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    fonts._warn_missing_font.cache_clear()
    for _ in range(2):
        families = fonts.find_fonts("\U00010400")  # Deseret, which no ordinary machine draws
    assert families == ["DejaVu Sans"] or len(families) == 2
    assert len(caplog.records) == (len(families) == 1)


def test_neither_torch_nor_matplotlib_is_imported() -> None:
    code = (
        "import sys, research.runs.run, research.runs.directory, research.report.figures, research.report.run_page; "
        "sys.exit(sorted({'torch', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_run_of_one_split_is_its_own_fold(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    assert isinstance(run, Run) and run.folds == (run,) and run.num_folds == 1
