"""Where a run computes, and what it shares with others."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from research.distributed import ALONE, World
from research.errors import InputError, StopRequest
from research.storage.cache import Cache
from research_config import ExperimentConfig


@dataclass(frozen=True)
class Extras:
    """What a caller may cut short because no result depends on it, as tests do.

    Attributes:
        measure_s: Seconds that each timing of a model takes, at least three calls.
        plots: Whether figures are drawn.
    """

    measure_s: float = 0.5
    plots: bool = True


@dataclass
class Runtime:
    """The device, the cache and the clock of a run."""

    device: torch.device
    cache: Cache
    stop: StopRequest
    command_line: list[str]
    extras: Extras = Extras()
    world: World = ALONE
    timing_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what is done inside to the seconds of a phase."""
        started = time.monotonic()
        yield
        self.timing_s[phase] = self.timing_s.get(phase, 0.0) + time.monotonic() - started


def start_runtime(
    config: ExperimentConfig, command_line: list[str], stop: StopRequest, extras: Extras, world: World = ALONE
) -> Runtime:
    """Choose device and threads.

    Raises:
        InputError: the device is not there.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return Runtime(choose_device(config, world), open_cache(config.cache_dir, world), stop, command_line, extras, world)


def choose_device(config: ExperimentConfig, world: World = ALONE) -> torch.device:
    """Return the device of --device; each of several processes has a card of its own.

    Raises:
        InputError: a CUDA device is asked for and there is none of that number.
    """
    if world.size > 1 and config.device != "cpu" and torch.cuda.is_available():
        cards = torch.cuda.device_count()
        if world.local_rank >= cards:
            raise InputError(
                f"--device: {cards} CUDA devices were found, which is fewer than processes. Let torchrun start "
                f"--nproc_per_node {cards}, or give --device cpu"
            )
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device: {config.device} is not there; {torch.cuda.device_count()} CUDA devices were found")
    return device


@functools.cache
def open_cache(folder: str, world: World = ALONE) -> Cache:
    """Return one Cache a folder and process, so what a sweep's worker has verified it need not verify again."""
    return Cache(Path(folder), world)


def machine_name(device: torch.device) -> str:
    """Name what computed: the card, or the kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"
