"""What a sweep says while it runs: each start, end and failure, and the time that is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from research.errors import InputError
from research.experiment.command import Outcome
from research.logs import format_duration
from research.runs.formats import dig, read_json
from research.runs.run import result_line
from research_config import ExperimentConfig

log = logging.getLogger("research")
# What the first runs do for the others, which find it in the cache.
SHARED_PHASES = ("tokenize", "teacher", "teacher_outputs")


class SweepProgress:
    """Tells what happens to the runs, each by its number in the grid, and how long the rest will take.

    Args:
        to_do: The numbers of the runs that there is something to do for.
    """

    def __init__(self, runs: Sequence[ExperimentConfig], to_do: Sequence[int], num_workers: int) -> None:
        self.runs = runs
        self.num_workers = num_workers
        self.waiting = set(to_do)
        self.began_s: dict[int, float] = {}
        self.costs_s: list[float] = []
        self.said: set[str] = set()

    def start(self, run: int) -> None:
        """Say that a run is being done."""
        self.waiting.discard(run)
        self.began_s[run] = time.monotonic()
        log.info("%s: started", self._name(run))

    def warn(self, run: int, text: str) -> None:
        """Pass a run's warning on, unless another run has given the very same."""
        if text not in self.said:
            self.said.add(text)
            log.warning("%s: %s", self._name(run), text)

    def die(self, run: int, how: str) -> None:
        """Say that a run's process is gone and the run waits again."""
        del self.began_s[run]
        self.waiting.add(run)
        log.warning("%s: its process %s; the run will be tried once more", self._name(run), how)

    def end(self, run: int, outcome: Outcome) -> None:
        """Say how a run ended and how long the others will take."""
        seconds = time.monotonic() - self.began_s.pop(run)
        if outcome.metrics is None:
            log.error("%s: failed after %s: %s", self._name(run), format_duration(seconds), outcome.problem)
            return
        # Beside the runs that pay for what all share, or wait for it, the first estimate knows no other.
        first = len(self.costs_s) < self.num_workers
        self.costs_s.append(max(0.0, seconds - self._shared_s(run)) if first else seconds)
        left = self.seconds_left()
        rest = f"; about {format_duration(left)} left" if left else ""
        line = result_line(self.runs[run].run_dir, outcome.metrics)
        log.info("[%d/%d] %s after %s%s", run + 1, len(self.runs), line, format_duration(seconds), rest)

    def leave(self, run: int) -> None:
        """Say that another process is at a run that this one began with."""
        del self.began_s[run]
        self.waiting.add(run)
        log.info("%s: another process is at it", self._name(run))

    def end_elsewhere(self, run: int, outcome: Outcome) -> None:
        """Say how a run ended that another process did."""
        self.waiting.discard(run)
        how = outcome.problem if outcome.metrics is None else result_line(self.runs[run].run_dir, outcome.metrics)
        log.info("[%d/%d] %s, done by another process", run + 1, len(self.runs), how)

    def seconds_left(self) -> float:
        """Return how long the runs that wait and those at work will take, if they cost what the finished ones did."""
        mean = sum(self.costs_s) / len(self.costs_s)
        now = time.monotonic()
        at_work = sum(max(0.0, mean - (now - began)) for began in self.began_s.values())
        return (at_work + mean * len(self.waiting)) / self.num_workers

    def _shared_s(self, run: int) -> float:
        """Return the seconds of a finished run that went into what all runs share."""
        try:
            timing = dig(read_json(self.runs[run].run_dir / "environment.json"), "timing_s") or {}
        except InputError:  # of cross-validation, whose folds have one each
            return 0.0
        return sum(timing.get(phase, 0.0) for phase in SHARED_PHASES)

    def _name(self, run: int) -> str:
        return f"[{run + 1}/{len(self.runs)}] {self.runs[run].run_dir}"
