"""The epoch loop: schedule, validation, the best epoch, checkpoints and resuming."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from research.components import COMPONENT_NAMES
from research.errors import Interrupted, StopRequest, naming_lack_of_memory
from research.storage.checkpoints import CheckpointFolder
from research.text.batches import Batch, BatchLoader

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
    best_f1: float = -1.0


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves beside the student, which then holds its best epoch's weights."""

    history: list[dict[str, Any]]
    best_epoch: int
    best_f1: float
    skipped_steps: int
    seconds: float


Validate = Callable[[nn.Module], Mapping[str, float]]
OnStep = Callable[[int, int], None]


class _Fitting:
    """One call of `DistillationTrainer.fit`: the epoch loop, its schedule and its checkpoints."""

    def __init__(
        self,
        trainer: Any,
        loader: BatchLoader,
        validate: Validate,
        class_weights: Tensor | None,
        checkpoints: CheckpointFolder | None,
        stop: StopRequest | None,
        on_step: OnStep | None,
    ) -> None:
        self.trainer = trainer
        self.config = trainer.config
        self.loader = loader
        self.validate = validate
        self.class_weights = None if class_weights is None else class_weights.to(trainer.device)
        self.checkpoints = checkpoints
        self.stop = stop or StopRequest()
        self.on_step = on_step
        self.optimizer = trainer.build_optimizer()
        self.steps_per_epoch = -(-len(loader) // self.config.gradient_accumulation)
        self.total_steps = self.steps_per_epoch * self.config.epochs
        self.progress = Progress()
        self.best_state: dict[str, Tensor] = {}
        self.checks_every = 1 if trainer.device.type == "cpu" else STEPS_BETWEEN_CHECKS
        self.last_checkpoint_s = time.monotonic()

    def run(self) -> TrainingResult:
        started = time.monotonic()
        self._resume()
        patience = self.config.early_stopping_patience
        while self.progress.epoch < self.config.epochs and self.progress.epoch - self.progress.best_epoch < patience:
            self.stop.heeded = True
            self._train_epoch()
            self.stop.heeded = False
            self._finish_epoch()
        self.trainer.student.load_state_dict(self.best_state)
        progress = self.progress
        return TrainingResult(
            progress.history, progress.best_epoch, progress.best_f1, progress.skipped_steps, time.monotonic() - started
        )

    def _train_epoch(self) -> None:
        trainer, progress = self.trainer, self.progress
        trainer.student.train()
        if self.config.freeze_student_encoder:
            cast(nn.Module, trainer.student.encoder).eval()
        accumulation = self.config.gradient_accumulation
        group: list[Batch] = []
        remaining = len(self.loader) - progress.batches_done
        for batch in self.loader.iterate(progress.epoch, skip=progress.batches_done):
            group.append(batch)
            remaining -= 1
            if len(group) < accumulation and remaining:
                continue
            self._step(group)
            group = []
            if progress.global_step % self.checks_every == 0:
                self._collect()
            if self.stop.requested or self._checkpoint_is_due():
                self._collect()
                self._save()
            if self.stop.requested:
                raise Interrupted
        self._collect()

    def _step(self, group: list[Batch]) -> None:
        trainer, progress = self.trainer, self.progress
        # Steps that the scaler skipped do not advance the schedule.
        rate = self.config.lr * schedule(
            progress.global_step - progress.skipped_steps, self.total_steps, self.config.warmup_ratio
        )
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = rate
        with naming_lack_of_memory(progress.global_step + 1, group):
            losses = [trainer._backward(batch, self.class_weights, 1.0 / len(group)) for batch in group]
        progress.global_step += 1
        progress.batches_done += len(group)
        if not trainer._update(self.optimizer, group, losses, progress.global_step):
            progress.skipped_steps += 1
        if self.on_step is not None:
            self.on_step(progress.global_step, self.total_steps)

    def _collect(self) -> None:
        sums, rows = self.trainer.check_faults()
        for name, value in sums.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value
        self.progress.rows_summed += rows

    def _finish_epoch(self) -> None:
        """Validate, keep the best weights, write the history row and a checkpoint."""
        progress = self.progress
        try:
            scores = self.validate(self.trainer.student)
        except KeyboardInterrupt:
            # A signal does not wait for a long validation, but the epoch's steps are not lost to it.
            self._save()
            raise
        progress.epoch += 1
        present = self._present_components()
        means = {name: progress.sums[name] / max(progress.rows_summed, 1) for name in present}
        progress.history.append(
            {"epoch": progress.epoch, "global_step": progress.global_step, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            | means
            | {"skipped_steps": progress.skipped_steps}
            | {f"val_{name}": value for name, value in scores.items()}
        )
        if scores["f1_macro"] > progress.best_f1 or not self.best_state:
            progress.best_f1, progress.best_epoch = scores["f1_macro"], progress.epoch
            self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in self.trainer.student.state_dict().items()}
        progress.sums, progress.rows_summed, progress.batches_done = {}, 0, 0
        log.info(
            "epoch %d: loss %.4f, validation macro-F1 %.4f%s",
            progress.epoch,
            means["total_loss"],
            scores["f1_macro"],
            " (best)" if progress.best_epoch == progress.epoch else "",
        )
        self._save()

    def _present_components(self) -> list[str]:
        absent = set()
        if not self.trainer.distils:
            absent |= {"soft_loss", "soft_excess"}
        comparison = self.trainer.comparison
        if comparison is None or not comparison.method.hidden:
            absent.add("hidden_loss")
        if comparison is None or not comparison.method.attention:
            absent.add("attention_loss")
        return [name for name in (*COMPONENT_NAMES, "grad_norm") if name not in absent]

    def _checkpoint_is_due(self) -> bool:
        return time.monotonic() - self.last_checkpoint_s > 60 * self.config.checkpoint_minutes

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        trainer = self.trainer
        state = {
            "student": trainer.student.state_dict(),
            "projections": trainer.projections.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "best_state": self.best_state,
            "progress": vars(self.progress),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None,
        }
        self.checkpoints.save(state, self.progress.global_step)
        self.last_checkpoint_s = time.monotonic()

    def _resume(self) -> None:
        state = None if self.checkpoints is None else self.checkpoints.load()
        if state is None:
            return
        trainer = self.trainer
        trainer.student.load_state_dict(state["student"])
        trainer.projections.load_state_dict(state["projections"])
        self.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state["scaler"])
        self.best_state = state["best_state"]
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], trainer.device)
        log.info("resuming at step %d of %d", self.progress.global_step, self.total_steps)


def schedule(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Return the share of the peak learning rate at a step from 0: linear up, then linear down to 0."""
    warmup = int(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))
