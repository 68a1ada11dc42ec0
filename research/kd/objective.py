"""What a training step minimises: the labels alone, or with them a teacher's logits and layers.

Shapes: B batch, C labels, P positions (tokens, or words when the tokenizers differ), H width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from research.components import LOSS_COMPONENTS
from research.kd.layers import ComparedLayers, LayerComparison, LayerOutputs, align_outputs, compare_layers
from research.kd.losses import MultiLabelDistillationLoss, hard_bce_loss, soft_loss_floor
from research.kd.targets import Targets
from research.models.classifiers import ModelShape
from research.models.mapping import pair_name
from research.text.batches import Batch, scale_to_share
from research_config import ExperimentConfig


class LabelObjective(nn.Module):
    """The cross entropy with the labels, for a student without a teacher."""

    student_layers = ComparedLayers()

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
    """alpha * soft + (1 - alpha) * hard, and the weighted distances of layers that `--kd_method` asks for.

    Where hidden states are compared and the widths differ, a learned linear map per pair of layers carries
    the student's width to the teacher's; it is trained with the student and is no part of it.

    Args:
        teacher, student: Shapes of the models.
        label_names: Needed for `--label_alphas`, which go by name.
    """

    def __init__(
        self, config: ExperimentConfig, teacher: ModelShape, student: ModelShape, label_names: Sequence[str] = ()
    ) -> None:
        super().__init__()
        alphas = [config.label_alpha_map.get(label, config.kd_alpha) for label in label_names]
        self.criterion = MultiLabelDistillationLoss(
            alphas if config.label_alphas else config.kd_alpha, config.kd_temperature, t_squared=config.t_squared
        )
        self.comparison: LayerComparison | None = compare_layers(config, teacher, student)
        self.projections = nn.ModuleDict()
        if self.comparison is not None and teacher.hidden_size != student.hidden_size:
            for pair in self.comparison.hidden_pairs:
                self.projections[pair_name(*pair)] = nn.Linear(student.hidden_size, teacher.hidden_size)
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
        shares = (batch["rows_share"], batch["known_share"]) if "rows_share" in batch else None
        losses = self.criterion(logits, targets.logits, batch["labels"], class_weights, shares)
        floor = soft_loss_floor(targets.logits, self.criterion.temperature, t_squared=self.criterion.t_squared).mean()
        floor = scale_to_share(floor, batch, "rows")
        components = {name: loss.detach() for name, loss in losses.items()}
        components["soft_excess"] = components["soft_loss"] - floor
        total = losses["total_loss"]
        for name, loss in self._compare_layers(layers, targets.layers, batch).items():
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
        return _components_of(known)

    def _compare_layers(self, student: LayerOutputs, teacher: LayerOutputs, batch: Batch) -> dict[str, Tensor]:
        if self.comparison is None:
            return {}
        words, num_words = batch.get("student_words"), int(batch.get("num_words", 0))
        student, mask = align_outputs(student, batch["attention_mask"], words, num_words)
        projections: Any = self.projections if len(self.projections) else None
        losses = self.comparison.losses(teacher, student, mask, projections)
        averaged_over = self.comparison.averaged_over
        return {name: scale_to_share(loss, batch, averaged_over[name]) for name, loss in losses.items()}


def _components_of(known: Collection[str]) -> tuple[str, ...]:
    return tuple(component.name for component in LOSS_COMPONENTS if component.needs in known)
