"""--track sends what a run comes to while it is at it, and changes nothing of the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_lab import TinyLab, repeated_bytes

from research.runs.directory import TRACKING_FILE

# Notes every call in a file, with what the run directory of the last init holds by then; workers of a sweep import it too.
LIBRARY = """
import json, os, pathlib

def note(call, **facts):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps({"call": call, **facts}) + "\\n")

def init(project, name, resume, config):
    global run
    run = name
    note("init", run=name, resume=resume, alpha=config["kd_alpha"])

def log(values, step):
    if os.environ.get("FAIL_AT") and f"student/{os.environ['FAIL_AT']}" == f"{min(values).partition('/')[0]}/{step}":
        raise ConnectionError("no network")
    note("log", run=run, model=min(values).partition("/")[0], epoch=step, finished=pathlib.Path(run, "metrics.json").exists())

def finish():
    note("finish", run=run)
"""


@pytest.fixture
def lab(tmp_path: Path, materials: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> TinyLab:
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(materials / name)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "trackio.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.chdir(tmp_path)
    return TinyLab(tmp_path, lambda: tuple(capsys.readouterr()))  # type: ignore[return-value, arg-type]


def read_calls(lab: TinyLab) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (lab.folder / "calls.jsonl").read_text().splitlines()]


def sent(lab: TinyLab) -> list[tuple[str, str, int]]:
    """Return (run, model, epoch) of every epoch that was sent."""
    return [
        (call["run"], call["model"], call["epoch"]) for call in read_calls(lab) if call["call"] == "log" and not call["finished"]
    ]


def test_each_epoch_is_sent_while_the_run_goes_on_and_changes_no_byte(lab: TinyLab) -> None:
    plain = lab.done("plain", "--with_control --cache_dir cache_plain")
    tracked = lab.done("tracked", "--with_control --track trackio")
    models = [("teacher", 1), ("student", 1), ("student", 2), ("control", 1), ("control", 2)]
    assert sent(lab) == [("results/tracked", model, epoch) for model, epoch in models]
    calls = [call["call"] for call in read_calls(lab)]
    assert calls == ["init", *["log"] * 6, "finish"]
    assert repeated_bytes(plain) == repeated_bytes(tracked)
    assert (plain / "config.json").read_bytes() == (tracked / "config.json").read_bytes()
    assert not (tracked / TRACKING_FILE).exists()


def test_trials_are_sent_by_themselves_and_the_chosen_one_as_the_model(lab: TinyLab) -> None:
    run = lab.done("run", "--search epochs=1,2 lr=1e-4 --with_control --track trackio")
    training = json.loads((run / "metrics.json").read_text())["training"]
    chosen = {
        model: next(trial for trial in training[model]["trials"] if trial.get("chosen")) for model in ("student", "control")
    }
    wanted = [("teacher_trial_1", 1)]
    for model, trial in chosen.items():
        wanted += [(f"{model}_trial_1", 1), (f"{model}_trial_2", 1), (f"{model}_trial_2", 2)]
        wanted += [(model, epoch + 1) for epoch in range(trial["epochs_run"])]
    assert [(model, epoch) for _, model, epoch in sent(lab)] == wanted


def test_a_tracker_that_fails_in_the_middle_changes_no_byte(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = lab.done("plain")
    monkeypatch.setenv("FAIL_AT", "2")
    status, errors = lab.run("--track trackio --output_dir results/tracked")
    assert status == 0
    (warning,) = [line for line in errors.splitlines() if "--track" in line]
    assert "no network; nothing more is sent" in warning
    assert sent(lab) == [("results/tracked", "student", 1)]
    assert repeated_bytes(plain) == repeated_bytes(lab.folder / "results" / "tracked")


@pytest.mark.parametrize("validations", [2, 3])
def test_a_resumed_run_sends_no_epoch_twice_and_leaves_none_out(
    lab: TinyLab, monkeypatch: pytest.MonkeyPatch, validations: int
) -> None:
    plain = lab.done("plain")
    from research.experiment import training

    compute, asked = training.compute_metrics, list[int]()

    def stop_at(*args: Any) -> Any:
        asked.append(1)
        if len(asked) == validations:
            raise KeyboardInterrupt
        return compute(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "compute_metrics", stop_at)
        assert lab.run("--track trackio --output_dir results/tracked --epochs 3")[0] == 130
    assert (lab.folder / "results/tracked" / TRACKING_FILE).is_file()
    before = sent(lab)
    assert before == [("results/tracked", "student", epoch) for epoch in range(1, validations)]
    tracked = lab.done("tracked", "--track trackio --epochs 3")
    assert sent(lab) == [("results/tracked", "student", epoch) for epoch in (1, 2, 3)]
    assert [call["resume"] for call in read_calls(lab) if call["call"] == "init"] == ["never", "allow"]
    assert not (tracked / TRACKING_FILE).exists()
    assert repeated_bytes(lab.done("whole", "--epochs 3")) == repeated_bytes(tracked) != repeated_bytes(plain)


def test_folds_and_runs_of_a_sweep_are_sent_under_their_own_names(lab: TinyLab) -> None:
    lab.done("folds", "--num_folds 2 --track trackio --pipeline student_only --epochs 1")
    lab.done("grid", "--sweep kd_alpha=0.3,0.5 --track trackio --epochs 1")
    begun = {call["run"]: call["alpha"] for call in read_calls(lab) if call["call"] == "init"}
    assert begun == {
        "results/folds/fold_1": 0.7,
        "results/folds/fold_2": 0.7,
        "results/grid/kd_alpha_0.3": 0.3,
        "results/grid/kd_alpha_0.5": 0.5,
    }
    assert sorted((run, epoch) for run, model, epoch in sent(lab) if model == "student") == [(run, 1) for run in sorted(begun)]
    assert sum(call["call"] == "finish" for call in read_calls(lab)) == 4


def test_nothing_is_sent_of_a_finished_run_or_a_dry_one(lab: TinyLab) -> None:
    lab.done("run", "--pipeline student_only --epochs 1")
    lab.done("run", "--pipeline student_only --epochs 1 --track trackio")
    assert lab.run("--pipeline student_only --dry_run --track trackio --output_dir results/dry")[0] == 0
    assert not (lab.folder / "calls.jsonl").exists()
