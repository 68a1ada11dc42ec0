"""A sweep handed to Slurm; sbatch is a script here that notes what it is given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import research_main
from research.experiment.slurm import SCRIPT

SBATCH = """#!{python}
import json, pathlib, sys
log = pathlib.Path({log!r})
jobs = json.loads(log.read_text()) if log.exists() else []
jobs.append({{"options": sys.argv[1:], "script": sys.stdin.read()}})
log.write_text(json.dumps(jobs))
if len(jobs) > {most}:
    sys.exit("sbatch: error: Batch job submission failed: Invalid account")
print(f"{{100 + len(jobs)}};cluster")
"""


def put_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, most: int = 9) -> Path:
    log = folder / "jobs.json"
    (folder / "sbatch").write_text(SBATCH.format(python=sys.executable, log=str(log), most=most))
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def launch(folder: Path, *more: str) -> int:
    flags = ["--sweep", "kd_alpha=0.3,0.5", "seed=1,2", "--launcher", "slurm", "--num_threads", "2", "--jobs", "3"]
    table = folder / "comments.csv"
    table.write_text("text,bully\na,0\nb,1\n")
    return research_main.main([*flags, "--dataset_path", str(table), "--output_dir", str(folder / "grid"), *more])


def test_jobs_prepare_run_and_compare_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = put_sbatch(tmp_path, monkeypatch)
    assert launch(tmp_path, "--slurm_options", "partition=gpu", "time=4:00:00") == 0
    prepare, array, compare = json.loads(log.read_text())
    assert capsys.readouterr().out.splitlines()[1] == "job 102: 4 runs, 3 at a time"
    for job in (prepare, array, compare):
        assert {"--parsable", "--requeue", "--cpus-per-task=2", "--partition=gpu", "--time=4:00:00"} <= set(job["options"])
        assert "--sweep kd_alpha=0.3,0.5 seed=1,2" in job["script"] and "--launcher" not in job["script"]
    assert "--prepare_only" in prepare["script"]
    assert "--sweep_shard slurm" in array["script"]
    assert {"--array=1-4%3", "--dependency=afterok:101"} <= set(array["options"])
    assert "--dependency=afterany:102" in compare["options"]
    assert not list((tmp_path / "grid").iterdir()), "nothing runs here"


def test_refused_job_is_told_with_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_sbatch(tmp_path, monkeypatch, most=1)
    assert launch(tmp_path) == 2
    said = capsys.readouterr().err
    assert "Invalid account" in said and "Submitted before: job 101" in said


def test_machine_without_slurm_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(tmp_path) == 2
    assert "there is no sbatch here" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "requeued"), [(130, True), (0, False)])
def test_script_hands_the_warning_on_and_requeues_what_stopped_for_it(tmp_path: Path, status: int, requeued: bool) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    answer = f"signal.signal(signal.SIGUSR1, lambda *_: sys.exit({status}))"
    code = f"import signal, sys, time; {answer}; print(1, flush=True); time.sleep(30)"
    script = SCRIPT.format(command=f"{sys.executable} -c '{code}'")
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    shell = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, env=environment)
    assert shell.stdout is not None and shell.stdout.readline() == b"1\n"
    started = time.monotonic()
    shell.send_signal(signal.SIGUSR1)
    assert shell.wait(20) == status and time.monotonic() - started < 20
    assert (tmp_path / "requeued").exists() == requeued
    shell.stdout.close()
