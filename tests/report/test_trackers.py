"""What each tracker is sent, through stand-ins for their libraries; tensorboard's own where it is installed."""

from __future__ import annotations

import importlib.util
import logging
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import research_main
from research.names import TRACKERS
from research.report.trackers import SENDERS, final_scores, history_rows, track_run
from research.runs.directory import RunDirectory
from research.runs.run import Run, load_run
from research_config import ExperimentConfig, check_config, parse_arguments, saved_settings

LABEL = "a$b"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with RunDirectory(tmp_path / "alpha_0.7") as directory:
        directory.claim(saved_settings(ExperimentConfig(label_columns=(LABEL,))))
        rows = [{"epoch": epoch, "total_loss": 1 / epoch, "val_f1_macro": 0.5} for epoch in (1, 2)]
        directory.write_history(rows)
        directory.write_history(rows[:1], "history_control.csv")
        scores = {"at_0.5": {"f1_macro": 0.7, "ece": None, "per_label": {LABEL: {"f1": 0.7}}}}
        directory.write_metrics(
            {
                "labels": [LABEL],
                "headline": {"model": "student", "part": "test", "metric": "f1_macro", "value": 0.7},
                "student": {"test": scores},
                "kd_gain": {"f1_macro": {"gain": 0.02}},
            }
        )
    return load_run(tmp_path / "alpha_0.7")


def record_calls(calls: list[tuple[str, Any]], *names: str) -> dict[str, Any]:
    """Return functions that write down their name and arguments."""

    def recorder(name: str) -> Any:
        return lambda *args, **kwargs: calls.append((name, args or kwargs if not (args and kwargs) else (*args, kwargs)))

    return {name: recorder(name) for name in names}


def test_every_tracker_of_the_flag_has_a_sender() -> None:
    assert set(SENDERS) == set(TRACKERS)


def test_epochs_of_student_and_control_go_under_one_step(run: Run) -> None:
    first, second = history_rows(run)
    row = {"total_loss": 1.0, "val_f1_macro": 0.5}
    assert first == (1, {f"{model}/{name}": value for model in ("student", "control") for name, value in row.items()})
    assert second == (2, {"student/total_loss": 0.5, "student/val_f1_macro": 0.5})


def test_final_scores_leave_out_what_is_undefined_and_keep_to_safe_names(run: Run) -> None:
    assert final_scores(run) == {
        "student/test/at_0.5/f1_macro": 0.7,
        "student/test/at_0.5/per_label/a_b/f1": 0.7,
        "kd_gain/f1_macro/gain": 0.02,
        "headline": 0.7,
    }


def test_wandb_gets_config_epochs_and_scores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    module: Any = ModuleType("wandb")
    session = SimpleNamespace(**record_calls(calls, "log", "finish"), summary={})

    def init(**settings: Any) -> Any:
        calls.append(("init", settings))
        return session

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    track_run("wandb", run)
    assert [name for name, _ in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1]["name"] == "alpha_0.7" and calls[0][1]["config"]["kd_alpha"] == 0.7
    assert calls[1][1] == (dict(history_rows(run))[1], {"step": 1})
    assert session.summary == final_scores(run)


def test_trackio_gets_the_final_scores_after_the_last_epoch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    module = ModuleType("trackio")
    vars(module).update(record_calls(calls, "init", "log", "finish"))
    monkeypatch.setitem(sys.modules, "trackio", module)
    track_run("trackio", run)
    assert [name for name, _ in calls] == ["init", "log", "log", "log", "finish"]
    assert calls[3][1] == (final_scores(run), {"step": 3})


def test_mlflow_gets_params_and_metrics_within_one_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    module: Any = ModuleType("mlflow")
    vars(module).update(record_calls(calls, "set_experiment", "log_params", "log_metrics"))

    @contextmanager
    def start_run(run_name: str) -> Any:
        calls.append(("start", run_name))
        yield
        calls.append(("end", None))

    module.start_run = start_run
    monkeypatch.setitem(sys.modules, "mlflow", module)
    track_run("mlflow", run)
    assert [name for name, _ in calls] == ["set_experiment", "start", "log_params", *["log_metrics"] * 3, "end"]
    assert calls[2][1][0]["kd_alpha"] == "0.7"
    assert calls[-2][1] == (final_scores(run),)


def test_a_tracker_out_of_reach_costs_a_warning_and_no_result(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module: Any = ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})

    def refuse(**_settings: Any) -> None:
        raise module.Error("not logged in")

    module.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", module)
    with caplog.at_level(logging.WARNING):
        track_run("wandb", run)
    assert "--track wandb: not logged in" in caplog.text and "complete" in caplog.text


def test_a_missing_package_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("research.experiment.command.run", lambda *_: pytest.fail("the run began"))
    for name in TRACKERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert research_main.main(["--track", name, "--demo"]) == 2
        assert f"pip install {name}" in capsys.readouterr().err


def test_tracking_decides_nothing_in_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    tracked = parse_arguments(["--track", "wandb", "--demo"]).config
    assert not [problem for problem in check_config(tracked) if problem.startswith("--track")]
    assert tracked.fingerprint == parse_arguments(["--demo"]).config.fingerprint
    assert "track" not in saved_settings(tracked)


def test_tensorboard_reads_back_what_was_sent(run: Run) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track_run("tensorboard", run)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    losses = events.Scalars("student/total_loss")
    assert [(event.step, round(event.value, 6)) for event in losses] == [(1, 1.0), (2, 0.5)]
    assert events.Scalars("final/headline")[0].value == pytest.approx(0.7)
