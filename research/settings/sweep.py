"""Flags of a sweep: which runs it has, and who does them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from research.errors import quote_value
from research.flags import between, matching, setting

SHARD = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})")
SLURM_OPTION = re.compile(r"[a-z][a-z-]*(=.*)?")
# What the launcher itself says of its jobs.
SET_BY_LAUNCHER = frozenset({"array", "chdir", "dependency", "open-mode", "output", "parsable", "requeue", "signal", "wrap"})


@dataclass(frozen=True)
class SweepSettings:
    """The grid of a sweep and how its runs are shared out; nothing of it is in the runs themselves."""

    sweep: tuple[str, ...] = setting(
        (),
        "sweep",
        "run the product of these values, as in kd_alpha=0.3,0.5 kd_temperature=2,4; each run gets a folder below --output_dir",
        metavar="FLAG=V1,V2",
        decides="place",
        repeatable=True,
    )
    jobs: int = setting(
        1, "sweep", "worker processes of --sweep; with --launcher slurm tasks at a time", check=between(1), decides="place"
    )
    runs_per_device: int | None = setting(
        None, "sweep", "instead of --jobs: so many worker processes on each CUDA device", check=between(1), decides="place"
    )
    sweep_shard: str | None = setting(
        None,
        "sweep",
        "do every N-th run only, from the I-th on, I from 1 to N; slurm takes I and N from the array task",
        check=matching(rf"{SHARD.pattern}|slurm", "I/N, as in 1/8 to 8/8, or slurm"),
        metavar="I/N",
        decides="place",
    )
    print_commands: bool = setting(
        False, "sweep", "print a line for each run that does it by itself in a shell, and stop", decides="place"
    )
    launcher: str = setting(
        "local",
        "sweep",
        "local: this machine; slurm: submit jobs that fill the cache, do the runs and compare them, and stop",
        choices=("local", "slurm"),
        decides="place",
    )
    slurm_options: tuple[str, ...] = setting(
        (),
        "sweep",
        "options of sbatch for the jobs, without their dashes, as in partition=gpu gres=gpu:1 time=4:00:00",
        metavar="NAME=VALUE",
        decides="place",
        repeatable=True,
    )


def without_sweep() -> dict[str, Any]:
    """Return {field: default} of the fields that only a sweep has."""
    return {entry.name: entry.default for entry in fields(SweepSettings)}


def check_sweep_flags(config: Any) -> list[str]:
    """Return the problems of the sweep's flags with each other and with the rest of a config."""
    alone = "only a --sweep has runs to share out"
    given = {
        "runs_per_device": config.runs_per_device is not None,
        "sweep_shard": config.sweep_shard is not None,
        "print_commands": config.print_commands,
        "launcher": config.launcher == "slurm",
    }
    problems = [f"--{name}: {alone}" for name, is_given in given.items() if is_given and not config.sweep]
    if config.runs_per_device is not None and config.jobs > 1:
        problems.append(f"--runs_per_device: says how many workers there are; drop --jobs {config.jobs}")
    if config.sweep_shard is not None:
        shard = SHARD.fullmatch(config.sweep_shard)
        if shard and int(shard[1]) > int(shard[2]):
            problems.append(f"--sweep_shard: the first number goes from 1 to {shard[2]}, got {config.sweep_shard}")
        if config.overwrite:
            problems.append(
                "--sweep_shard: does not go with --overwrite, as parts could not tell what others have made afresh; "
                "use another --output_dir"
            )
        if config.prepare_only:
            problems.append("--sweep_shard: --prepare_only prepares the whole sweep; drop one of them")
    if config.print_commands and config.prepare_only:
        problems.append("--print_commands: prints runs, and --prepare_only does none; drop one of them")
    return [*problems, *check_slurm_flags(config)]


def check_slurm_flags(config: Any) -> list[str]:
    """Return the problems of the flags of --launcher slurm."""
    problems = []
    for option in config.slurm_options:
        name = option.partition("=")[0]
        if not SLURM_OPTION.fullmatch(option):
            problems.append(f"--slurm_options: {quote_value(option)} is not NAME=VALUE, as in time=4:00:00")
        elif name in SET_BY_LAUNCHER:
            problems.append(f"--slurm_options: {name} is the launcher's own to set")
    if config.launcher != "slurm":
        return [*problems, *(["--slurm_options: needs --launcher slurm"] if config.slurm_options else [])]
    others = {name: getattr(config, name) for name in ("sweep_shard", "print_commands", "prepare_only", "runs_per_device")}
    problems += [f"--launcher: slurm does not go with --{name}, which its jobs are given" for name in others if others[name]]
    if config.overwrite:
        problems.append("--launcher: slurm does not go with --overwrite; use another --output_dir")
    if config.num_threads is None:
        problems.append(
            "--launcher: slurm needs --num_threads, since a teacher that is made with other threads than a run has is not its own"
        )
    return problems
