"""What each tracker is sent and when, through stand-ins for their libraries; tensorboard's own where it is installed."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import research_main
from research.names import TRACKERS
from research.report.trackers import SESSIONS, final_scores, following, name_run
from research.runs.directory import TRACKING_FILE, RunDirectory
from research.runs.run import Run, load_run
from research_config import ExperimentConfig, check_config, parse_arguments, saved_settings

LABEL = "a$b"
ROWS = [{"epoch": epoch, "total_loss": 1 / epoch, "grad_norm": None, "val_f1_macro": 0.5} for epoch in (1, 2)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    with RunDirectory(tmp_path / "grid" / "alpha_0.7") as directory:
        directory.claim(saved_settings(ExperimentConfig(label_columns=(LABEL,))))
        scores = {"at_0.5": {"f1_macro": 0.7, "ece": None, "per_label": {LABEL: {"f1": 0.7}}}}
        directory.write_metrics(
            {
                "labels": [LABEL],
                "headline": {"model": "student", "part": "test", "metric": "f1_macro", "value": 0.7},
                "student": {"test": scores},
                "kd_gain": {"f1_macro": {"gain": 0.02}},
            }
        )
    return load_run(tmp_path / "grid" / "alpha_0.7")


class Recorder:
    """Stands for any library: each function notes its name and arguments; `returns` says what it gives back."""

    def __init__(self, calls: list[tuple[Any, ...]], **returns: Any) -> None:
        self.calls = calls
        self.returns = returns

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def note(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args, kwargs) if kwargs else (name, *args))
            return self.returns.get(name)

        return note


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **returns: Any) -> list[tuple[Any, ...]]:
    """Put a recorder in the place of a library; return what it notes."""
    calls: list[tuple[Any, ...]] = []
    module: Any = ModuleType(name)
    recorder = Recorder(calls, **returns)
    module.__getattr__ = lambda asked: getattr(recorder, asked)
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def send_all(tracker: str, run: Run) -> None:
    """Send two epochs of the student, one of its control, and the scores."""
    with following(tracker, run.path) as tracking:
        tracking.send_epochs("student", [])
        tracking.send_epochs("student", ROWS[:1])
        tracking.send_epochs("student", ROWS)
        tracking.send_epochs("control", ROWS[:1])
        tracking.finish()


def epoch_values(model: str, epoch: int) -> dict[str, float]:
    return {f"{model}/total_loss": 1 / epoch, f"{model}/val_f1_macro": 0.5}


def test_every_tracker_of_the_flag_has_a_session() -> None:
    assert set(SESSIONS) == set(TRACKERS)


def test_final_scores_leave_out_what_is_undefined_and_keep_to_safe_names(run: Run) -> None:
    assert final_scores(run) == {
        "student/test/at_0.5/f1_macro": 0.7,
        "student/test/at_0.5/per_label/a_b/f1": 0.7,
        "kd_gain/f1_macro/gain": 0.02,
        "headline": 0.7,
    }


def test_a_run_is_named_by_its_place(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_run(run.path) == name_run(Path("grid/alpha_0.7")) == "grid/alpha_0.7"
    monkeypatch.chdir(run.path)
    assert name_run(Path()) == run.path.resolve().as_posix()


def test_wandb_gets_each_epoch_on_its_models_own_axis(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    session = SimpleNamespace(log=None, summary={})
    for name in ("define_metric", "log", "finish"):
        setattr(session, name, getattr(Recorder(calls), name))
    begun = stand_in(monkeypatch, "wandb", init=session)
    send_all("wandb", run)
    ((_, settings),) = begun
    assert settings["name"] == "grid/alpha_0.7" and settings["resume"] == "allow" and settings["config"]["kd_alpha"] == 0.7
    assert calls == [
        ("define_metric", "student/epoch"),
        ("define_metric", "student/*", {"step_metric": "student/epoch"}),
        ("log", epoch_values("student", 1) | {"student/epoch": 1}),
        ("log", epoch_values("student", 2) | {"student/epoch": 2}),
        ("define_metric", "control/epoch"),
        ("define_metric", "control/*", {"step_metric": "control/epoch"}),
        ("log", epoch_values("control", 1) | {"control/epoch": 1}),
        ("finish",),
    ]
    assert session.summary == final_scores(run)


def test_trackio_gets_the_final_scores_after_the_last_epoch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "trackio")
    send_all("trackio", run)
    assert [name for name, *_ in calls] == ["init", "log", "log", "log", "log", "finish"]
    assert calls[2] == ("log", epoch_values("student", 2), {"step": 2})
    assert calls[4] == ("log", final_scores(run), {"step": 3})


def test_mlflow_gets_params_and_metrics_within_one_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "mlflow", start_run=SimpleNamespace(info=SimpleNamespace(run_id="7f")))
    send_all("mlflow", run)
    assert [name for name, *_ in calls] == ["set_experiment", "start_run", "log_params", *["log_metrics"] * 4, "end_run"]
    assert calls[1] == ("start_run", {"run_name": "grid/alpha_0.7"}) and calls[2][1]["kd_alpha"] == "0.7"
    assert calls[3] == ("log_metrics", epoch_values("student", 1), {"step": 1})
    assert calls[-2] == ("log_metrics", final_scores(run))


@pytest.mark.parametrize("tracker", ["mlflow", "wandb", "trackio"])
def test_a_later_session_goes_on_where_the_first_one_was(run: Run, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    sent: list[tuple[Any, ...]] = []
    begun = SimpleNamespace(info=SimpleNamespace(run_id="7f"), name="grid/alpha_0.7", summary={})
    for name in ("define_metric", "log", "finish"):
        setattr(begun, name, getattr(Recorder(sent), name))
    calls = stand_in(monkeypatch, tracker, init=begun, start_run=begun)
    with following(tracker, run.path) as tracking:
        tracking.send_epochs("student", ROWS[:1])
    monkeypatch.chdir(run.path.parent)
    with following(tracker, run.path) as tracking:
        tracking.send_epochs("student", ROWS)
        tracking.finish()
    assert [call[1]["student/total_loss"] for call in (*calls, *sent) if is_epoch(call)] == [1.0, 0.5]
    first, second = (call[-1] for call in calls if call[0] in ("init", "start_run"))
    if tracker == "mlflow":
        assert second == {"run_id": "7f"} and sum(call[0] == "log_params" for call in calls) == 1
    else:
        assert second["name"] == first["name"] == "grid/alpha_0.7" and second["resume"] == "allow"
        assert tracker != "wandb" or second["id"] == first["id"]


def test_another_tracker_is_sent_everything(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stand_in(monkeypatch, "trackio")
    second = stand_in(monkeypatch, "mlflow", start_run=SimpleNamespace(info=SimpleNamespace(run_id="7f")))
    for tracker in ("trackio", "mlflow"):
        with following(tracker, run.path) as tracking:
            tracking.send_epochs("student", ROWS)
    assert len([call for call in first if is_epoch(call)]) == len([call for call in second if is_epoch(call)]) == 2


def is_epoch(call: tuple[Any, ...]) -> bool:
    return len(call) > 1 and isinstance(call[1], dict) and "student/total_loss" in call[1]


def test_nothing_is_begun_without_the_flag(run: Run) -> None:
    send_all("none", run)
    assert not (run.path / TRACKING_FILE).exists() and not (run.path / "tensorboard").exists()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
@pytest.mark.parametrize(
    "error", [OSError("no network"), type("Error", (Exception,), {})("no network"), SystemExit("no network")]
)
def test_a_tracker_that_fails_costs_one_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str, error: BaseException
) -> None:
    def refuse(*_args: Any, **_settings: Any) -> None:
        raise error

    stand_in(monkeypatch, "trackio")
    setattr(sys.modules["trackio"], fails, refuse)
    with caplog.at_level(logging.WARNING):
        send_all("trackio", run)
    (warning,) = caplog.messages
    assert "--track trackio: " in warning and "no network; nothing more is sent" in warning and "\n" not in warning


def test_a_tracker_neither_prints_results_nor_draws_the_runs_random_numbers(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")

    def log(*_args: Any, **_settings: Any) -> None:
        print("a tracker's word")
        torch.manual_seed(0)

    stand_in(monkeypatch, "trackio")
    monkeypatch.setattr(sys.modules["trackio"], "log", log, raising=False)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    send_all("trackio", run)
    assert torch.equal(torch.rand(3), expected)
    printed = capsys.readouterr()
    assert printed.out == "" and "a tracker's word" in printed.err


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


def read_scalars(path: Path, tag: str) -> list[tuple[int, float]]:
    """Return (step, value) of what TensorBoard reads from a run directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard")).Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(tag)]


def test_tensorboard_reads_each_epoch_while_the_run_goes_on(run: Run) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with following("tensorboard", run.path) as tracking:
        tracking.send_epochs("student", ROWS[:1])
        assert read_scalars(run.path, "student/total_loss") == [(1, 1.0)]
        tracking.send_epochs("student", ROWS)
        assert read_scalars(run.path, "student/total_loss") == [(1, 1.0), (2, 0.5)]
        tracking.finish()
    assert read_scalars(run.path, "final/headline") == [(0, 0.7)]
