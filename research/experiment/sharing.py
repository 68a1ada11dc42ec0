"""How the runs of a sweep are shared out: among the parts of a grid, the cards of a machine and its cores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from research.errors import InputError, quote_value
from research.settings.sweep import SHARD
from research_config import ExperimentConfig

# What Slurm tells each task of an array.
TASK, FIRST, STEP, TASKS = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "STEP", "COUNT"))


@dataclass(frozen=True)
class Shard:
    """A part of a grid: every `count`-th run, from number `index` on, counted from 1."""

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def numbers(self, num_runs: int) -> range:
        """Return the places in the grid of the part's runs, counted from 0."""
        return range(self.index - 1, num_runs, self.count)


def find_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """Return the part of --sweep_shard, the whole grid without it.

    Raises:
        InputError: it is to be taken from Slurm, which does not say or says something else than a part.
    """
    if text is None:
        return Shard()
    if text != "slurm":
        return Shard(*map(int, text.split("/")))
    if TASK not in environment:
        raise InputError(f"--sweep_shard: slurm, but {TASK} is not set. Submit with sbatch --array, or give I/N.")
    try:
        task, first, step, count = (int(environment.get(name, "1")) for name in (TASK, FIRST, STEP, TASKS))
        index = (task - first) // step + 1
        shard = SHARD.fullmatch(f"{index}/{count}")
    except (ValueError, ZeroDivisionError):
        shard = None
    if shard is None or index > count or (task - first) % step:
        said = ", ".join(f"{name}={quote_value(environment.get(name, ''))}" for name in (TASK, FIRST, STEP, TASKS))
        raise InputError(f"--sweep_shard: {said} is no part of a grid. Submit with --array=1-N, or give I/N.")
    return Shard(index, count)


def settle_jobs(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with --jobs for --runs_per_device.

    Raises:
        InputError: there is no card for it.
    """
    if config.runs_per_device is None:
        return config
    cards = count_cards(config.device)
    if not cards:
        raise InputError(f"--runs_per_device: no CUDA device was found for --device {config.device}. Use --jobs.")
    return replace(config, jobs=cards * config.runs_per_device, runs_per_device=None)


def count_cards(device: str) -> int:
    """Return how many cards the workers of a sweep can have: all, one that --device names, or none."""
    if device == "cpu":
        return 0
    import torch  # slow, and not needed to start workers of the CPU

    found = torch.cuda.device_count()
    return min(found, 1) if ":" in device else found


def choose_card(worker: int, cards: int) -> int:
    """Return a worker's card: they take turns, so that J workers have J / cards or one more each."""
    return worker % cards


def threads_per_run(config: ExperimentConfig, num_runs: int) -> int | None:
    """Return an equal share of the cores for the workers, None for one worker: several small runs beat one spread thin.

    It does not hang on how many runs are left, so a sweep that goes on uses what it used before.
    """
    workers = min(config.jobs, num_runs)
    if workers == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def shell_threads(config: ExperimentConfig, num_runs: int) -> int | None:
    """Return the threads that OMP_NUM_THREADS has to say for a run to have as many as in a worker."""
    threads, said = threads_per_run(config, num_runs), os.environ.get("OMP_NUM_THREADS", "")
    return min(threads, int(said)) if threads is not None and said.isdigit() and int(said) > 0 else threads
