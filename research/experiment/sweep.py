"""A grid of runs from one command: the product of some flags' values, shared out to worker processes.

Each worker imports the libraries once, keeps the tables and the tokenised text of its last run, and goes
from run to run. A run leaves the directory that the same command by itself would leave.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from research.errors import FlagErrors, quote_value
from research.experiment.command import run_one
from research.flags import fields_of_kind, fields_that_decide, format_value, parse_value, write_flags
from research.logs import start_logging
from research.runs.run import result_line
from research_config import ExperimentConfig, check_config, saved_settings

if TYPE_CHECKING:
    from research.experiment.runtime import Extras

log = logging.getLogger("research")
# Runs that differ only by these would be one run, or were settled before there was a grid.
NOT_SWEPT = fields_that_decide(ExperimentConfig, "place", "flags")


@dataclass(frozen=True)
class Outcome:
    """What became of one run: its exit status and its metrics, None unless it is finished."""

    config: ExperimentConfig
    status: int
    metrics: dict[str, Any] | None


def parse_sweep(entries: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Return {flag: values} of `flag=v1,v2` entries; a `;` anywhere separates values that hold commas.

    Raises:
        FlagErrors: every problem in them.
    """
    fields = {entry.name for entry in dataclasses.fields(ExperimentConfig)}
    values: dict[str, tuple[Any, ...]] = {}
    problems = []
    for entry in entries:
        name, separator, text = entry.partition("=")
        name = name.removeprefix("--")
        if not separator or name not in fields:
            problems.append(f"--sweep: {quote_value(entry)} is not FLAG=V1,V2 with a flag that --help lists")
        elif name in NOT_SWEPT:
            problems.append(f"--sweep: {quote_value(entry)} cannot be swept: the runs of a sweep share one --{name}")
        elif name in values:
            problems.append(f"--sweep: {quote_value(entry)} is swept twice")
        else:
            try:
                parts = text.split(";" if ";" in text else ",")
                values[name] = tuple(parse_value(ExperimentConfig, name, part) for part in parts)
            except ValueError as error:
                problems.append(f"--sweep: {name} {error}")
    if problems:
        raise FlagErrors(problems)
    return values


def expand_sweep(config: ExperimentConfig) -> list[ExperimentConfig]:
    """Return the config of every run of the grid, each with its own directory below --output_dir.

    Raises:
        FlagErrors: the problems of --sweep and of all runs, together.
    """
    swept = parse_sweep(config.sweep)
    single = dataclasses.replace(config, sweep=(), num_threads=threads_per_run(config))
    folder = config.run_dir
    runs: dict[Path, ExperimentConfig] = {}
    problems: list[str] = []
    for values in itertools.product(*map(dict.fromkeys, swept.values())):
        chosen = dict(zip(swept, values, strict=True))
        run = dataclasses.replace(single, **chosen, output_dir=str(folder / name_run(chosen)))
        if run.run_dir in runs:  # "a/b" and "a-b" get one name
            run = dataclasses.replace(run, output_dir=f"{run.output_dir}_{run.fingerprint}")
        problems += [problem for problem in check_config(run) if problem not in problems]
        runs[run.run_dir] = run
    if problems:
        raise FlagErrors(problems)
    return list(runs.values())


def threads_per_run(config: ExperimentConfig) -> int | None:
    """Return --num_threads, or the cores over the jobs: several small runs beat one spread thin."""
    if config.num_threads is not None or config.jobs == 1:
        return config.num_threads
    return max(1, len(os.sched_getaffinity(0)) // config.jobs)


def name_run(values: dict[str, Any]) -> str:
    """Return a folder name such as kd_alpha_0.3_kd_temperature_2."""
    texts = (f"{name}_{format_value(value) or 'none'}" for name, value in values.items())
    return "_".join(re.sub(r"[^\w.-]+", "-", text).strip("-") for text in texts)


def run_sweep(config: ExperimentConfig, extras: Extras | None = None) -> int:
    """Run what is missing of the grid and print every run's line; return the exit status.

    A run that fails is named at the end; the others finish.
    """
    runs = expand_sweep(config)
    outcomes: list[Outcome] = []
    context = get_context("spawn")
    devices = context.SimpleQueue()
    for job in range(config.jobs):
        devices.put(job)
    with ProcessPoolExecutor(config.jobs, mp_context=context, initializer=start_worker, initargs=(devices,)) as pool:
        futures = {pool.submit(run_in_worker, run, extras): run for run in runs}
        bar = tqdm(as_completed(futures), total=len(runs), unit="run", desc="sweep", disable=not sys.stderr.isatty())
        for future in bar:
            try:
                outcomes.append(future.result())
            except BrokenProcessPool:
                outcomes.append(Outcome(futures[future], 1, None))
    return report(config.run_dir, runs, outcomes)


def report(folder: Path, runs: Sequence[ExperimentConfig], outcomes: Sequence[Outcome]) -> int:
    """Print the finished runs in the order of the grid, the best one last, and name the failed ones."""
    by_run = {outcome.config.run_dir: outcome for outcome in outcomes}
    finished = [outcome for run in runs if (outcome := by_run[run.run_dir]).metrics is not None]
    failed = [outcome for run in runs if (outcome := by_run[run.run_dir]).metrics is None]
    for outcome in finished:
        print(result_line(outcome.config.run_dir, outcome.metrics or {}))
    for outcome in failed:
        log.error("%s: exit status %d; its run.log says why", outcome.config.run_dir, outcome.status)
    if finished:
        best = max(finished, key=lambda outcome: outcome.metrics["headline"]["value"] if outcome.metrics else 0.0)
        print(f"{folder}  {len(finished)} of {len(runs)} runs, best: {result_line(best.config.run_dir, best.metrics or {})}")
    return max((outcome.status for outcome in failed), default=0)


_job = 0


def start_worker(devices: Any) -> None:
    """Give a new worker its number, and so its card."""
    global _job
    _job = devices.get()
    start_logging(level=logging.WARNING)


def run_in_worker(config: ExperimentConfig, extras: Extras | None) -> Outcome:
    """Do one run of the sweep, on the worker's card."""
    status, metrics = run_one(place_on_card(config), command_line(config), extras)
    return Outcome(config, status, metrics)


def place_on_card(config: ExperimentConfig) -> ExperimentConfig:
    """Put the worker's runs on a card of its own when there are several."""
    import torch

    cards = torch.cuda.device_count()
    if config.device in ("auto", "cuda") and cards > 1:
        return dataclasses.replace(config, device=f"cuda:{_job % cards}")
    return config


def command_line(config: ExperimentConfig) -> list[str]:
    """Return the flags that make this run by itself: those that differ from their defaults."""
    defaults = ExperimentConfig()
    names = sorted({*saved_settings(config), *fields_of_kind(config, "folder")})
    values = {name: getattr(config, name) for name in names}
    return write_flags({name: value for name, value in values.items() if value != getattr(defaults, name)})
