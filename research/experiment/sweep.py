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

from research.errors import FlagErrors
from research.experiment.command import run_one
from research.logs import start_logging
from research.runs.run import result_line
from research_config import ExperimentConfig, check_config, convert, saved_settings

if TYPE_CHECKING:
    from research.experiment.runtime import Extras

log = logging.getLogger("research")


@dataclass(frozen=True)
class Outcome:
    """What became of one run: its exit status and its metrics, None unless it is finished."""

    config: ExperimentConfig
    status: int
    metrics: dict[str, Any] | None


def parse_sweep(entries: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Return {flag: values} of `flag=v1,v2` entries; a `;` anywhere separates values that hold commas.

    Raises:
        FlagErrors: every fault in them.
    """
    fields = {entry.name for entry in dataclasses.fields(ExperimentConfig)} - {"sweep", "jobs", "output_dir", "cache_dir", "demo"}
    values: dict[str, tuple[Any, ...]] = {}
    faults = []
    for entry in entries:
        name, separator, text = entry.partition("=")
        name = name.removeprefix("--")
        if not separator or name not in fields or name in values:
            why = "is swept twice" if name in values else "is not FLAG=V1,V2 with a flag that --help lists"
            faults.append(f"--sweep: '{entry}' {why}")
            continue
        try:
            values[name] = tuple(convert_value(name, part) for part in text.split(";" if ";" in text else ","))
        except ValueError as error:
            faults.append(f"--sweep: {name} {error}")
    if faults:
        raise FlagErrors(faults)
    return values


def convert_value(name: str, text: str) -> Any:
    """Convert one swept value; switches take on and off, lists take spaces between their items."""
    default = getattr(ExperimentConfig(), name)
    if isinstance(default, bool):
        if text not in ("on", "off"):
            raise ValueError(f"must be on or off, got {text!r}")
        return text == "on"
    if isinstance(default, tuple) or name == "label_columns":
        return convert(name, text.split())
    return convert(name, text)


def expand_sweep(config: ExperimentConfig) -> list[ExperimentConfig]:
    """Return the config of every run of the grid, each with its own directory below --output_dir.

    Raises:
        FlagErrors: a fault in --sweep or in one of the runs, all together.
    """
    swept = parse_sweep(config.sweep)
    single = dataclasses.replace(config, sweep=(), num_threads=threads_per_run(config))
    folder = config.run_dir
    runs: dict[Path, ExperimentConfig] = {}
    faults: list[str] = []
    for values in itertools.product(*map(dict.fromkeys, swept.values())):
        chosen = dict(zip(swept, values, strict=True))
        run = dataclasses.replace(single, **chosen, output_dir=str(folder / name_run(chosen)))
        if run.run_dir in runs:  # "a/b" and "a-b" get one name
            run = dataclasses.replace(run, output_dir=f"{run.output_dir}_{run.fingerprint}")
        faults += [fault for fault in check_config(run) if fault not in faults]
        runs[run.run_dir] = run
    if faults:
        raise FlagErrors(faults)
    return list(runs.values())


def threads_per_run(config: ExperimentConfig) -> int | None:
    """Return --num_threads, or the cores over the jobs: several small runs beat one spread thin."""
    if config.num_threads is not None or config.jobs == 1:
        return config.num_threads
    return max(1, len(os.sched_getaffinity(0)) // config.jobs)


def name_run(values: dict[str, Any]) -> str:
    """Return a folder name such as kd_alpha_0.3_kd_temperature_2."""
    return "_".join(re.sub(r"[^\w.-]+", "-", f"{name}_{show(value)}").strip("-") for name, value in values.items())


def show(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


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
    flags: list[str] = []
    for name in sorted({*saved_settings(config), "output_dir", "cache_dir"}):
        value = getattr(config, name)
        if value is None or value == getattr(defaults, name):
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            flags += [f"--{name}", *value]
        else:
            flags += [f"--{name}", str(value)]
    return flags
