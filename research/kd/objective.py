"""What a training step minimises: the labels alone, or with them a teacher's logits and layers.

Shapes: B batch, C labels, P positions (tokens, or words when the tokenizers differ), H width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from research.components import LOSS_COMPONENTS
from research.distributed import ALONE, World
from research.kd.layers import ComparedLayers, LayerComparison, LayerOutputs, align_outputs, compare_layers
from research.kd.losses import MultiLabelDistillationLoss, hard_bce_loss, rank_loss, soft_loss_floor
from research.kd.targets import Targets
from research.models.classifiers import ModelShape
from research.models.mapping import pair_name
from research.text.batches import Batch, scale_to_share
from research_config import ExperimentConfig


class LabelObjective(nn.Module):
    """The cross entropy with the labels, for a student without a teacher."""

    student_layers = ComparedLayers()
    progress = 0.0  # as of DistillationObjective; it changes nothing here

    @property
    def components(self) -> tuple[str, ...]:
        """The names of what `forward` returns."""
        return _components_of({"labels"})

    def forward(
        self, logits: Tensor, layers: LayerOutputs, targets: Targets | None, batch: Batch, class_weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the loss components, `total_loss` with its gradient."""
        hard, known = hard_bce_loss(logits, batch["labels"], class_weights)
        hard_loss = scale_to_share(hard.sum() / known.sum().clamp_min(1.0), batch, "known")
        return {"total_loss": hard_loss, "hard_loss": hard_loss.detach()}


class DistillationObjective(nn.Module):
    """alpha * soft + (1 - alpha) * hard, and the weighted distances of layers and orders that are asked for.

    With `--undo_class_weights` every loss of the teacher's logits takes z - log w for z: the minimiser of the cross
    entropy whose positives weigh w is logit(p) + log(w), so that is the logit of a teacher trained without weights. The
    hard loss keeps them.

    Where hidden states are compared and the widths differ, a learned linear map per pair of layers carries
    the student's width to the teacher's; it is trained with the student and is no part of it.

    Args:
        teacher, student: Shapes of the models.
        label_names: Needed for `--label_alphas`, which go by name.
        world: The processes that share each batch.

    Attributes:
        progress: Share of the training's steps that are done, 0 at the first and 1 at the last; set before each step
            by whoever counts them, for `--anneal_labels`.
    """

    progress = 0.0

    def __init__(
        self,
        config: ExperimentConfig,
        teacher: ModelShape,
        student: ModelShape,
        label_names: Sequence[str] = (),
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self.world = world
        alphas = [config.label_alpha_map.get(label, config.kd_alpha) for label in label_names]
        self.criterion = MultiLabelDistillationLoss(
            alphas if config.label_alphas else config.kd_alpha, config.kd_temperature, t_squared=config.t_squared
        )
        self.comparison: LayerComparison | None = compare_layers(config, teacher, student)
        self.projections = nn.ModuleDict()
        if self.comparison is not None and teacher.hidden_size != student.hidden_size:
            for pair in self.comparison.hidden_pairs:
                self.projections[pair_name(*pair)] = nn.Linear(student.hidden_size, teacher.hidden_size)
        self.rank_objective = config.rank_objective
        self.anneal_labels, self.undo_class_weights = config.anneal_labels, config.undo_class_weights
        self.weights: dict[str, float] = {
            component.name: getattr(config, component.weight_flag)
            for component in LOSS_COMPONENTS
            if component.weight_flag is not None
        }

    @property
    def student_layers(self) -> ComparedLayers:
        """The student's layers that a step needs."""
        return ComparedLayers() if self.comparison is None else self.comparison.student

    def forward(
        self, logits: Tensor, layers: LayerOutputs, targets: Targets | None, batch: Batch, class_weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the loss components, `total_loss` with its gradient.

        Args:
            logits, layers: The student's answers, its layers by token.
            targets: The teacher's.
            class_weights: (C,) weight of the positives in the hard loss.
        """
        assert targets is not None, "the distillation losses need a teacher's answers"
        answers = targets.logits
        if self.undo_class_weights:
            assert class_weights is not None, "there are no class weights to undo"
            answers = answers - class_weights.log()
        label_share = self.progress if self.anneal_labels else 0.0
        shares = (batch["rows_share"], batch["known_share"]) if "rows_share" in batch else None
        losses = self.criterion(logits, answers, batch["labels"], class_weights, label_share, targets.taught, shares)
        floor = soft_loss_floor(answers, self.criterion.temperature, t_squared=self.criterion.t_squared)
        if targets.taught is not None:
            floor = floor * targets.taught
        components = {name: loss.detach() for name, loss in losses.items()}
        components["soft_excess"] = components["soft_loss"] - scale_to_share(floor.mean(), batch, "rows")
        total = losses["total_loss"]
        further = self._compare_layers(layers, targets.layers, batch)
        if self.weights["rank_loss"] > 0:
            further["rank_loss"] = self._compare_orders(logits, answers, batch)
        for name, loss in further.items():
            total = total + self.weights[name] * loss
            components[name] = loss.detach()
        return components | {"total_loss": total}

    @property
    def components(self) -> tuple[str, ...]:
        """The names of what `forward` returns."""
        known = {"labels", "logits"}
        if self.comparison is not None and self.comparison.hidden_pairs:
            known.add("hidden_states")
        if self.comparison is not None and self.comparison.attention_pairs:
            known.add("attentions")
        return _components_of(known, self.weights)

    def _compare_orders(self, logits: Tensor, answers: Tensor, batch: Batch) -> Tensor:
        """Return the rank loss, which relates all texts of a batch to each other, whichever process has them.

        Each of several processes takes the gradient of its own texts' logits, and an equal part of the value.
        """
        if "whole_rows" not in batch:
            return rank_loss(logits, answers, self.rank_objective)
        pairs = torch.cat([logits.float(), answers.float()], dim=1)
        student, teacher = self.world.gather_batch(pairs, len(batch["whole_rows"])).chunk(2, dim=1)
        loss = rank_loss(student, teacher, self.rank_objective)
        return loss - loss.detach() * (1.0 - 1.0 / self.world.size)

    def _compare_layers(self, student: LayerOutputs, teacher: LayerOutputs, batch: Batch) -> dict[str, Tensor]:
        if self.comparison is None:
            return {}
        words, num_words = batch.get("student_words"), int(batch.get("num_words", 0))
        student, mask = align_outputs(student, batch["attention_mask"], words, num_words)
        projections: Any = self.projections if len(self.projections) else None
        losses = self.comparison.losses(teacher, student, mask, projections)
        averaged_over = self.comparison.averaged_over
        return {name: scale_to_share(loss, batch, averaged_over[name]) for name, loss in losses.items()}


def _components_of(known: Collection[str], weights: Mapping[str, float] | None = None) -> tuple[str, ...]:
    return tuple(
        component.name
        for component in LOSS_COMPONENTS
        if component.needs in known and not (component.optional and not (weights or {}).get(component.name))
    )
