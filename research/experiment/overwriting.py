"""A sweep that --overwrite starts afresh goes on when the same command is given again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress

from research.errors import InputError
from research.runs.directory import OVERWRITING_FILE
from research.runs.formats import read_json, write_json_atomic
from research_config import ExperimentConfig


class Overwriting:
    """Which runs of a sweep with --overwrite have been made afresh, kept on disk until all of them are.

    Without --overwrite it keeps nothing, and forgets what an earlier command kept.
    """

    def __init__(self, config: ExperimentConfig, runs: Sequence[ExperimentConfig]) -> None:
        self.path = config.run_dir / OVERWRITING_FILE
        self.begun = config.overwrite
        self.grid = {run.run_dir.name: run.fingerprint for run in runs}
        self.done: set[str] = set()
        if config.overwrite and self.path.is_file():
            try:
                stored = read_json(self.path)
            except InputError:  # not what was written: the runs are made afresh once more
                stored = {}
            if stored.get("grid") == self.grid:
                self.done = set(stored["done"])

    def settle(self, run: ExperimentConfig) -> ExperimentConfig:
        """Return the run without --overwrite when it has been made afresh."""
        return dataclasses.replace(run, overwrite=run.overwrite and run.run_dir.name not in self.done)

    def note(self, run: ExperimentConfig) -> None:
        """Keep that a run has been made afresh."""
        if self.begun:
            self.done.add(run.run_dir.name)
            with suppress(OSError):  # of a full disk: without the note the run is made once more
                write_json_atomic(self.path, {"grid": self.grid, "done": sorted(self.done)})

    def end(self) -> None:
        """Forget it: all are done, or no one asks any more."""
        self.path.unlink(missing_ok=True)
