"""Distillation: the trainer that drives a student from a frozen teacher, and the teacher's verification.

Shapes: B batch, C labels, L tokens, P positions (tokens, or words when the tokenizers differ), H width.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from research_alignment import pool_map, pool_states, token_to_word, word_mask
from research_checkpoint import CheckpointFolder
from research_config import ExperimentConfig
from research_evaluation import DEFAULT_THRESHOLD, compute_metrics, evaluating
from research_faults import Interrupted, StopRequest, TrainingFault, describe_fault, naming_lack_of_memory
from research_losses import (
    MultiLabelDistillationLoss,
    attention_map_loss,
    attention_pairs,
    compute_attention_loss,
    compute_hidden_state_loss,
    hard_bce_loss,
    hidden_state_loss,
    map_layers,
    pair_name,
    relation_distance,
    soft_loss_floor,
)
from research_models import StudentModel, TeacherModel, TextClassifier
from research_tokens import Batch, BatchLoader

__all__ = [
    "DistillationTrainer",
    "MultiLabelDistillationLoss",
    "StudentModel",
    "TeacherModel",
    "compute_attention_loss",
    "compute_hidden_state_loss",
    "verify_teacher_performance",
]

log = logging.getLogger(__name__)

COMPONENTS = ("total_loss", "soft_loss", "soft_excess", "hard_loss", "hidden_loss", "attention_loss")
STEPS_BETWEEN_CHECKS = 50


@dataclass(frozen=True)
class ModelShape:
    """What is known of a model before it is loaded."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocabulary: int

    @classmethod
    def of(cls, model_config: Any) -> ModelShape:
        """Take the shape from a transformers configuration."""
        return cls(
            int(model_config.num_hidden_layers),
            int(model_config.hidden_size),
            int(model_config.num_attention_heads),
            int(model_config.vocab_size),
        )


@dataclass(frozen=True)
class LayerOutputs:
    """One model's outputs at the compared positions, by layer."""

    hidden: Mapping[int, Tensor] = field(default_factory=dict)  # (B, P, H)
    maps: Mapping[int, Tensor] = field(default_factory=dict)  # (B, P, P)
    relations: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict)  # 3 x (B, P, H)


