"""Distillation: the trainer that drives a student from a frozen teacher, and the teacher's verification.

Shapes: B batch, C labels, L tokens, P positions (tokens, or words when the tokenizers differ), H width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from research.components import COMPONENT_NAMES
from research.errors import StopRequest, TrainingFault, describe_fault
from research.evaluation.metrics import DEFAULT_THRESHOLD, compute_metrics
from research.evaluation.predict import evaluating
from research.kd.layers import LayerComparison, LayerOutputs, pool_outputs, read_layer_outputs, word_mask
from research.kd.loop import OnStep, TrainingResult, Validate, _Fitting
from research.kd.losses import (
    MultiLabelDistillationLoss,
    compute_attention_loss,
    compute_hidden_state_loss,
    hard_bce_loss,
    soft_loss_floor,
)
from research.models.classifiers import ModelShape, StudentModel, TeacherModel, TextClassifier, freeze
from research.models.mapping import pair_name
from research.storage.checkpoints import CheckpointFolder
from research.text.batches import Batch, BatchLoader
from research_config import ExperimentConfig

log = logging.getLogger(__name__)
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
    """Trains a student on labels and, in `kd_only`, toward a frozen teacher.

    Args:
        teacher: Run live for what the batches do not carry; None when they carry all of it, or when
            the student learns from the labels alone (any other pipeline).
        student: Trained in place.
        config: Its distillation and training fields are used.
        device: Where to train.
        teacher_shape: Needed for hidden and attention losses without a live teacher.
        label_names: Needed for `--label_alphas`, which go by name.
    """

    def __init__(
        self,
        teacher: TextClassifier | None,
        student: TextClassifier,
        config: ExperimentConfig,
        device: torch.device | str,
        *,
        teacher_shape: ModelShape | None = None,
        label_names: Iterable[str] = (),
    ) -> None:
        self.device = torch.device(device)
        self.config = config
        self.distils = config.pipeline == "kd_only"
        self.student = student.to(self.device)
        self.teacher: TextClassifier | None = None
        if teacher is not None:
            self.attach_teacher(teacher)
        alphas = [config.label_alpha_map.get(label, config.kd_alpha) for label in label_names]
        self.criterion = MultiLabelDistillationLoss(
            alphas if config.label_alphas else config.kd_alpha, config.kd_temperature, t_squared=config.t_squared
        ).to(self.device)
        self.comparison: LayerComparison | None = None
        self.projections = nn.ModuleDict()
        if self.distils and (config.method.hidden or config.method.attention):
            shape = ModelShape.of(teacher.backbone_config) if teacher_shape is None and teacher is not None else teacher_shape
            assert shape is not None, "hidden and attention losses need the teacher's shape"
            self.comparison = LayerComparison(config, shape, ModelShape.of(student.backbone_config))
            self.projections = self._build_projections(shape)
        if config.freeze_student_encoder:
            cast(nn.Module, student.encoder).requires_grad_(False)
        self.parameters = [
            parameter
            for module in (self.student, self.projections)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        self.autocast_dtype = choose_autocast_dtype(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)
        self._fault_flag = torch.zeros((), device=self.device)
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []

    def attach_teacher(self, teacher: TextClassifier) -> None:
        """Run this teacher live for what the batches do not carry."""
        self.teacher = freeze(teacher.to(self.device))

    def _build_projections(self, teacher: ModelShape) -> nn.ModuleDict:
        """Build the learned maps from the student's width to the teacher's, one per mapped pair."""
        assert self.comparison is not None
        width = self.student.hidden_size
        if not self.comparison.method.hidden or width == teacher.hidden_size:
            return nn.ModuleDict()
        names = [pair_name(*pair) for pair in self.comparison.pairs]
        return nn.ModuleDict({name: nn.Linear(width, teacher.hidden_size) for name in names}).to(self.device)

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
        self.student.train()
        optimizer.zero_grad(set_to_none=True)
        weights = None if class_weights is None else class_weights.to(self.device)
        losses = self._backward(batch, weights, 1.0)
        self._update(optimizer, [batch], [losses], step=1)
        self.check_faults()
        return {name: float(losses[name]) for name in COMPONENT_NAMES if name in losses}

    def compute_losses(self, batch: Batch, class_weights: Tensor | None) -> dict[str, Tensor]:
        """Return every loss component of a batch on the device, `total_loss` with its gradient."""
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            logits, student = self._run_student(batch)
        if not self.distils:
            hard, known = hard_bce_loss(logits, batch["labels"], class_weights)
            hard_loss = hard.sum() / known.sum().clamp_min(1.0)
            return {"total_loss": hard_loss, "hard_loss": hard_loss.detach()}
        teacher_logits, teacher = self._teacher_targets(batch)
        losses = self.criterion(logits, teacher_logits, batch["labels"], class_weights)
        floor = soft_loss_floor(teacher_logits, self.criterion.temperature, t_squared=self.criterion.t_squared).mean()
        result = {name: loss.detach() for name, loss in losses.items()} | {"soft_excess": losses["soft_loss"].detach() - floor}
        total = losses["total_loss"]
        if self.comparison is not None:
            extra = self._compare_layers(batch, teacher, student)
            weights = {"hidden_loss": self.config.hidden_loss_weight, "attention_loss": self.config.attention_loss_weight}
            for name, loss in extra.items():
                total = total + weights[name] * loss
                result[name] = loss.detach()
        return result | {"total_loss": total}

    def _run_student(self, batch: Batch) -> tuple[Tensor, LayerOutputs]:
        if self.comparison is None:
            return self.student(batch["input_ids"], batch["attention_mask"])["logits"], LayerOutputs()
        return self.comparison.run(self.student, 1, batch["input_ids"], batch["attention_mask"])

    def _teacher_targets(self, batch: Batch) -> tuple[Tensor, LayerOutputs]:
        """Return the teacher's logits and layer outputs: from the batch, or from the live teacher in float32."""
        kept = read_layer_outputs(batch)
        if "teacher_logits" in batch and (self.comparison is None or kept is not None):
            return batch["teacher_logits"], kept or LayerOutputs()
        assert self.teacher is not None, "the batch carries no teacher outputs and there is no live teacher"
        input_ids = batch.get("teacher_input_ids", batch["input_ids"])
        attention_mask = batch.get("teacher_attention_mask", batch["attention_mask"])
        # no_grad, not inference_mode: the losses keep teacher tensors for their backward pass.
        with torch.no_grad():
            if self.comparison is None:
                return self.teacher(input_ids, attention_mask)["logits"], LayerOutputs()
            logits, outputs = self.comparison.run(self.teacher, 0, input_ids, attention_mask)
            if "teacher_words" in batch:
                outputs = pool_outputs(outputs, batch["teacher_words"], int(batch["num_words"]))
        return batch.get("teacher_logits", logits), outputs

    def _compare_layers(self, batch: Batch, teacher: LayerOutputs, student: LayerOutputs) -> dict[str, Tensor]:
        assert self.comparison is not None
        mask = batch["attention_mask"].bool()
        if "student_words" in batch:
            num_words = int(batch["num_words"])
            mask = word_mask(batch["student_words"], num_words)
            student = pool_outputs(student, batch["student_words"], num_words)
        projections = self.projections if len(self.projections) else None
        return self.comparison.losses(teacher, student, mask, projections)  # type: ignore[arg-type]

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type != "cuda":
            return batch
        return {
            name: tensor if tensor.dim() == 0 else tensor.pin_memory().to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def _backward(self, batch: Batch, class_weights: Tensor | None, share: float) -> dict[str, Tensor]:
        """Add a batch's gradient, weighed by its share of the optimizer step."""
        losses = self.compute_losses(self._to_device(batch), class_weights)
        self.scaler.scale(losses["total_loss"] * share).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _update(self, optimizer: Any, batches: list[Batch], losses: list[dict[str, Tensor]], step: int) -> bool:
        """Clip and step; return whether the weights were updated.

        A non-finite loss or gradient raises a flag on the device that makes the fused optimizer leave
        the weights alone from then on, so the host need not wait for every step to see it:
        `check_faults` reads the flag later and the weights are still those of the last good step.
        """
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip_norm)
        for batch, components in zip(batches, losses, strict=True):
            row = torch.stack([components.get(name, norm.new_zeros(())) for name in COMPONENT_NAMES] + [norm])
            self._unchecked.append((step, row, batch.get("row", batch.get("index", torch.empty(0)))))
            # An overflow of scaled gradients is the scaler's business; a non-finite loss never is.
            judged = row[:-1] if self.scaler.is_enabled() else row
            self._fault_flag = torch.maximum(self._fault_flag, 1.0 - torch.isfinite(judged).all().float())
        if not self.scaler.is_enabled():
            if optimizer.defaults.get("fused"):
                optimizer.found_inf = self._fault_flag
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

    def check_faults(self) -> tuple[dict[str, float], int]:
        """Read the components of the steps since the last check: their row-weighted sums, and the rows.

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
            # An overflow of scaled gradients is the scaler's business.
            bad[-1] &= not self.scaler.is_enabled()
            if bad.any():
                raise TrainingFault(describe_fault(step, (*COMPONENT_NAMES, "grad_norm"), values, bad, rows))

    def fit(
        self,
        loader: BatchLoader,
        validate: Validate,
        class_weights: Tensor | None = None,
        *,
        checkpoints: CheckpointFolder | None = None,
        stop: StopRequest | None = None,
        on_step: OnStep | None = None,
    ) -> TrainingResult:
        """Train until the last epoch or until validation stops improving, resuming from a checkpoint.

        The student ends with the weights of its best epoch by `f1_macro` of `validate`.

        Raises:
            TrainingFault: a non-finite loss or gradient; the last checkpoint stays.
            Interrupted: `stop` was requested; a checkpoint has been written.
        """
        return _Fitting(self, loader, validate, class_weights, checkpoints, stop, on_step).run()


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
    strong_enough, scores = judge_teacher(torch.cat(labels).numpy(), probs, min_f1)
    if not strong_enough:
        log.warning("the teacher is too weak to distil: validation macro-F1 %.4f is under %g", scores["f1"], min_f1)
    return strong_enough, scores


def judge_teacher(labels: Any, probs: Any, min_f1: float) -> tuple[bool, dict[str, float]]:
    """Return whether macro-F1 at 0.5 reaches `min_f1`, and that F1; labels and probs are (N, C)."""
    label_names = [str(column) for column in range(labels.shape[1])]
    f1 = compute_metrics(labels, probs, DEFAULT_THRESHOLD, label_names)["f1_macro"]
    return f1 >= min_f1, {"f1": f1}
