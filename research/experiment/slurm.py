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
# The batch shell hands the warning on and, of a command that stopped for it, puts the job back into the queue.
SCRIPT = """#!/bin/sh
{command} &
child=$!
trap 'kill -USR1 $child' USR1
trap 'kill -TERM $child' TERM
wait $child
status=$?
while kill -0 $child 2> /dev/null; do wait $child; status=$?; done
if [ $status = 130 ]; then scontrol requeue $SLURM_JOB_ID; fi
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
    array = submit(
        f"{num_runs} runs, {min(config.jobs, num_runs)} at a time",
        ["--sweep_shard", "slurm"],
        [f"--array=1-{num_runs}%{config.jobs}", f"--dependency=afterok:{prepare}", f"--output={folder / 'slurm-run_%a.out'}"],
    )
    last = [f"--dependency=afterany:{array}", f"--output={folder / 'slurm-compare.out'}"]
    submit("what is left of the runs, and their comparison", [], last)
    return submitted


def common_options(config: ExperimentConfig) -> list[str]:
    """Return the options of sbatch that all jobs of a sweep have; those of --slurm_options win."""
    own = [
        "--parsable",
        "--requeue",
        "--open-mode=append",
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
