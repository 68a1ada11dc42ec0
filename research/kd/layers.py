"""What is compared of the models' layers, and pooling tokens to the words that two tokenizers share.

Shapes: B batch, L tokens, W words, P positions (tokens, or words when the tokenizers differ), H width.
A token's word is an index from 0 in its row, or -1 for a token of no shared word. Pooling is a batched
product in float32, under autocast too: half precision would round the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from research.kd.losses import attention_map_loss, hidden_state_loss, relation_distance
from research.models.classifiers import ModelShape, TextClassifier
from research.models.mapping import attention_pairs, map_layers
from research.text.batches import Batch
from research_config import ExperimentConfig


@dataclass(frozen=True)
class LayerOutputs:
    """One model's outputs at the compared positions, by layer."""

    hidden: Mapping[int, Tensor] = field(default_factory=dict)  # (B, P, H)
    maps: Mapping[int, Tensor] = field(default_factory=dict)  # (B, P, P)
    relations: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict)  # 3 x (B, P, H)


class LayerComparison:
    """Which layers of teacher and student are compared, and how.

    Raises:
        ValueError: the layer mapping names a layer that a model does not have, or only embeddings
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
