"""The epoch loop: schedule, validation, the best epoch, checkpoints and resuming."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from research.distributed import World
from research.errors import Interrupted, StopRequest
from research.logs import PhaseProgress, format_duration
from research.models.classifiers import TextClassifier
from research.names import METRIC_OF, epoch_flag
from research.sharding import copy_state, own_pieces, put_state, restore_optimizer
from research.storage.checkpoints import CheckpointFolder
from research.text.batches import Batch, BatchLoader
from research_config import ExperimentConfig

log = logging.getLogger(__name__)
STEPS_BETWEEN_CHECKS = 50


@dataclass
class Progress:
    """Everything beside the weights that decides how training goes on; part of a checkpoint."""

    epoch: int = 0
    batches_done: int = 0
    global_step: int = 0
    skipped_steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    rows_summed: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float = -1.0


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves beside the student, which then holds its best epoch's weights."""

    history: list[dict[str, Any]]
    best_epoch: int
    best_score: float
    skipped_steps: int
    seconds: float


Validate = Callable[[nn.Module], Mapping[str, float]]
Watch = Callable[[Sequence[Mapping[str, Any]]], None]
# What an epoch's line leaves out: the soft loss keeps the teacher's own entropy, so it and the total look stuck.
NOT_IN_LINE = ("total_loss", "soft_loss")


class Trainer(Protocol):
    """What the epoch loop needs of a trainer: its step, and what a checkpoint keeps of it."""

    config: ExperimentConfig
    world: World
    device: torch.device
    student: TextClassifier

    @property
    def objective(self) -> Any:
        """The losses of a step, with the projections that are trained beside the student."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the student and the projections."""

    def judged_weights(self) -> AbstractContextManager[None]:
        """Let the student hold the weights that are validated and kept, inside."""

    def set_training_mode(self) -> None:
        """Turn the student's dropout on, where it trains."""

    def take_step(self, batches: Sequence[Batch], optimizer: Any, class_weights: Tensor | None, step: int) -> bool:
        """Take one optimizer step over the batches; return whether the weights were updated."""

    def read_losses(self) -> tuple[dict[str, float], int]:
        """Return the row-weighted sums of each loss since they were last read, and the rows."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the trainer."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint kept."""


