"""What every stage of a run reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.experiment.inputs import Inputs
from research.experiment.runtime import Runtime
from research.experiment.tokenised import Tokenised
from research.report.trackers import NO_TRACKING, Tracking
from research.runs.directory import RunDirectory
from research.text.batches import BatchLoader
from research.text.tokens import Tokens

EVAL_BATCH = 1024
# Padded tokens of an evaluation batch: what stays in a CPU's cache, what fills a GPU.
EVAL_TOKENS = {"cpu": 1024, "cuda": 32768}


@dataclass(frozen=True)
class RunContext:
    """A run's checked inputs, their tokens, where it computes, the directory it writes, and whom --track tells of it.

    Attributes:
        trial: Which trial of --search it is, as in trial_1; empty outside of one.
    """

    inputs: Inputs
    tokens: Tokenised
    runtime: Runtime
    run_dir: RunDirectory
    tracking: Tracking = NO_TRACKING
    trial: str = ""

    def name_training(self, name: str) -> str:
        """Return what a model's training is known by beside those of other trials, as in student_trial_1."""
        return f"{name}_{self.trial}" if self.trial else name

    def evaluation_batches(self, rows: NDArray[np.int64], tokens: Tokens, **carried: Any) -> BatchLoader:
        """Return batches that pad little and fill the device, longest rows first.

        Args:
            carried: What `BatchLoader` can add to its batches for a teacher with another tokenizer.
        """
        budget, world = EVAL_TOKENS[self.runtime.device.type], self.runtime.world
        return BatchLoader(rows, tokens, self.inputs.comments.labels, EVAL_BATCH, token_budget=budget, world=world, **carried)

    def training_batches(
        self, rows: NDArray[np.int64], tokens: Tokens, seed: int, labels: NDArray[np.float32] | None = None, **carried: Any
    ) -> BatchLoader:
        """Return batches of --batch rows of similar length, shuffled by a seed anew each epoch; processes share each.

        Args:
            labels: (N, C) of all rows, where they are not those of the tables.
        """
        labels = self.inputs.comments.labels if labels is None else labels
        batch, world = self.inputs.config.batch, self.runtime.world
        return BatchLoader(rows, tokens, labels, batch, seed=seed, world=world, **carried)
