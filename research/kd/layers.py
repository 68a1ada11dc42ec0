"""What is compared of the models' layers, and pooling tokens to the words that two tokenizers share.

Shapes: B batch, L tokens, W words, P positions (tokens, or words when the tokenizers differ), H width.
A token's word is an index from 0 in its row, or -1 for a token of no shared word. Pooling is a batched
product in float32, under autocast too: half precision would round the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from research.kd.losses import attention_map_loss, hidden_state_loss, relation_distance
from research.models.classifiers import ModelShape
from research.models.mapping import attention_pairs, map_layers
from research_config import ExperimentConfig


@dataclass(frozen=True)
class LayerOutputs:
    """One model's outputs at the compared positions, by layer."""

    hidden: Mapping[int, Tensor] = field(default_factory=dict)  # (B, P, H)
    maps: Mapping[int, Tensor] = field(default_factory=dict)  # (B, P, P)
    relations: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict)  # 3 x (B, P, H)

    def map(self, states: Callable[[Tensor], Tensor], maps: Callable[[Tensor], Tensor] | None = None) -> LayerOutputs:
        """Apply a function to every state and relation, and to every map (the same one unless another is given)."""
        of_maps = states if maps is None else maps
        return LayerOutputs(
            {layer: states(tensor) for layer, tensor in self.hidden.items()},
            {layer: of_maps(tensor) for layer, tensor in self.maps.items()},
            {layer: tuple(map(states, parts)) for layer, parts in self.relations.items()},
        )


@dataclass(frozen=True)
class ComparedLayers:
    """The layers of one model that are compared: whose states, and whose maps or relations.

    Layer 0 is the embeddings, which have states and no map.
    """

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    relations: bool = False

    @property
    def request(self) -> dict[str, Any]:
        """What a `TextClassifier` is asked for beside its logits."""
        wanted = {"relation_layers" if self.relations else "attention_layers": self.attention} if self.attention else {}
        return {"output_hidden_states": bool(self.hidden), **wanted}

    def pick(self, outputs: Mapping[str, Any]) -> LayerOutputs:
        """Return what is compared of a model's answer to the request, by token."""
        return LayerOutputs(
            {layer: outputs["hidden_states"][layer] for layer in self.hidden},
            outputs.get("attention_maps", {}),
            outputs.get("relations", {}),
        )


class LayerComparison:
    """Which layers of teacher and student are compared, and the losses of comparing them.

    Raises:
        ValueError: the layer mapping names a layer that a model does not have, or only embeddings
            for a method that needs attention maps.
    """

    def __init__(self, config: ExperimentConfig, teacher: ModelShape, student: ModelShape) -> None:
        pairs = map_layers(config.layer_mapping, teacher.num_layers, student.num_layers)
        self.hidden_pairs = pairs if config.method.hidden else ()
        self.attention_pairs = attention_pairs(pairs) if config.method.attention else ()
        self.relations = config.attention_objective == "relation"
        # Both widths are multiples of their head counts, so the greatest common divisor splits both.
        self.relation_heads = math.gcd(teacher.num_heads, student.num_heads)
        self.hidden_objective = config.hidden_objective
        self.attention_objective = config.attention_objective

    @property
    def averaged_over(self) -> dict[str, str]:
        """What each loss is the mean over: a batch's positions, or its pairs of positions."""
        return {"hidden_loss": "positions", "attention_loss": "pairs" if self.attention_objective == "mse" else "positions"}

    @property
    def teacher(self) -> ComparedLayers:
        """What the comparison reads of the teacher."""
        return ComparedLayers(
            _distinct(teacher for teacher, _ in self.hidden_pairs),
            _distinct(teacher for teacher, _ in self.attention_pairs),
            self.relations,
        )

    @property
    def student(self) -> ComparedLayers:
        """What the comparison reads of the student."""
        return ComparedLayers(
            _distinct(student for _, student in self.hidden_pairs),
            _distinct(student for _, student in self.attention_pairs),
            self.relations,
        )

    def losses(
        self, teacher: LayerOutputs, student: LayerOutputs, mask: Tensor, projections: Mapping[str, nn.Module] | None
    ) -> dict[str, Tensor]:
        """Return the hidden and attention losses that the method asks for, over real positions (B, P)."""
        losses = {}
        if self.hidden_pairs:
            losses["hidden_loss"] = hidden_state_loss(
                self.hidden_pairs, teacher.hidden, student.hidden, mask, projections, self.hidden_objective
            )
        if self.attention_pairs and self.relations:
            distances = [
                relation_distance(teacher.relations[above], student.relations[below], mask, self.relation_heads)
                for above, below in self.attention_pairs
            ]
            losses["attention_loss"] = torch.stack(distances).mean()
        elif self.attention_pairs:
            losses["attention_loss"] = attention_map_loss(
                self.attention_pairs, teacher.maps, student.maps, mask, self.attention_objective
            )
        return losses