class EpochLoop:
    """Epochs of steps with their schedule, validation, early stopping and checkpoints.

    Args:
        trainer: Takes the steps.
        loader: The training batches.
        validate: Scores the student after each epoch; the one of `--select_by` chooses the best.
        class_weights: (C,) weight of the positives in the hard loss, on the device.
        checkpoints: Where training goes on from, if anywhere.
        stop: Looked at after every step.
        name: Whose training it is, in log lines.
        watch: Is shown the history, a row per epoch, when training begins or goes on and after each epoch's checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        loader: BatchLoader,
        validate: Validate,
        class_weights: Tensor | None = None,
        checkpoints: CheckpointFolder | None = None,
        stop: StopRequest | None = None,
        name: str = "student",
        watch: Watch | None = None,
    ) -> None:
        self.name = name
        self.watch: Watch = watch or (lambda _history: None)
        self.trainer = trainer
        self.config = trainer.config
        self.loader = loader
        self.validate = validate
        self.class_weights = class_weights
        self.checkpoints = checkpoints
        self.stop = stop or StopRequest()
        self.optimizer = trainer.build_optimizer()
        self.total_steps = -(-len(loader) // self.config.gradient_accumulation) * self.config.epochs
        self.progress = Progress()
        self.best_state: dict[str, Tensor] = {}
        self.checks_every = 1 if trainer.device.type == "cpu" else STEPS_BETWEEN_CHECKS
        self.world = trainer.world
        # Asking the other processes makes the host wait, as reading the losses does; alone, asking costs nothing.
        self.asks_every = 1 if self.world.size == 1 else self.checks_every
        self.last_checkpoint_s = time.monotonic()

    def run(self) -> TrainingResult:
        """Train, and leave the best epoch's weights in the student.

        Raises:
            TrainingFault: a non-finite loss or gradient; the last checkpoint stays.
            Interrupted: `stop` was requested; a checkpoint has been written.
        """
        started = time.monotonic()
        self._resume()
        self.watch(self.progress.history)
        with PhaseProgress(f"{self.name} training", self.total_steps, "steps", done=self.progress.global_step) as steps:
            while not self._is_over():
                epoch_started = time.monotonic()
                self.stop.heeded = True
                self._train_epoch(steps)
                self.stop.heeded = False
                if any(self.world.any(self.stop.requested)):  # by a signal after the last step was looked at
                    self._save()
                    raise Interrupted
                self._finish_epoch(epoch_started)
        put_state(self.trainer.student, self.best_state)
        progress = self.progress
        if progress.best_epoch == progress.epoch:
            log.warning("warning: %s", self._describe_improving())
        return TrainingResult(
            progress.history, progress.best_epoch, progress.best_score, progress.skipped_steps, time.monotonic() - started
        )

    def _is_over(self) -> bool:
        """Return whether no epoch is left, or --early_stopping_patience of them brought nothing better."""
        epoch = self.progress.epoch
        return epoch >= self.config.epochs or epoch - self.progress.best_epoch >= self.config.early_stopping_patience

    def _train_epoch(self, steps: PhaseProgress) -> None:
        progress = self.progress
        self.trainer.set_training_mode()
        for batches in self._remaining_steps():
            self._set_learning_rate()
            self.world.seed_step(self.config.seed, progress.global_step)
            self.trainer.objective.progress = progress.global_step / max(1, self.total_steps - 1)
            updated = self.trainer.take_step(batches, self.optimizer, self.class_weights, progress.global_step + 1)
            progress.global_step += 1
            progress.batches_done += len(batches)
            progress.skipped_steps += not updated
            steps.advance()
            if progress.global_step % self.checks_every == 0:
                self._add_up_losses()
            stop, due = self._ask()
            if stop or due:
                self._add_up_losses()
                self._save()
            if stop:
                raise Interrupted
        self._add_up_losses()

    def _remaining_steps(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step that this epoch still has to take; the last step may have fewer."""
        batches = self.loader.iterate(self.progress.epoch, skip=self.progress.batches_done)
        while group := list(islice(batches, self.config.gradient_accumulation)):
            yield group

    def _set_learning_rate(self) -> None:
        # Steps that the scaler skipped do not advance the schedule.
        taken = self.progress.global_step - self.progress.skipped_steps
        rate = self.config.lr * schedule(taken, self.total_steps, self.config.warmup_ratio)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = rate

    def _add_up_losses(self) -> None:
        sums, rows = self.trainer.read_losses()
        for name, value in sums.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value
        self.progress.rows_summed += rows

    def _finish_epoch(self, started: float) -> None:
        """Validate, keep the best weights, write the history row and a checkpoint."""
        progress = self.progress
        try:
            with self.trainer.judged_weights():
                scores = self.validate(self.trainer.student)
        except KeyboardInterrupt:
            # A signal does not wait for a long validation, but the epoch's steps are not lost to it.
            self._save()
            raise
        progress.epoch += 1
        present = (*self.trainer.objective.components, "grad_norm")
        means = {name: progress.sums[name] / max(progress.rows_summed, 1) for name in present}
        progress.history.append(
            {"epoch": progress.epoch, "global_step": progress.global_step, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            | means
            | {"skipped_steps": progress.skipped_steps}
            | {f"val_{name}": value for name, value in scores.items()}
        )
        score = scores[self.config.select_by]
        if score > progress.best_score or not self.best_state:
            progress.best_score, progress.best_epoch = score, progress.epoch
            with self.trainer.judged_weights():
                self.best_state = copy_state(self.trainer.student)
        progress.sums, progress.rows_summed, progress.batches_done = {}, 0, 0
        log.info("%s", self._describe_epoch(means, score, time.monotonic() - started))
        self._save()
        self.watch(progress.history)

    def _describe_epoch(self, means: Mapping[str, float], score: float, seconds: float) -> str:
        """Return an epoch's line: its losses, its validation score and how long both took."""
        progress = self.progress
        shown = [name for name in self.trainer.objective.components if name not in NOT_IN_LINE]
        losses = [f"{name.replace('_', ' ')} {means[name]:.4g}" for name in shown]
        best = " (best)" if progress.best_epoch == progress.epoch else ""
        where = f"{self.name} epoch {progress.epoch} of {self.config.epochs}"
        shown_score = f"validation {METRIC_OF[self.config.select_by].short} {score:.4f}{best}"
        return f"{where}: {', '.join(losses)}, {shown_score}, {format_duration(seconds)}"

    def _ask(self) -> tuple[bool, bool]:
        """Return whether a stop is requested of any process, and whether a checkpoint is due; all get the same answer."""
        if self.progress.global_step % self.asks_every:
            return False, False
        stop, due = self.world.any(self.stop.requested, self._checkpoint_is_due())
        return stop, due

    def _describe_improving(self) -> str:
        """Say that validation had not stopped improving, so that the scores may be compared with care."""
        return (
            f"{self.name}: its best epoch is the last of {self.config.epochs}, so it was still improving; scores of models "
            f"that have not converged say little of each other. Raise {epoch_flag(self.name)}."
        )

    def _checkpoint_is_due(self) -> bool:
        return time.monotonic() - self.last_checkpoint_s > 60 * self.config.checkpoint_minutes

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        device, over = self.trainer.device, self._is_over()
        state: dict[str, Any] = {
            "best_state": self.best_state,
            "progress": vars(self.progress),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        if not over:  # after the last epoch nobody goes on, and trials of --search stay until their run ends
            state |= own_pieces(self.trainer.state_dict()) | {"optimizer": own_pieces(self.optimizer.state_dict())}
        self.checkpoints.save(state, self.progress.global_step, last=over)
        self.last_checkpoint_s = time.monotonic()

    def _resume(self) -> None:
        state = None if self.checkpoints is None else self.checkpoints.load()
        if state is None:
            return
        self.best_state = state["best_state"]
        self.progress = Progress(**state["progress"])
        if "optimizer" in state:
            self.trainer.load_state_dict(state)
            restore_optimizer(self.optimizer, state["optimizer"])
        elif not self._is_over():
            raise ValueError(
                f"{self.name}: its training ended after {self.progress.epoch} epochs and cannot go on; for more epochs, or more "
                "patience, train anew in another folder of checkpoints"
            )
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.trainer.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.trainer.device)
        log.info("%s: resuming at step %d of %d", self.name, self.progress.global_step, self.total_steps)


def schedule(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Return the share of the peak learning rate at a step from 0: linear up, then linear down to 0."""
    warmup = int(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))
