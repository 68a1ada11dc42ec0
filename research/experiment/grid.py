"""The grid of a sweep: the product of some flags' values, each run with a folder of its own."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import research_config
from research.errors import FlagErrors, InputError, quote_value
from research.flags import Grid, fields_that_decide, format_value, parse_grid, write_flags
from research.settings.sweep import without_sweep
from research_config import ExperimentConfig, check_config

# Runs that differ only by these would be one run, or were settled before there was a grid.
NOT_SWEPT = fields_that_decide(ExperimentConfig, "place", "flags")


def parse_sweep(entries: Sequence[str]) -> Grid:
    """Return {flag: values} of --sweep.

    Raises:
        FlagErrors: every problem in them.
    """

    def forbid(name: str) -> str | None:
        return f"cannot be swept: the runs of a sweep share one --{name}" if name in NOT_SWEPT else None

    return parse_grid(ExperimentConfig, "sweep", entries, forbid)


def expand_sweep(config: ExperimentConfig) -> list[ExperimentConfig]:
    """Return the config of every run of the grid, each with its own directory below --output_dir.

    Raises:
        FlagErrors: the problems of --sweep and of all runs, together.
    """
    swept = parse_sweep(config.sweep)
    single = dataclasses.replace(config, **without_sweep())
    folder = config.run_dir
    runs: dict[Path, ExperimentConfig] = {}
    problems: list[str] = []
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        run = dataclasses.replace(single, **chosen, output_dir=str(folder / name_run(chosen)))
        if run.run_dir in runs:  # "a/b" and "a-b" get one name
            run = dataclasses.replace(run, output_dir=f"{run.output_dir}_{run.fingerprint}")
        problems += [problem for problem in check_config(run) if problem not in problems]
        runs[run.run_dir] = run
    if problems:
        raise FlagErrors(problems)
    return list(runs.values())


def name_run(values: dict[str, Any]) -> str:
    """Return a folder name such as kd_alpha_0.3_kd_temperature_2."""
    texts = (f"{name}_{format_value(value) or 'none'}" for name, value in values.items())
    return "_".join(re.sub(r"[^\w.-]+", "-", text).strip("-") for text in texts)


def command_line(config: ExperimentConfig) -> list[str]:
    """Return the flags that make this run by itself: those that differ from their defaults.

    Without --overwrite, --dry_run and --prepare_only, which are said of a command, not of a run.
    """
    of_the_command = {"overwrite", "dry_run", "prepare_only", *without_sweep()}
    names = sorted(entry.name for entry in dataclasses.fields(config) if entry.name not in of_the_command)
    values = {name: getattr(config, name) for name in names}
    defaults = ExperimentConfig()
    return write_flags({name: value for name, value in values.items() if value != getattr(defaults, name)})


def shell_lines(runs: Sequence[ExperimentConfig], threads: int | None) -> list[str]:
    """Return a line for a shell for each run, which does what a worker of the sweep would.

    Args:
        threads: How many a worker has where --num_threads does not say; None leaves it to torch.

    Raises:
        InputError: a value cannot stand in one line.
    """
    lines = []
    for run in runs:
        share = [f"OMP_NUM_THREADS={threads}"] if threads is not None and run.num_threads is None else []
        overwrite = ["--overwrite"] if run.overwrite else []
        line = " ".join([*share, shlex.join([*program_words(), *command_line(run), *overwrite])])
        if len(line.splitlines()) > 1:
            raise InputError(f"--print_commands: {quote_value(line)} does not fit into one line; rename what has a line break")
        lines.append(line)
    return lines


def program_words() -> list[str]:
    """Return what starts this program: `python research_main.py` where that is in the working folder."""
    script = Path(research_config.__file__).with_name("research_main.py")
    here = Path(script.name)
    return ["python", script.name] if here.exists() and here.samefile(script) else [sys.executable, str(script)]
