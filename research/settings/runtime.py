"""Flags of the machine that a run is done on, and of where it leaves its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from research.flags import between, find_package, matching, setting
from research.names import TRACKERS


@dataclass(frozen=True)
class RuntimeSettings:
    """Where and how a run is done."""

    device: str = setting(
        "auto",
        "runtime and output",
        "auto (cuda when there is one), cpu, cuda, cuda:1",
        check=matching(r"auto|cpu|cuda(:[0-9]{1,2})?", "auto, cpu, cuda or cuda:N"),
        decides="machine",
    )
    num_threads: int | None = setting(
        None,
        "runtime and output",
        "CPU threads (default: torch's own choice, with --jobs a share of the cores); the last digits of a result repeat "
        "only with as many, which environment.json names",
        check=between(1),
        decides="machine",
    )
    shard_teacher: bool = setting(
        False,
        "teacher",
        "spread each teacher's parameters over the processes of torchrun, for one that is too large for a card",
        decides="teacher",
        keyed_at_default=False,
    )
    checkpoint_minutes: float = setting(
        10.0,
        "runtime and output",
        "minutes between checkpoints inside an epoch; one is also written after each",
        check=between(0),
        decides="place",
    )
    output_dir: str | None = setting(
        None, "runtime and output", "the run's folder (default: results/<pipeline>_<fingerprint>)", decides="place", kind="folder"
    )
    cache_dir: str = setting(
        "cache", "runtime and output", "shared by runs: tokenised text, teachers, teacher outputs", decides="place", kind="folder"
    )
    cache_budget_gb: float = setting(
        20.0,
        "runtime and output",
        "most GB (10^9 bytes) of cached teacher states and maps of one run; past it the teacher runs live",
        check=between(0),
        decides="machine",
    )
    track: str = setting(
        "none",
        "runtime and output",
        "also send config, each epoch as it ends, and final scores to a tracker",
        choices=("none", *TRACKERS),
        check=lambda name: None if name == "none" else find_package(name),
        decides="place",
    )
    overwrite: bool = setting(
        False,
        "runtime and output",
        "start afresh in an output_dir that already holds a run; once begun, the same command goes on until it is finished",
        decides="place",
    )


def check_runtime_flags(config: Any) -> list[str]:
    """Return the problems of the machine's flags with the rest of a config."""
    if config.shard_teacher and config.ema_decay:
        return [
            f"--ema_decay: {config.ema_decay:g} averages weights that lie whole in each process, and --shard_teacher spreads "
            "them; drop one of the two"
        ]
    return []
