"""Each run of a sweep is the run that one command would make, and none hides or stops another."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.builders import build_model_folder, make_table, make_texts
from support.small_runs import make_metrics

import research_main
from research.errors import FAILED, StopRequest
from research.experiment import sweep as sweep_room
from research.experiment import sweep_progress, sweep_worker
from research.experiment.command import Outcome
from research.experiment.sharing import threads_per_run
from research.experiment.sweep_progress import SweepProgress
from research.experiment.sweep_worker import Task, run_in_worker
from research.experiment.workers import Event
from research.flags import fields_of_kind
from research.runs.directory import RunDirectory
from research_config import ExperimentConfig, saved_settings

QUICK = (
    "--teacher_path teacher --student_path student --lr 1e-3 --teacher_epochs 1 --epochs 1 --batch 16 --max_length 32 "
    "--student_hidden_size 8 --allow_weak_teacher"
)
DETERMINISTIC_FILES = ("config.json", "metrics.json", "history.csv", "predictions.csv")
Act = Callable[[ExperimentConfig], Outcome]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "student").mkdir()
    return make_table(tmp_path / "data" / "comments.csv", rows=60)


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Act], list[str]]:
    """Let a function stand for the workers; return the list of the runs that it was asked for."""

    def install(act: Act) -> list[str]:
        asked: list[str] = []

        class Pool:
            def __init__(self, tasks: Sequence[Task], _perform: Any, _num_workers: int, stop: StopRequest) -> None:
                self.tasks, self.stop = tasks, stop

            def run(self) -> Iterator[Event]:
                for number, task in enumerate(self.tasks):
                    if self.stop.requested:
                        return
                    asked.append(task.config.run_dir.name)
                    yield Event(number, "started")
                    outcome = act(task.config)
                    if not self.stop.requested:
                        yield Event(number, "ended", outcome)

        monkeypatch.setattr(sweep_room, "Pool", Pool)
        return asked

    return install


def finish(config: ExperimentConfig, test: float = 0.5, validation: float = 0.5) -> Outcome:
    """Leave a finished run whose headline has these values, as far as a sweep looks at it."""
    metrics = make_metrics(student_f1=test)
    metrics["student"]["validation"] = {
        "at_0.5": metrics["student"]["validation"]["at_0.5"] | {"f1_macro": 1 - validation, "average_precision_macro": validation}
    }
    with RunDirectory(config.run_dir) as run_dir:
        columns = dict.fromkeys(fields_of_kind(config, "column"), "found")
        run_dir.claim(saved_settings(config) | columns, overwrite=config.overwrite)
        run_dir.write_environment({"timing_s": {}})
        run_dir.write_metrics(metrics)
    return Outcome(0, metrics)


def run_sweep(*flags: str, out: str = "out") -> int:
    return research_main.main([*QUICK.split(), "--output_dir", out, *flags])


# Real runs


def test_each_run_is_that_of_its_own_command_and_a_second_sweep_does_nothing(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(60)
    build_model_folder("electra", "wordpiece", tmp_path / "teacher", texts, layers=2, width=24, seed=1)
    build_model_folder("distilbert", "unigram", tmp_path / "student", texts, layers=2, width=16, seed=2)
    sweep = ("--sweep", "kd_alpha=0.3,0.9")
    assert run_sweep(*sweep, "--jobs", "2") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["out/kd_alpha_0.3", "out/kd_alpha_0.9"]
    assert re.fullmatch(
        r"out  2 of 2 runs; best on validation: out/kd_alpha_0\.. .* \(validation average_precision_macro=0\.\d{4}\)", lines[-1]
    )
    assert "kd_alpha_0.9  0.9" in captured.out, "the comparison's table"
    assert (tmp_path / "out" / "comparison" / "report.html").is_file()
    for event in ("[1/2] out/kd_alpha_0.3: started", "[2/2] out/kd_alpha_0.9  student test f1_macro=0."):
        assert event in captured.err
        assert event in (tmp_path / "out" / "sweep.log").read_text(encoding="utf-8")

    for alpha in ("0.3", "0.9"):
        single = [*QUICK.split(), "--kd_alpha", alpha, "--output_dir", f"single_{alpha}", "--cache_dir", "cache_2"]
        assert research_main.main(single) == 0
        for name in DETERMINISTIC_FILES:
            left, right = tmp_path / f"out/kd_alpha_{alpha}" / name, tmp_path / f"single_{alpha}" / name
            assert left.read_bytes() == right.read_bytes(), name

    # How many workers there were makes them no other runs.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/kd*/*")}
    assert run_sweep(*sweep, "--jobs", "1") == 0
    assert research_main.main([*QUICK.split(), "--kd_alpha", "0.3", "--output_dir", "out/kd_alpha_0.3"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


# What a sweep does with its runs


def test_runs_that_are_done_or_refused_need_no_worker(
    table: Path, tmp_path: Path, acted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = acted(finish)
    assert run_sweep("--sweep", "kd_alpha=0.3,0.9") == 0
    (tmp_path / "out" / "kd_alpha_0.5").mkdir()
    (tmp_path / "out" / "kd_alpha_0.5" / "stranger.txt").write_text("in the way", encoding="utf-8")
    capsys.readouterr()
    assert run_sweep("--sweep", "kd_alpha=0.3,0.5,0.7,0.9") == 2
    captured = capsys.readouterr()
    assert asked == ["kd_alpha_0.3", "kd_alpha_0.9", "kd_alpha_0.7"]
    assert "out  3 of 4 runs" in captured.out
    assert "out/kd_alpha_0.5: failed: out/kd_alpha_0.5 is not empty and holds no run of this suite" in captured.err
    assert "[3/4] out/kd_alpha_0.7: started" in captured.err


def test_best_run_is_chosen_on_validation(table: Path, acted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {0.3: (0.9, 0.6), 0.5: (0.7, 0.8), 0.9: (0.8, 0.7)}  # test, validation
    acted(lambda config: finish(config, *scores[config.kd_alpha]))
    assert run_sweep("--sweep", "kd_alpha=0.3,0.5,0.9") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    best = "out/kd_alpha_0.5  student test f1_macro=0.7000 (validation average_precision_macro=0.8000)"
    assert last == f"out  3 of 3 runs; best on validation: {best}"


def test_failed_run_is_told_at_once_and_at_the_end_and_the_others_are_printed(
    table: Path, acted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(config: ExperimentConfig) -> Outcome:
        return Outcome(3, problems=("the teacher is\n too weak",)) if config.kd_alpha == 0.5 else finish(config)

    acted(act)
    assert run_sweep("--sweep", "kd_alpha=0.3,0.5,0.9") == 3
    captured = capsys.readouterr()
    assert re.search(r"\[2/3\] out/kd_alpha_0.5: failed after [\d.]+ s: the teacher is\\n too weak\n\[3/3\]", captured.err)
    assert captured.err.rstrip().endswith("out/kd_alpha_0.5: failed: the teacher is\\n too weak")
    assert [line.split()[0] for line in captured.out.splitlines()[:2]] == ["out/kd_alpha_0.3", "out/kd_alpha_0.9"]
    assert captured.out.splitlines()[-1].startswith("out  2 of 3 runs; best on validation: out/kd_alpha_0.3 ")


def test_failing_comparison_fails_no_run(
    table: Path, acted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_arguments: Any, **_flags: Any) -> Any:
        raise RuntimeError("a bug of ours")

    acted(finish)
    monkeypatch.setattr(sweep_room, "compare_runs", broken)
    assert run_sweep("--sweep", "kd_alpha=0.3,0.9") == 0
    captured = capsys.readouterr()
    assert "the runs were not compared: a bug of ours" in captured.err
    assert captured.out.splitlines()[-1].startswith("out  2 of 2 runs; best")


def test_stopped_sweep_begins_nothing_more_and_ends_with_130(table: Path, acted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def act(config: ExperimentConfig) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(config)

    asked = acted(act)
    assert run_sweep("--sweep", "kd_alpha=0.3,0.9") == 130
    assert asked == ["kd_alpha_0.3"]
    assert "the same command goes on from here" in capsys.readouterr().err


def test_bug_in_a_run_is_one_line_and_its_traceback_is_in_the_runs_log(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sweep_worker, "redirect_output", lambda path: None)
    config = ExperimentConfig(output_dir="out/one")
    task = Task(config, None, None, tmp_path / "sweep.log")

    def broken(*_arguments: Any, **_flags: Any) -> Outcome:
        raise RuntimeError("a bug of ours\nof two lines")

    monkeypatch.setattr(sweep_worker, "attempt", broken)
    for begun, path in ((False, tmp_path / "sweep.log"), (True, Path("out/one/run.log"))):
        if begun:
            with RunDirectory(config.run_dir) as run_dir:
                run_dir.claim(saved_settings(config))
        outcome = run_in_worker(task, 0, StopRequest(), pytest.fail)
        assert outcome == Outcome(FAILED, None, (f"RuntimeError: a bug of ours. Its traceback stands in {path}.",))
        assert "in broken\n" in path.read_text(encoding="utf-8")


def test_folder_that_holds_a_run_is_refused(table: Path, acted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    acted(finish)
    finish(ExperimentConfig(output_dir="out"))
    assert run_sweep("--sweep", "kd_alpha=0.3,0.9") == 2
    assert "error: --output_dir: out holds a run" in capsys.readouterr().err


# --dry_run


def test_dry_run_says_what_is_done_and_to_do_and_does_nothing(
    table: Path, tmp_path: Path, acted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = acted(finish)
    assert run_sweep("--sweep", "kd_alpha=0.3,0.9", "--dry_run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "out  2 runs: 0 done, 2 to do"
    assert (asked, (tmp_path / "out").exists()) == ([], False)
    assert run_sweep("--sweep", "kd_alpha=0.3,0.9") == 0
    capsys.readouterr()
    assert run_sweep("--sweep", "kd_alpha=0.3,0.5", "--dry_run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "out/kd_alpha_0.3  done",
        "out/kd_alpha_0.5  to do",
        "out  2 runs: 1 done, 1 to do",
    ]
    assert run_sweep("--sweep", "kd_alpha=0.3", "--seed", "7", "--dry_run") == 2
    assert "refused: out/kd_alpha_0.3 holds a run with another config: --seed 42 there, 7 asked" in capsys.readouterr().out


# --overwrite


def test_overwriting_sweep_goes_on_until_all_runs_are_made_afresh(table: Path, tmp_path: Path, acted: Any) -> None:
    sweep = ("--sweep", "kd_alpha=0.3,0.5,0.9", "--overwrite")
    acted(finish)
    assert run_sweep(*sweep[:2]) == 0
    stops = [True]

    def act(config: ExperimentConfig) -> Outcome:
        if config.kd_alpha == 0.5 and stops.pop():
            os.kill(os.getpid(), signal.SIGINT)
            stops.append(False)
        return finish(config)

    asked = acted(act)
    assert run_sweep(*sweep) == 130
    assert asked == ["kd_alpha_0.3", "kd_alpha_0.5"]
    asked = acted(finish)
    assert run_sweep(*sweep) == 0
    assert asked == ["kd_alpha_0.5", "kd_alpha_0.9"], "the first one has been made afresh already"
    asked = acted(finish)
    assert run_sweep(*sweep) == 0
    assert len(asked) == 3, "all are finished, so they are overwritten again"
    assert not (tmp_path / "out" / ".overwriting").exists()


def test_another_grid_or_a_command_without_overwrite_ends_the_overwriting(table: Path, tmp_path: Path, acted: Any) -> None:
    def act(config: ExperimentConfig) -> Outcome:
        return Outcome(FAILED, problems=("it fails",)) if config.kd_alpha == 0.9 else finish(config)

    asked = acted(act)
    assert run_sweep("--sweep", "kd_alpha=0.3,0.9", "--overwrite") == 1
    assert run_sweep("--sweep", "kd_alpha=0.3,0.9", "--overwrite") == 1
    assert asked == ["kd_alpha_0.3", "kd_alpha_0.9", "kd_alpha_0.9"]
    assert run_sweep("--sweep", "kd_alpha=0.3,0.5", "--overwrite") == 0
    assert asked[3:] == ["kd_alpha_0.3", "kd_alpha_0.5"]
    assert run_sweep("--sweep", "kd_alpha=0.3,0.9") == 1
    assert not (tmp_path / "out" / ".overwriting").exists()


# Workers and their share of the machine


def test_threads_are_shared_out_among_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    assert threads_per_run(ExperimentConfig(jobs=3), 9) == 2
    assert threads_per_run(ExperimentConfig(jobs=20000), 40) == 1
    assert threads_per_run(ExperimentConfig(jobs=20000), 2) == 4
    assert threads_per_run(ExperimentConfig(jobs=1), 9) is None


def test_each_worker_has_a_card_of_its_own_and_the_config_does_not_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    for device in ("auto", "cuda", "cuda:0", "cpu"):
        for worker in range(3):
            sweep_worker.settle_on_machine(Task(ExperimentConfig(device=device), None, None, Path("log")), worker)
    assert chosen == [0, 1, 0, 0, 1, 0]


# What is said


def test_time_left_leaves_out_what_the_first_runs_do_for_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    now = [0.0]
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: now[0])
    runs = [ExperimentConfig(output_dir=str(tmp_path / str(number))) for number in range(6)]
    for run in runs[:2]:
        run.run_dir.mkdir()
        RunDirectory(run.run_dir).write_environment(
            {"timing_s": {"tokenize": 50, "teacher": 500, "teacher_outputs": 50, "save": 9}}
        )
    progress = SweepProgress(runs, range(6), num_workers=2)
    caplog.set_level(logging.INFO)
    progress.start(0)
    progress.start(1)
    now[0] = 700.0
    progress.end(0, Outcome(0, make_metrics()))
    progress.start(2)
    # Four wait, of 100 s each for two workers; the one at work has taken longer than that.
    assert "after 11 min 40 s; about 3 min 20 s left" in caplog.text
    assert progress.seconds_left() == pytest.approx((100 + 3 * 100) / 2)
    now[0] = 720.0
    progress.end(1, Outcome(0, make_metrics()))
    progress.start(3)
    now[0] = 820.0
    progress.end(2, Outcome(0, make_metrics()))
    assert progress.costs_s == [100.0, 120.0, 120.0]


def test_warning_is_passed_on_once_and_a_dead_process_is_named(caplog: pytest.LogCaptureFixture) -> None:
    runs = [ExperimentConfig(output_dir=f"out/{number}") for number in range(2)]
    progress = SweepProgress(runs, range(2), num_workers=2)
    for run in (0, 1):
        progress.start(run)
        progress.warn(run, "label 'threat' has no positives")
    progress.die(1, "was killed by SIGKILL")
    assert caplog.messages.count("[1/2] out/0: label 'threat' has no positives") == 1
    assert caplog.messages[-1] == "[2/2] out/1: its process was killed by SIGKILL; the run will be tried once more"
    assert progress.waiting == {1}
