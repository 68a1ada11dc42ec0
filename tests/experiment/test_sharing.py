"""However the runs of a sweep are shared out, each is done once, and the sweep ends as if one process had done it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.builders import QUICK_EXTRAS, ROOT, make_table
from support.fault_injection import FLAGS, build_inputs, copy_inputs, read_results
from support.fault_injection import attempt as attempt_in_fork
from support.small_runs import make_metrics

import research_main
from research.errors import FlagErrors, InputError, StopRequest
from research.experiment import sharing
from research.experiment import sweep as sweep_room
from research.experiment.command import Outcome, attempt
from research.experiment.grid import command_line, expand_sweep
from research.experiment.sharing import Shard, choose_card, find_shard, settle_jobs
from research.experiment.sweep_worker import Task
from research.experiment.workers import Event
from research.flags import fields_of_kind
from research.runs.directory import RunDirectory
from research.storage import cache as cache_room
from research.storage.claims import STALE_S
from research_config import ExperimentConfig, parse_arguments, saved_settings

GRID = ("--sweep", "kd_alpha=0.3,0.9")
HOLDER = """
import sys, time
from research.runs.directory import RunDirectory

RunDirectory(sys.argv[1]).hold()
print("held", flush=True)
time.sleep(60)
"""
Act = Callable[[ExperimentConfig], Outcome]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Return the results of every run by itself, by its folder's name in the sweep."""
    place = copy_inputs(inputs, tmp_path_factory.mktemp("single"))
    for alpha in ("0.3", "0.9"):
        done = attempt_in_fork(place, [*FLAGS, "--kd_alpha", alpha, "--output_dir", f"run/kd_alpha_{alpha}"])
        assert done.status == 0, done.errors
    return read_runs(place)


@pytest.fixture
def place(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_inputs(inputs, tmp_path))
    return tmp_path


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_table(tmp_path / "data" / "comments.csv", rows=60)


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Act], list[str]]:
    """Let a function stand for the workers; return the list of the runs that it was asked for."""

    def install(act: Act) -> list[str]:
        asked: list[str] = []

        class Pool:
            def __init__(self, tasks: Sequence[Task], _perform: Any, _num_workers: int, _stop: StopRequest) -> None:
                self.tasks = tasks

            def run(self) -> Iterator[Event]:
                for number, task in enumerate(self.tasks):
                    asked.append(task.config.run_dir.name)
                    yield Event(number, "started")
                    yield Event(number, "ended", act(task.config))

        monkeypatch.setattr(sweep_room, "Pool", Pool)
        monkeypatch.setattr(sweep_room, "LOOK_S", 0.01)
        return asked

    return install


def start_command(place: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "research_main.py"), *FLAGS, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_runs(place: Path) -> dict[str, dict[str, bytes]]:
    return {path.name: read_results(path) for path in sorted((place / "run").glob("kd_alpha_*"))}


def finish(config: ExperimentConfig) -> Outcome:
    """Leave a finished run, as far as a sweep looks at it."""
    metrics = make_metrics()
    with RunDirectory(config.run_dir) as run_dir:
        run_dir.claim(saved_settings(config) | dict.fromkeys(fields_of_kind(config, "column"), "found"))
        run_dir.write_environment({"timing_s": {}})
        run_dir.write_metrics(metrics)
    return Outcome(0, metrics)


def run_sweep(*flags: str) -> int:
    models = ("--teacher_path", "data", "--student_path", "data")  # names of the hub, which nothing asks for
    return research_main.main([*models, "--output_dir", "out", *flags], QUICK_EXTRAS)


