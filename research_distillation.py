"""Distillation: the trainer that drives a student from a frozen teacher, and the teacher's verification.

Shapes: B batch, C labels, L tokens, P positions (tokens, or words when the tokenizers differ), H width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from research.components import COMPONENT_NAMES
from research.distributed import ALONE, World
from research.errors import StopRequest, TrainingFault, describe_fault, naming_lack_of_memory
from research.evaluation.metrics import compute_metrics
from research.evaluation.predict import evaluating
from research.evaluation.thresholds import DEFAULT_THRESHOLD
from research.kd.averaging import AveragedWeights
from research.kd.loop import EpochLoop, TrainingResult, Validate, Watch
from research.kd.losses import MultiLabelDistillationLoss, compute_attention_loss, compute_hidden_state_loss
from research.kd.objective import DistillationObjective, LabelObjective
from research.kd.targets import LiveTeacher, TeacherTargets
from research.models.classifiers import ModelShape, StudentModel, TeacherModel, TextClassifier
from research.sharding import make_whole, put_state
from research.storage.checkpoints import CheckpointFolder
from research.text.batches import Batch, BatchLoader, move_batch
from research_config import ExperimentConfig

log = logging.getLogger(__name__)
CLIP_EPSILON = 1e-6  # clip_grad_norm_'s
__all__ = [
    "DistillationTrainer",
    "MultiLabelDistillationLoss",
    "StudentModel",
    "TeacherModel",
    "compute_attention_loss",
    "compute_hidden_state_loss",
    "verify_teacher_performance",
]


class DistillationTrainer:
    """Trains a student on labels and, when there is a teacher, toward that teacher.

    Args:
        teacher: A model, which is frozen and run on every batch; or what answers for one, as `KeptTeacher`;
            or None when the student learns from the labels alone, whatever the distillation flags say.
        student: Trained in place.
        config: Its distillation and training fields are used.
        device: Where to train.
        label_names: Needed for `--label_alphas`, which go by name.
        world: The processes that train the student together; its loader deals out the batches' rows to them.
    """

    def __init__(
        self,
        teacher: TextClassifier | TeacherTargets | None,
        student: TextClassifier,
        config: ExperimentConfig,
        device: torch.device | str,
        *,
        label_names: Sequence[str] = (),
        world: World = ALONE,
    ) -> None:
        self.world = world
        self.device = torch.device(device)
        self.config = config
        self.student = student.to(self.device)
        self.teacher: TeacherTargets | None = None
        self.objective: LabelObjective | DistillationObjective = LabelObjective()
        if teacher is not None:
            shape = ModelShape.of(teacher.backbone_config) if isinstance(teacher, TextClassifier) else teacher.shape
            objective = DistillationObjective(config, shape, ModelShape.of(student.backbone_config), label_names, world)
            if isinstance(teacher, TextClassifier):
                comparison = objective.comparison
                teacher = LiveTeacher(teacher, self.device, None if comparison is None else comparison.teacher)
            self.teacher, self.objective = teacher, objective.to(self.device)
        if config.freeze_student_encoder:
            student.freeze_encoder()
        self.parameters = [
            parameter for module in (self.student, self.objective) for parameter in module.parameters() if parameter.requires_grad
        ]
        self.replica = world.replicate(Trained(self.student, self.objective))
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        self.average = AveragedWeights(trained, config.ema_decay) if config.ema_decay else None
        self.autocast_dtype = choose_autocast_dtype(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)
        self._fault_flag = torch.zeros((), device=self.device)
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []

    def build_optimizer(self) -> torch.optim.AdamW:
        """Build AdamW over the student and the projections; biases and norms are not decayed."""
        decayed = [parameter for parameter in self.parameters if parameter.dim() > 1]
        free = [parameter for parameter in self.parameters if parameter.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": free, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.config.lr, fused=self.device.type in ("cpu", "cuda"))

    def train_step(self, batch: Batch, optimizer: torch.optim.Optimizer, class_weights: Tensor | None = None) -> dict[str, float]:
        """Take one optimizer step on one batch and return its loss components.

        Args:
            batch: `input_ids`, `attention_mask` (B, L) and `labels` (B, C), and what `BatchLoader`
                adds for a teacher with another tokenizer.
            class_weights: (C,) weight of the positives in the hard loss.

        Raises:
            TrainingFault: the loss or the gradient is not finite; the student is left as it was.
        """
        self.set_training_mode()
        optimizer.zero_grad(set_to_none=True)
        weights = None if class_weights is None else class_weights.to(self.device)
        self.take_step([batch], optimizer, weights, step=1)
        _, row, _ = self._unchecked[-1]
        self.read_losses()
        found = dict(zip(COMPONENT_NAMES, row.tolist(), strict=False))
        return {name: found[name] for name in self.objective.components}

    def set_training_mode(self) -> None:
        """Turn the student's dropout on, but for an encoder that stays frozen."""
        self.student.train()
        if self.config.freeze_student_encoder:
            cast(nn.Module, self.student.encoder).eval()

    def take_step(self, batches: Sequence[Batch], optimizer: Any, class_weights: Tensor | None, step: int) -> bool:
        """Sum up the gradients of some batches, equally weighted, and step; return whether the weights were updated.

        The losses stay on the device until `read_losses`, so a step waits for nothing.

        Raises:
            TrainingFault: memory ran out.
        """
        losses = []
        with naming_lack_of_memory(step, batches):
            for batch in batches:
                with self.world.accumulate(self.replica, last=batch is batches[-1]):
                    components = self.replica(self.compute_losses, move_batch(batch, self.device), class_weights)
                    # The processes' gradients are averaged, and their losses are summands.
                    self.scaler.scale(components["total_loss"] * (self.world.size / len(batches))).backward()
                losses.append({name: loss.detach() for name, loss in components.items()})
        updated = self._update(optimizer, batches, losses, step)
        if updated and self.average is not None:
            self.average.update()
        return updated

    def judged_weights(self) -> AbstractContextManager[None]:
        """Let the student hold the weights that are validated and saved: their average with `--ema_decay`, else its own."""
        return nullcontext() if self.average is None else self.average.in_place()

    def compute_losses(self, batch: Batch, class_weights: Tensor | None) -> dict[str, Tensor]:
        """Return every loss component of a batch on the device, `total_loss` with its gradient."""
        wanted = self.objective.student_layers
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            outputs = self.student(batch["input_ids"], batch["attention_mask"], **wanted.request)
        targets = None if self.teacher is None else self.teacher.targets(batch)
        return self.objective(outputs["logits"], wanted.pick(outputs), targets, batch, class_weights)

    def _update(self, optimizer: Any, batches: Sequence[Batch], losses: Sequence[Mapping[str, Tensor]], step: int) -> bool:
        """Clip and step; return whether the weights were updated.

        A non-finite loss or gradient raises a flag on the device that makes the fused optimizer leave
        the weights alone from then on, so the host need not wait for every step to see it:
        `read_losses` reads the flag later and the weights are still those of the last good step.
        """
        self.scaler.unscale_(optimizer)
        fused = not self.scaler.is_enabled() and optimizer.defaults.get("fused", False)
        norm = self._find_norm() if fused else nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip_norm)
        norm = make_whole(norm)
        for batch, components in zip(batches, losses, strict=True):
            row = torch.stack([components.get(name, norm.new_zeros(())) for name in COMPONENT_NAMES] + [norm])
            self.world.add_up(row[:-1])  # so that every process sees the whole batch's losses, and acts on the same
            self._unchecked.append((step, row, batch.get("whole_rows", batch.get("row", batch.get("index", torch.empty(0))))))
            # Scaled gradients may overflow: the scaler then skips the step. A loss never may.
            judged = row[:-1] if self.scaler.is_enabled() else row
            self._fault_flag = torch.maximum(self._fault_flag, 1.0 - torch.isfinite(judged).all().float())
        if not self.scaler.is_enabled():
            if fused:
                optimizer.found_inf = self._fault_flag
                # It divides by this in the pass in which it reads the gradients anyway: clip_grad_norm_ takes one more.
                optimizer.grad_scale = ((norm + CLIP_EPSILON) / self.config.gradient_clip_norm).clamp(min=1.0)
            else:
                # Other optimizers know no such flag, so the host looks at it before the step.
                self._raise_fault()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return self.scaler.get_scale() >= scale

    def _find_norm(self) -> Tensor:
        """Return the norm of all gradients together."""
        return nn.utils.get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def read_losses(self) -> tuple[dict[str, float], int]:
        """Read the components of the steps since the last call: their row-weighted sums, and the rows.

        Raises:
            TrainingFault: one of those steps had a non-finite loss or gradient.
        """
        self._raise_fault()
        sums, rows_summed = dict.fromkeys((*COMPONENT_NAMES, "grad_norm"), 0.0), 0
        if not self._unchecked:
            return sums, rows_summed
        values = torch.stack([row for _, row, _ in self._unchecked]).double().cpu().numpy()
        for (_, _, rows), row in zip(self._unchecked, values, strict=True):
            count = max(len(rows), 1)
            rows_summed += count
            for name, value in zip(sums, row, strict=True):
                # An infinite norm is a step that the scaler skipped; it would hide every other norm.
                sums[name] += float(value) * count if math.isfinite(value) else 0.0
        self._unchecked.clear()
        return sums, rows_summed

    def _raise_fault(self) -> None:
        """Name the first bad step since the last check, if there is one, and start afresh after it."""
        if not self._fault_flag.item():
            return
        steps, self._unchecked, self._fault_flag = self._unchecked, [], torch.zeros_like(self._fault_flag)
        for step, row, rows in steps:
            values = row.double().cpu().numpy()
            bad = ~np.isfinite(values)
            bad[-1] &= not self.scaler.is_enabled()
            if bad.any():
                raise TrainingFault(describe_fault(step, (*COMPONENT_NAMES, "grad_norm"), values, bad, rows))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the trainer: the student, the projections, the scaler and the average."""
        state = {
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return state if self.average is None else state | {"average": self.average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a checkpoint's state back."""
        put_state(self.student, state["student"])
        self.objective.load_state_dict(state["objective"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def fit(
        self,
        loader: BatchLoader,
        validate: Validate,
        class_weights: Tensor | None = None,
        *,
        checkpoints: CheckpointFolder | None = None,
        stop: StopRequest | None = None,
        name: str = "student",
        watch: Watch | None = None,
    ) -> TrainingResult:
        """Train until the last epoch or until validation stops improving, resuming from a checkpoint.

        The student ends with the weights of its best epoch by that score of `validate` which `--select_by` names, with
        `--ema_decay` with their average. `watch` is shown the history after each epoch.

        Raises:
            TrainingFault: a non-finite loss or gradient; the last checkpoint stays.
            Interrupted: `stop` was requested; a checkpoint has been written.
        """
        weights = None if class_weights is None else class_weights.to(self.device)
        return EpochLoop(self, loader, validate, weights, checkpoints, stop, name, watch).run()


class Trained(nn.Module):
    """Everything that is trained as one module, since that is what can be replicated."""

    def __init__(self, student: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, compute: Callable[..., dict[str, Tensor]], *inputs: Any) -> dict[str, Tensor]:
        """Compute losses with these modules; a replica sees here that a backward pass is to come."""
        return compute(*inputs)


def choose_autocast_dtype(config: ExperimentConfig, device: torch.device) -> torch.dtype | None:
    """Return the precision of autocast; None for float32.

    float16 is for CUDA, where it is fast and a GradScaler guards it. A CPU runs float32 unless
    bfloat16, which needs no scaler, is asked for.
    """
    if not config.amp or (device.type != "cuda" and config.amp_dtype == "float16"):
        return None
    return torch.float16 if config.amp_dtype == "float16" else torch.bfloat16


def verify_teacher_performance(
    teacher: TextClassifier, val_loader: Iterable[Batch], device: torch.device | str, min_f1: float = 0.4
) -> tuple[bool, dict[str, float]]:
    """Say whether a teacher is worth distilling: its macro-F1 at 0.5 on validation against `min_f1`.

    Args:
        val_loader: Batches with `input_ids`, `attention_mask` and `labels`, NaN where unknown; the
            teacher's own ids as `teacher_input_ids`, `teacher_attention_mask` when they differ.
    """
    device = torch.device(device)
    teacher.to(device)
    labels, logits = [], []
    with torch.inference_mode(), evaluating(teacher):
        for batch in val_loader:
            input_ids = batch.get("teacher_input_ids", batch["input_ids"]).to(device)
            attention_mask = batch.get("teacher_attention_mask", batch["attention_mask"]).to(device)
            logits.append(teacher(input_ids, attention_mask)["logits"].float())
            labels.append(batch["labels"])
    probs = torch.sigmoid(torch.cat(logits)).cpu().numpy()
    strong_enough, scores = score_teacher(torch.cat(labels).numpy(), probs, min_f1)
    if not strong_enough:
        log.warning("the teacher is too weak to distil: validation macro-F1 %.4f is under %g", scores["f1"], min_f1)
    return strong_enough, scores


def score_teacher(labels: Any, probs: Any, min_f1: float) -> tuple[bool, dict[str, float]]:
    """Return whether macro-F1 at 0.5 reaches `min_f1`, and that F1; labels and probs are (N, C)."""
    label_names = [str(column) for column in range(labels.shape[1])]
    f1 = compute_metrics(labels, probs, DEFAULT_THRESHOLD, label_names)["f1_macro"]
    return f1 >= min_f1, {"f1": f1}
