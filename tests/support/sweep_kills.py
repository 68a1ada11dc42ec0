"""Sweeps of the real command, stopped or killed: their parent, one worker, or the whole group of processes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

from support.builders import ROOT
from support.fault_injection import FLAGS, copy_inputs, find_litter, read_results

SWEEP_FLAGS = [*FLAGS, "--sweep", "kd_alpha=0.3,0.7,0.9", "--jobs", "2"]
TARGETS = ("parent", "worker", "group")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# What a worker says to its machine: "spawn" names it, the tracker of multiprocessing is no worker.
WORKER = b"multiprocessing.spawn"
STRIKES_PER_SWEEP = 3
SURVIVAL_S = 10.0  # what is alive this long after the parent has outlived it
TIMEOUT_S = 600


@dataclass(frozen=True)
class Strike:
    """One signal to a running sweep, and what became of it.

    Attributes:
        status: The parent's exit status, minus the signal that killed it.
        stop_s: Seconds from the signal to the parent's end.
        survivors: Processes of the sweep alive SURVIVAL_S after that.
        begun: Whether the sweep had begun to look for runs, so that a signal had its handler.
    """

    target: str
    by: signal.Signals
    status: int
    stop_s: float
    survivors: int
    begun: bool
    errors: str

    def fault(self) -> str | None:
        """Say what is wrong with how the sweep ended, None when nothing is."""
        if self.survivors:
            return f"{self.survivors} processes outlived it"
        # A worker whose parent was killed before it had said what to do prints this before any code of ours runs.
        unborn = self.target == "parent" and self.by == signal.SIGKILL and "from_parent" in self.errors
        if "Traceback" in self.errors and self.begun and not unborn:
            return "a traceback"
        if self.target == "worker":
            expected = {0}
        elif self.by == signal.SIGKILL:
            expected = {-signal.SIGKILL}
        else:
            expected = {130} if self.begun else {130, -self.by, 1}
        if self.status not in expected:
            return f"exit status {self.status}"
        if self.status == 130 and "the same command goes on from here" not in self.errors:
            return "nothing says how to go on"
        return None


class Sweep:
    """A sweep in a session of its own, whose processes are known by a variable of their environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = f"SWEEP_UNDER_TEST={uuid.uuid4()}".encode()
        name, value = self.mark.decode().split("=")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", name: value}
        with open(folder / "stdout.txt", "wb") as output, open(folder / "stderr.txt", "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "research_main.py"), *SWEEP_FLAGS],
                cwd=folder, env=environment, stdout=output, stderr=errors, start_new_session=True,
            )  # fmt: skip

    def processes(self) -> dict[int, bytes]:
        """Return the command lines of the sweep's living processes."""
        found = {}
        for place in Path("/proc").iterdir():
            try:
                if place.name.isdigit() and self.mark in (place / "environ").read_bytes().split(b"\0"):
                    found[int(place.name)] = (place / "cmdline").read_bytes()
            except OSError:  # it has ended, or is another's
                continue
        return {process: line for process, line in found.items() if line}

    def workers(self) -> list[int]:
        return sorted(process for process, line in self.processes().items() if WORKER in line)

    def errors(self) -> str:
        return (self.folder / "stderr.txt").read_text(encoding="utf-8")

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def strike(self, target: str, by: signal.Signals, generator: random.Random) -> Strike:
        """Send a signal and see the sweep to its end."""
        begun = "sweep of" in self.errors()
        started = time.monotonic()
        if target == "group":
            os.killpg(self.process.pid, by)
        else:
            os.kill(self.process.pid if target == "parent" else generator.choice(self.workers()), by)
        status = self.wait()
        stop_s = time.monotonic() - started
        deadline = time.monotonic() + SURVIVAL_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            os.kill(process, signal.SIGKILL)
        return Strike(target, by, status, stop_s, len(left), begun, self.errors())


def strike_when(
    ready: Callable[[Sweep], bool], folder: Path, target: str, by: signal.Signals, generator: random.Random
) -> Strike | int:
    """Start the sweep and strike it once it is ready; return its exit status if it ended before that."""
    sweep = Sweep(folder)
    while not ready(sweep) or (target == "worker" and not sweep.workers()):
        if sweep.process.poll() is not None:
            return sweep.wait()
        time.sleep(0.05)
    return sweep.strike(target, by, generator)


def after(seconds: float) -> Callable[[Sweep], bool]:
    """Return a condition that holds some seconds from now."""
    moment = time.monotonic() + seconds
    return lambda _sweep: time.monotonic() >= moment


def read_sweep(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return the bytes of everything in a finished sweep that has to repeat, by run."""
    return {path.name: read_results(path) for path in sorted((folder / "run").glob("kd_alpha_*"))}


def run_untouched(folder: Path) -> float:
    """Run the sweep to its end and return its seconds."""
    started = time.monotonic()
    sweep = Sweep(folder)
    assert sweep.wait() == 0, sweep.errors()
    return time.monotonic() - started


def kill_sweeps(
    folder: Path,
    inputs: Path,
    seconds: float,
    expected: dict[str, dict[str, bytes]],
    wanted: int,
    seed: int,
    blows: Sequence[tuple[str, signal.Signals]] = tuple(product(TARGETS, SIGNALS)),
) -> dict[str, Any]:
    """Strike sweeps at least `wanted` times and return the counts; one that ended otherwise stays in `folder`.

    Each is struck up to three times at random moments, started again after each, and then left to end.
    """
    started = time.monotonic()
    generator = random.Random(seed)
    strikes: list[Strike] = []
    faults: list[str] = []
    turns: Iterator[tuple[str, signal.Signals]] = (blows[number % len(blows)] for number in count())
    sweeps = 0
    while len(strikes) < wanted:
        sweeps += 1
        place = copy_inputs(inputs, folder / f"sweep_{sweeps}")
        status = None
        for _ in range(STRIKES_PER_SWEEP):
            target, by = next(turns)
            ended = strike_when(after(generator.uniform(0.1, seconds)), place, target, by, generator)
            status = ended if isinstance(ended, int) else ended.status
            if isinstance(ended, Strike):
                strikes.append(ended)
                if fault := ended.fault():
                    faults.append(f"{place.name}: {by.name} to the {target}: {fault}")
            if status == 0:
                break
        if status != 0:
            run_untouched(place)
        if read_sweep(place) != expected or find_litter(place):
            faults.append(f"{place.name}: other bytes, or litter")
        elif not any(fault.startswith(f"{place.name}:") for fault in faults):
            shutil.rmtree(place)
    stops = [strike.stop_s for strike in strikes if strike.target != "worker" and strike.by != signal.SIGKILL]
    return {
        "sweep_kills": len(strikes),
        "sweep_kills_by_target": dict(Counter(f"{strike.by.name} {strike.target}" for strike in strikes)),
        "sweeps": sweeps,
        "sweep_s": round(seconds, 1),
        "stop_s": {"median": round(sorted(stops)[len(stops) // 2], 1), "most": round(max(stops), 1)} if stops else None,
        "survivors": sum(strike.survivors for strike in strikes),
        "sweeps_that_differ": faults,
        "seconds_of_sweeps": round(time.monotonic() - started, 1),
    }