def _distinct(layers: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(layers)))


def compare_layers(config: ExperimentConfig, teacher: ModelShape, student: ModelShape) -> LayerComparison | None:
    """Return what `--kd_method` compares beside the logits, None when that is nothing."""
    return LayerComparison(config, teacher, student) if config.method.hidden or config.method.attention else None


def pool_outputs(outputs: LayerOutputs, words: Tensor, num_words: int) -> LayerOutputs:
    """Pool a model's token outputs to the words both tokenizers share; words is (B, L)."""
    membership = token_to_word(words, num_words)
    return outputs.map(lambda states: pool_states(states, membership), lambda tokens: pool_map(tokens, membership))


def align_outputs(
    outputs: LayerOutputs, attention_mask: Tensor, words: Tensor | None, num_words: int
) -> tuple[LayerOutputs, Tensor]:
    """Return a model's outputs at the compared positions and which of those are real, (B, P).

    Positions are the model's own tokens when `words` is None, else the words that its tokens (B, L) belong to.
    """
    if words is None:
        return outputs, attention_mask.bool()
    return pool_outputs(outputs, words, num_words), word_mask(words, num_words)


# Attention that a row leaves on shared words; under it the row counts as empty and its gradient stays finite.
LEAST_MASS = 1e-12


def token_to_word(words: Tensor, num_words: int) -> Tensor:
    """Return the 0/1 matrix (B, W, L) that says which tokens make up a word, from words (B, L)."""
    return (words.unsqueeze(1) == torch.arange(num_words, device=words.device).view(1, -1, 1)).float()


def word_mask(words: Tensor, num_words: int) -> Tensor:
    """Return (B, W), true where the row has that word; shared words are numbered without gaps."""
    return torch.arange(num_words, device=words.device) <= words.amax(dim=1, keepdim=True)


def pool_states(states: Tensor, membership: Tensor) -> Tensor:
    """Average each word's token states: (B, L, H) with (B, W, L) gives (B, W, H)."""
    with torch.autocast(states.device.type, enabled=False):
        return average_rows(membership) @ states.float()


def pool_map(attention_map: Tensor, membership: Tensor) -> Tensor:
    """Turn a token map (B, L, L) into a word map (B, W, W).

    A query word looks where its tokens look on average (mean over rows); what a word receives is
    what its tokens receive together (sum over columns). Mass on tokens of no shared word is left
    out and the rest scaled back, so each row of a real word still sums to 1.
    """
    with torch.autocast(attention_map.device.type, enabled=False):
        rows = average_rows(membership) @ attention_map.float()  # (B, W, L)
        pooled = rows @ membership.transpose(1, 2)  # (B, W, W)
    return pooled / pooled.sum(dim=-1, keepdim=True).clamp_min(LEAST_MASS)


def average_rows(membership: Tensor) -> Tensor:
    """Scale each word's row of (B, W, L) to sum to 1; rows of absent words stay 0."""
    return membership / membership.sum(dim=-1, keepdim=True).clamp_min(1.0)