class LayerComparison:
    """Which layers of teacher and student are compared, and how.

    Raises:
        ValueError: `--layer_mapping` names a layer that a model does not have, or only embeddings
            for a method that needs attention maps.
    """

    def __init__(self, config: ExperimentConfig, teacher: ModelShape, student: ModelShape) -> None:
        self.method = config.method
        self.pairs = map_layers(config.layer_mapping, teacher.num_layers, student.num_layers)
        self.attention_pairs = attention_pairs(self.pairs) if self.method.attention else ()
        self.relations = config.attention_objective == "relation"
        # Both widths are multiples of their head counts, so the greatest common divisor splits both.
        self.relation_heads = math.gcd(teacher.num_heads, student.num_heads)
        self.hidden_objective = config.hidden_objective
        self.attention_objective = config.attention_objective

    def layers(self, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the layers whose states, and whose maps, are needed; side 0 teacher, 1 student."""
        hidden = tuple(sorted({pair[side] for pair in self.pairs})) if self.method.hidden else ()
        return hidden, tuple(sorted({pair[side] for pair in self.attention_pairs}))

    def run(self, model: TextClassifier, side: int, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, LayerOutputs]:
        """Run a model and return its logits and what is compared of its layers, by token."""
        hidden_layers, attention_layers = self.layers(side)
        wanted = {"relation_layers" if self.relations else "attention_layers": attention_layers} if attention_layers else {}
        outputs = model(input_ids, attention_mask, output_hidden_states=bool(hidden_layers), **wanted)
        return outputs["logits"], LayerOutputs(
            {layer: outputs["hidden_states"][layer] for layer in hidden_layers},
            outputs.get("attention_maps", {}),
            outputs.get("relations", {}),
        )

    def losses(
        self, teacher: LayerOutputs, student: LayerOutputs, mask: Tensor, projections: Mapping[str, nn.Module] | None
    ) -> dict[str, Tensor]:
        """Return the hidden and attention losses that the method asks for, over real positions (B, P)."""
        losses = {}
        if self.method.hidden:
            losses["hidden_loss"] = hidden_state_loss(
                self.pairs, teacher.hidden, student.hidden, mask, projections, self.hidden_objective
            )
        if self.method.attention and self.relations:
            distances = [
                relation_distance(teacher.relations[above], student.relations[below], mask, self.relation_heads)
                for above, below in self.attention_pairs
            ]
            losses["attention_loss"] = torch.stack(distances).mean()
        elif self.method.attention:
            losses["attention_loss"] = attention_map_loss(
                self.attention_pairs, teacher.maps, student.maps, mask, self.attention_objective
            )
        return losses


def pool_outputs(outputs: LayerOutputs, words: Tensor, num_words: int) -> LayerOutputs:
    """Pool a model's token outputs to the words both tokenizers share; words is (B, L)."""
    membership = token_to_word(words, num_words)
    return LayerOutputs(
        {layer: pool_states(states, membership) for layer, states in outputs.hidden.items()},
        {layer: pool_map(attention_map, membership) for layer, attention_map in outputs.maps.items()},
        {layer: tuple(pool_states(part, membership) for part in parts) for layer, parts in outputs.relations.items()},
    )


def name_layer_outputs(outputs: LayerOutputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Name a teacher's layer outputs as batches carry them: the states (B, P, H), and the maps (B, P, P)."""
    states = {f"teacher_hidden.{layer}": tensor for layer, tensor in outputs.hidden.items()}
    for layer, parts in outputs.relations.items():
        states |= {f"teacher_relation.{layer}.{part}": tensor for part, tensor in enumerate(parts)}
    return states, {f"teacher_map.{layer}": tensor for layer, tensor in outputs.maps.items()}


def read_layer_outputs(batch: Batch) -> LayerOutputs | None:
    """Return the layer outputs that a batch carries, None when it carries none."""
    hidden, maps = {}, {}
    relations: dict[int, dict[int, Tensor]] = {}
    for name, tensor in batch.items():
        match name.split("."):
            case ["teacher_hidden", layer]:
                hidden[int(layer)] = tensor
            case ["teacher_map", layer]:
                maps[int(layer)] = tensor
            case ["teacher_relation", layer, part]:
                relations.setdefault(int(layer), {})[int(part)] = tensor
    if not (hidden or maps or relations):
        return None
    in_order = {layer: tuple(parts[part] for part in sorted(parts)) for layer, parts in relations.items()}
    return LayerOutputs(hidden, maps, in_order)


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
        return {name: float(losses[name]) for name in COMPONENTS if name in losses}

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
            row = torch.stack([components.get(name, norm.new_zeros(())) for name in COMPONENTS] + [norm])
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
        sums, rows_summed = dict.fromkeys((*COMPONENTS, "grad_norm"), 0.0), 0
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
                raise TrainingFault(describe_fault(step, (*COMPONENTS, "grad_norm"), values, bad, rows))

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


class _Fitting:
    """One call of `DistillationTrainer.fit`: the epoch loop, its schedule and its checkpoints."""

    def __init__(
        self,
        trainer: DistillationTrainer,
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
        return [name for name in (*COMPONENTS, "grad_norm") if name not in absent]

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


def freeze(model: nn.Module) -> Any:
    """Put a model in eval mode without gradients: nothing of it may change."""
    return model.eval().requires_grad_(False)


def choose_autocast_dtype(config: ExperimentConfig, device: torch.device) -> torch.dtype | None:
    """Return the precision of autocast; None for float32.

    float16 is for CUDA, where it is fast and a GradScaler guards it. A CPU runs float32 unless
    bfloat16, which needs no scaler, is asked for.
    """
    if not config.amp or (device.type != "cuda" and config.amp_dtype == "float16"):
        return None
    return torch.float16 if config.amp_dtype == "float16" else torch.bfloat16


def schedule(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Return the share of the peak learning rate at a step from 0: linear up, then linear down to 0."""
    warmup = int(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


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
