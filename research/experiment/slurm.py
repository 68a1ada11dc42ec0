"""A sweep as jobs of Slurm: one that fills the cache, an array of runs, and one that compares them.

What Slurm does well is left to it: queueing, placing, restarting. Each task of the array is this command with
`--sweep_shard slurm`; runs are claimed by files, so a task that starts anew goes on where its runs were, and the last
job does whatever tasks have left undone before it compares.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import research_config
from research.errors import InputError
from research.experiment.grid import command_line
from research_config import ExperimentConfig

WARNING_S = 60  # before the time limit, for a checkpoint
MOST_TASKS = 1000  # of an array, as Slurm is set up unless told otherwise; a task may do several runs
# The batch shell hands signals on, also one that comes before there is a command to hand it to. Of a command that stopped for
# the warning (130, or 138 before it could catch it) it puts the job back into the queue; after a SIGTERM Slurm does, if it was
# no scancel. A signal ends `wait` with a status that is not the command's, so it waits again; 127 says that there is nothing
# more to wait for.
SCRIPT = """#!/bin/sh
child=
early=
warned=no
caught=yes
status=127
hand_on() {{ caught=yes; if [ "$child" ]; then kill -$1 $child; else early=$1; fi; }}
trap 'warned=yes; hand_on USR1' USR1
trap 'hand_on TERM' TERM
{command} &
child=$!
[ -z "$early" ] || kill -$early $child
while [ $caught = yes ]; do
    caught=no
    wait $child
    ended=$?
    [ $ended = 127 ] || status=$ended
done
case $warned$status in yes130 | yes138) scontrol requeue $SLURM_JOB_ID ;; esac
exit $status
"""


def submit_sweep(config: ExperimentConfig, num_runs: int) -> list[str]:
    """Submit the jobs of a sweep and return a line for each.

    Raises:
        InputError: there is no sbatch, or it refuses a job; what was submitted before is named.
    """
    script = str(Path(research_config.__file__).with_name("research_main.py"))
    words = [sys.executable, script, *command_line(config), "--sweep", *config.sweep]
    folder = config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    submitted: list[str] = []

    def submit(name: str, extra: Sequence[str], options: Sequence[str]) -> str:
        job = run_sbatch(SCRIPT.format(command=shlex.join([*words, *extra])), [*common_options(config), *options], submitted)
        submitted.append(f"job {job}: {name}")
        return job

    prepare = submit("tokens, teachers and teacher outputs", ["--prepare_only"], [f"--output={folder / 'slurm-prepare.out'}"])
    tasks = min(num_runs, MOST_TASKS)
    array = submit(
        f"{num_runs} runs, {min(config.jobs, tasks)} at a time",
        ["--sweep_shard", "slurm"],
        [f"--array=1-{tasks}%{config.jobs}", f"--dependency=afterok:{prepare}", f"--output={folder / 'slurm-run_%a.out'}"],
    )
    last = [f"--dependency=afterok:{prepare},afterany:{array}", f"--output={folder / 'slurm-compare.out'}"]
    submit("what is left of the runs, and their comparison", [], last)
    return submitted


def common_options(config: ExperimentConfig) -> list[str]:
    """Return the options of sbatch that all jobs of a sweep have; those of --slurm_options win."""
    own = [
        "--parsable",
        "--requeue",
        "--open-mode=append",
        "--kill-on-invalid-dep=yes",  # without a teacher that is good enough there are no runs to wait for
        f"--signal=B:USR1@{WARNING_S}",
        f"--cpus-per-task={config.num_threads}",
    ]
    return [*own, *(f"--{option}" for option in config.slurm_options)]


def run_sbatch(script: str, options: Sequence[str], submitted: Sequence[str]) -> str:
    """Submit a script and return the job's number."""
    before = f" Submitted before: {', '.join(submitted)}." if submitted else ""
    try:
        done = subprocess.run(["sbatch", *options], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("--launcher: slurm, but there is no sbatch here. Run this on a login node of the cluster.") from None
    said = done.stderr.strip().partition("\n")[0]
    if done.returncode:
        raise InputError(f"--launcher: sbatch ended with {done.returncode}: {said}.{before}")
    return done.stdout.strip().partition(";")[0]
