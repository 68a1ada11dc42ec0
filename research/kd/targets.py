"""What the student learns from beside the labels: a teacher's logits and layers, read from the cache or run live.

Shapes: B batch, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from research.kd.layers import ComparedLayers, LayerOutputs, align_outputs
from research.kd.teacher import LayerStore, teacher_inputs
from research.models.classifiers import ModelShape, TextClassifier, freeze
from research.storage.arrays import release_pages
from research.text.batches import Batch, move_tensor


@dataclass(frozen=True)
class Targets:
    """The teacher's answers to one batch, without gradients: logits (B, C) and layers at the compared positions.

    `taught` (B, C) is 0 in the cells of which the teacher says nothing, 1 elsewhere; None where it speaks of all.
    """

    logits: Tensor
    layers: LayerOutputs = field(default_factory=LayerOutputs)
    taught: Tensor | None = None


class TeacherTargets(Protocol):
    """Whatever answers for a teacher."""

    shape: ModelShape

    def targets(self, batch: Batch) -> Targets:
        """Answer a batch that lies on the training's device; `index` and `row` say which rows it holds."""
        ...


class KeptTeacher:
    """A teacher whose answers were written down before training.

    Args:
        shape: The teacher's depth, width and heads.
        logits: (N, C) of the training rows, in the order of the loader's.
        layers: What is kept of its layers, None when no layer is compared.
        device: Where training runs.
        partial: Whether logits are nan in cells of which the teacher says nothing.
    """

    def __init__(
        self,
        shape: ModelShape,
        logits: NDArray[np.float32],
        layers: LayerStore | None = None,
        device: torch.device | str = "cpu",
        *,
        partial: bool = False,
    ) -> None:
        self.shape = shape
        self.logits = logits
        self.layers = layers
        self.device = torch.device(device)
        self.partial = partial

    def targets(self, batch: Batch) -> Targets:
        """Read what was kept of the batch's rows."""
        read = read_logits(self.logits, batch)
        if self.partial:
            taught = (~read.isnan()).float()
            return Targets(move_tensor(read.nan_to_num(0.0), self.device), taught=move_tensor(taught, self.device))
        logits = move_tensor(read, self.device)
        if self.layers is None:
            return Targets(logits)
        return Targets(logits, self.layers.read(batch["row"].numpy()).map(lambda tensor: move_tensor(tensor, self.device)))


class LiveTeacher:
    """A teacher that is run on every batch, in float32 and without gradients.

    Args:
        model: Frozen here and put on the device.
        device: Where training runs.
        layers: Which of its layers are compared, None when none is.
        logits: (N, C) of the training rows, in the order of the loader's, when they are known already: the very
            numbers that other runs read.
    """

    def __init__(
        self,
        model: TextClassifier,
        device: torch.device | str,
        layers: ComparedLayers | None = None,
        logits: NDArray[np.float32] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model: TextClassifier = freeze(model.to(self.device))
        self.shape = ModelShape.of(model.backbone_config)
        self.layers = layers or ComparedLayers()
        self.logits = logits

    # no_grad, not inference_mode: the losses keep teacher tensors for their backward pass.
    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """Run the teacher on the batch; logits that are known already are read instead."""
        input_ids, attention_mask = teacher_inputs(batch)
        answer = self.model(input_ids, attention_mask, **self.layers.request)
        outputs, _ = align_outputs(
            self.layers.pick(answer), attention_mask, batch.get("teacher_words"), int(batch.get("num_words", 0))
        )
        if self.logits is None:
            return Targets(answer["logits"], outputs)
        return Targets(move_tensor(read_logits(self.logits, batch), self.device), outputs)


def read_logits(logits: NDArray[np.float32], batch: Batch) -> Tensor:
    """Return the logits of a batch's rows, (B, C), and let go of what was read of a memory map."""
    read = torch.from_numpy(np.ascontiguousarray(logits[batch["index"].numpy()]))
    release_pages(logits)
    return read