def hold(folder: str) -> subprocess.Popen[str]:
    """Let another process hold a run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], env=os.environ | {"PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


# Lines for a shell


def test_every_printed_line_makes_the_very_run_of_the_local_sweep(
    place: Path, expected: dict[str, dict[str, bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, *GRID, "--jobs", "2", "--print_commands"]
    assert research_main.main(flags) == 0
    printed = capfd.readouterr().out
    assert not (place / "run").exists(), "printing writes nothing"
    lines = printed.splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [[sys.executable, str(ROOT / "research_main.py")]] * 2
    (place / "lines.txt").write_text(printed, encoding="utf-8")
    # As an array task takes its line, and as xargs takes all of them.
    subprocess.run("sed -n 2p lines.txt | sh", shell=True, cwd=place, check=True, capture_output=True)
    assert list(read_runs(place)) == ["kd_alpha_0.9"]
    xargs = "xargs -d '\\n' -P 2 -I{} sh -c '{}' < lines.txt"
    subprocess.run(xargs, shell=True, cwd=place, check=True, capture_output=True)
    assert read_runs(place) == expected


def test_line_holds_every_flag_that_the_run_needs(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = Path("it's & odd")
    flags = ("--sweep", "label_alphas=spam=0.9 bully=0.1", "--allow_weak_teacher", "--min_teacher_f1", "0.1")
    more = ("--checkpoint_minutes", "3", "--cache_dir", str(odd), "--overwrite", "--num_threads", "2")
    assert run_sweep(*flags, *more, "--print_commands") == 0
    (line,) = capsys.readouterr().out.splitlines()
    config = parse_arguments(shlex.split(line)[2:]).config
    (run,) = expand_sweep(
        parse_arguments(["--output_dir", "out", "--teacher_path", "data", "--student_path", "data", *flags, *more]).config
    )
    assert config == run
    assert config.overwrite


def test_line_gives_a_run_the_threads_of_a_worker(table: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_sweep(*GRID, "--jobs", "2", "--print_commands") == 0
    assert all(line.startswith("OMP_NUM_THREADS=4 ") for line in capsys.readouterr().out.splitlines())
    assert run_sweep(*GRID, "--jobs", "2", "--num_threads", "3", "--print_commands") == 0
    assert all("--num_threads 3" in line and "OMP" not in line for line in capsys.readouterr().out.splitlines())


def test_value_with_a_line_break_is_refused(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep(*GRID, "--cache_dir", "a\nb", "--print_commands") == 2
    assert "does not fit into one line" in capsys.readouterr().err


# Parts of a grid


@pytest.mark.parametrize(("runs", "count"), [(10, 3), (3, 3), (2, 5), (1, 1)])
def test_parts_hold_every_run_once(runs: int, count: int) -> None:
    parts = [list(Shard(index, count).numbers(runs)) for index in range(1, count + 1)]
    assert sorted(sum(parts, [])) == list(range(runs))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def slurm(task: int, first: int, step: int, count: int) -> dict[str, str]:
    values = {"ID": task, "MIN": first, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def test_part_is_taken_from_the_task_of_an_array() -> None:
    assert find_shard("2/7") == Shard(2, 7)
    assert find_shard("slurm", slurm(1, 1, 1, 8)) == Shard(1, 8)
    assert find_shard("slurm", slurm(7, 0, 1, 8)) == Shard(8, 8)
    assert find_shard("slurm", slurm(12, 10, 2, 3)) == Shard(2, 3)
    with pytest.raises(InputError, match="SLURM_ARRAY_TASK_ID is not set"):
        find_shard("slurm", {})
    for environment in (slurm(7, 1, 1, 3), slurm(4, 1, 2, 3), {"SLURM_ARRAY_TASK_ID": "x"}):
        with pytest.raises(InputError, match="is no part of a grid"):
            find_shard("slurm", environment)


def test_last_part_that_ends_makes_the_comparison(table: Path, tmp_path: Path, acted: Any, capsys: Any) -> None:
    asked = acted(finish)
    grid = ("--sweep", "kd_alpha=0.1,0.2,0.3,0.4,0.5")
    assert run_sweep(*grid, "--sweep_shard", "2/2") == 0
    assert asked == ["kd_alpha_0.2", "kd_alpha_0.4"]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "out  part 2/2: 2 of 2 runs; 2 of 5 of the sweep"
    assert (tmp_path / "out" / "sweep_2_of_2.log").is_file()
    assert run_sweep(*grid, "--sweep_shard", "1/2") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("out  5 of 5 runs; best on validation")
    assert "the runs were not compared" in captured.err, "it was tried, on runs without predictions"


def test_part_without_runs_is_done(table: Path, acted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    acted(finish)
    assert run_sweep(*GRID, "--sweep_shard", "3/3") == 0
    assert capsys.readouterr().out == "out  part 3/3: 0 of 0 runs; 0 of 2 of the sweep\n"


# Several processes


def test_run_that_another_process_holds_is_left_to_it_and_done_when_that_dies(
    table: Path, acted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = hold("out/kd_alpha_0.3")
    asked = acted(finish)
    threading.Timer(1.0, holder.kill).start()
    started = time.monotonic()
    assert run_sweep(*GRID) == 0
    assert time.monotonic() - started > 0.8
    holder.communicate()
    assert asked == ["kd_alpha_0.9", "kd_alpha_0.3"]
    assert "waiting for other processes, which are at 1 of the runs" in capsys.readouterr().err


def test_run_that_a_dead_machine_holds_is_done_once_its_claim_is_old(table: Path, acted: Any) -> None:
    holder = hold("out/kd_alpha_0.3")
    holder.kill()
    holder.communicate()
    claim = Path("out/kd_alpha_0.3/.lock")
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"machine": "another"}), encoding="utf-8")
    asked = acted(finish)

    def age() -> None:
        then = claim.stat().st_mtime - STALE_S - 10
        os.utime(claim, (then, then))

    threading.Timer(1.0, age).start()
    assert run_sweep(*GRID) == 0
    assert asked == ["kd_alpha_0.9", "kd_alpha_0.3"]


def test_run_that_another_process_finishes_meanwhile_is_not_done_again(
    table: Path, acted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = hold("out/kd_alpha_0.3")

    def act(config: ExperimentConfig) -> Outcome:
        held = RunDirectory(config.run_dir).path.parent / "kd_alpha_0.3"
        config_there = replace(config, kd_alpha=0.3, output_dir=str(held))
        run_dir = RunDirectory(held)
        run_dir.write_config(saved_settings(config_there) | dict.fromkeys(fields_of_kind(config, "column"), "found"))
        run_dir.write_environment({"timing_s": {}})
        run_dir.write_metrics(make_metrics())
        return finish(config)

    asked = acted(act)
    assert run_sweep(*GRID) == 0
    holder.kill()
    holder.communicate()
    assert asked == ["kd_alpha_0.9"]
    captured = capsys.readouterr()
    assert "out/kd_alpha_0.3  student test f1_macro=0.7123 (teacher 0.7345), done by another process" in captured.err
    assert captured.out.splitlines()[-1].startswith("out  2 of 2 runs")


def test_held_run_is_not_even_read(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = hold("out/one")
    monkeypatch.setattr("research.experiment.command.load_dataset", pytest.fail)
    outcome = attempt(ExperimentConfig(output_dir="out/one"), [], StopRequest(), hold_first=True)
    assert outcome.in_use
    holder.kill()
    holder.communicate()


def test_run_that_is_refused_leaves_no_folder(table: Path) -> None:
    config = ExperimentConfig(output_dir="out/one", text_column="absent")
    outcome = attempt(config, [], StopRequest(), hold_first=True)
    assert (outcome.status, outcome.in_use) == (2, False)
    assert not Path("out/one").exists()


def test_two_commands_of_one_sweep_do_each_run_once(place: Path, expected: dict[str, dict[str, bytes]]) -> None:
    with start_command(place, *GRID) as left, start_command(place, *GRID) as right:
        ends = [process.communicate(timeout=300) for process in (left, right)]
    assert (left.returncode, right.returncode) == (0, 0), ends
    assert [output.splitlines()[-1][:17] for output, _ in ends] == ["run  2 of 2 runs;"] * 2
    assert read_runs(place) == expected
    for run in expected:
        assert (place / "run" / run / "run.log").read_text(encoding="utf-8").count(" writing run") == 1
    assert (place / "run" / "comparison" / "report.html").is_file()
    assert not list(place.rglob("*.lock*"))


def test_second_command_that_overwrites_is_refused(table: Path, acted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def act(config: ExperimentConfig) -> Outcome:
        if config.kd_alpha == 0.3:
            assert run_sweep(*GRID, "--overwrite") == 2
        return finish(config)

    acted(act)
    assert run_sweep(*GRID, "--overwrite") == 0
    assert "--overwrite: another process is overwriting out" in capsys.readouterr().err


# --prepare_only


def test_runs_of_a_prepared_grid_build_nothing(
    place: Path, expected: dict[str, dict[str, bytes]], acted: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert research_main.main([*FLAGS, *GRID, "--prepare_only"], QUICK_EXTRAS) == 0
    captured = capsys.readouterr()
    assert captured.out == "cache  prepared for 2 of 2 runs of run\n"
    assert captured.err.count("fine-tuning the teacher") == 1
    assert not (place / "run").exists()
    monkeypatch.setattr(cache_room, "_build", lambda entry, *_: pytest.fail(f"{entry} was not prepared"))
    acted(lambda config: attempt(config, command_line(config), StopRequest(), QUICK_EXTRAS, hold_first=True))
    assert research_main.main([*FLAGS, *GRID], QUICK_EXTRAS) == 0
    assert read_runs(place) == expected


@pytest.mark.parametrize("flags", [["--num_folds", "2"], ["--pipeline", "baseline"], ["--kd_method", "logit"]])
def test_prepared_run_builds_nothing(place: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = [*FLAGS, "--no-with_control", *flags]
    assert research_main.main([*flags, "--prepare_only"], QUICK_EXTRAS) == 0
    assert "prepared: run finds in cache what it shares with other runs" in capsys.readouterr().err
    assert not (place / "run").exists()
    monkeypatch.setattr(cache_room, "_build", lambda entry, *_: pytest.fail(f"{entry} was not prepared"))
    assert research_main.main(flags, QUICK_EXTRAS) == 0


def test_weak_teacher_is_told_when_it_is_prepared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, *GRID, "--no-allow_weak_teacher", "--min_teacher_f1", "0.99", "--prepare_only"]
    assert research_main.main(flags, QUICK_EXTRAS) == 3
    captured = capsys.readouterr()
    assert captured.err.count("failed: the teacher is too weak to distil") == 2
    assert captured.out == ""


# Cards


def test_jobs_are_so_many_on_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device, jobs in (("auto", 6), ("cuda", 6), ("cuda:1", 3)):
        config = settle_jobs(ExperimentConfig(runs_per_device=3, device=device))
        assert (config.jobs, config.runs_per_device) == (jobs, None)
    assert [choose_card(worker, 2) for worker in range(6)] == [0, 1] * 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for device in ("auto", "cpu"):
        with pytest.raises(InputError, match="no CUDA device was found"):
            settle_jobs(ExperimentConfig(runs_per_device=3, device=device))
    assert settle_jobs(ExperimentConfig(jobs=4)).jobs == 4


def test_threads_of_a_line_are_no_more_than_the_environment_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    for said, threads in (("2", 2), ("64", 4), ("", 4), ("many", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert sharing.shell_threads(ExperimentConfig(jobs=2), 5) == threads
    assert sharing.shell_threads(ExperimentConfig(jobs=1), 5) is None


# Flags


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--sweep_shard 1/2", "--sweep_shard: only a --sweep has runs to share out"),
        ("--print_commands", "--print_commands: only a --sweep"),
        ("--launcher slurm --num_threads 1", "--launcher: only a --sweep"),
        ("--runs_per_device 2", "--runs_per_device: only a --sweep"),
        ("--sweep seed=1,2 --sweep_shard 3/2", "--sweep_shard: the first number goes from 1 to 2, got 3/2"),
        ("--sweep seed=1,2 --sweep_shard 0/2", "--sweep_shard: must be I/N, as in 1/8 to 8/8, or slurm, got '0/2'"),
        ("--sweep seed=1,2 --sweep_shard 1/2 --overwrite", "--sweep_shard: does not go with --overwrite"),
        ("--sweep seed=1,2 --sweep_shard 1/2 --prepare_only", "--sweep_shard: --prepare_only prepares the whole sweep"),
        ("--sweep seed=1,2 --print_commands --prepare_only", "--print_commands: prints runs"),
        ("--sweep seed=1,2 --runs_per_device 2 --jobs 3", "--runs_per_device: says how many workers there are; drop --jobs 3"),
        ("--slurm_options time=1", "--slurm_options: needs --launcher slurm"),
        ("--sweep seed=1,2 --launcher slurm", "--launcher: slurm needs --num_threads"),
        ("--sweep seed=1,2 --launcher slurm --num_threads 1 --overwrite", "--launcher: slurm does not go with --overwrite"),
        (
            "--sweep seed=1,2 --launcher slurm --num_threads 1 --sweep_shard 1/2",
            "--launcher: slurm does not go with --sweep_shard",
        ),
        (
            "--sweep seed=1,2 --launcher slurm --num_threads 1 --slurm_options array=1-2",
            "--slurm_options: array is the launcher's own to set",
        ),
        ("--sweep seed=1,2 --launcher slurm --num_threads 1 --slurm_options =x", "--slurm_options: '=x' is not NAME=VALUE"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_in_one_line(table: Path, flags: str, problem: str) -> None:
    with pytest.raises(FlagErrors) as caught:
        parse_arguments(flags.split())
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_what_shares_out_runs_is_in_no_run(table: Path) -> None:
    config = replace(ExperimentConfig(output_dir="out", sweep=("seed=1,2",)), jobs=3, sweep_shard="1/2", print_commands=True)
    for run in expand_sweep(config):
        assert run == ExperimentConfig(output_dir=run.output_dir, seed=run.seed)
