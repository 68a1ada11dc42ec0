"""The grid of a sweep: the product of some flags' values, each run with a folder of its own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.errors import FlagErrors, quote_value
from research.flags import fields_of_kind, fields_that_decide, format_value, parse_value, write_flags
from research_config import ExperimentConfig, check_config, saved_settings

# Runs that differ only by these would be one run, or were settled before there was a grid.
NOT_SWEPT = fields_that_decide(ExperimentConfig, "place", "flags")


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
    single = dataclasses.replace(config, sweep=())
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


def name_run(values: dict[str, Any]) -> str:
    """Return a folder name such as kd_alpha_0.3_kd_temperature_2."""
    texts = (f"{name}_{format_value(value) or 'none'}" for name, value in values.items())
    return "_".join(re.sub(r"[^\w.-]+", "-", text).strip("-") for text in texts)


def command_line(config: ExperimentConfig) -> list[str]:
    """Return the flags that make this run by itself: those that differ from their defaults."""
    defaults = ExperimentConfig()
    names = sorted({*saved_settings(config), *fields_of_kind(config, "folder")})
    values = {name: getattr(config, name) for name in names}
    return write_flags({name: value for name, value in values.items() if value != getattr(defaults, name)})
