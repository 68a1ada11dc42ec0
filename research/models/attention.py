"""Attention maps and queries, keys, values of chosen layers, taken while an encoder runs.

Fused attention kernels return no probabilities, and running every layer without them, only to read a
few, is slow. Here the encoder keeps its fused kernel; a layer somebody asked for computes its
probabilities in the open, from the very queries and keys the model made.

Shapes: B batch, A heads, L tokens, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from research.models.dropout import drop_values

RECORDED_SDPA = "recorded_sdpa"
Relations = tuple[Tensor, Tensor, Tensor]


class AttentionRecorder:
    """Collects from some layers of one forward pass.

    Args:
        layers: Layers to collect, counted from 1 in the order in which they run.
        keep: "heads" for maps (B, A, L, L), "mean" for head-averaged maps (B, L, L), both in float32,
            "relation" for queries, keys and values, (B, L, A * D) each.
    """

    def __init__(self, layers: Collection[int], keep: str) -> None:
        assert keep in ("heads", "mean", "relation")
        self.layers = frozenset(layers)
        self.keep = keep
        self.layers_run = 0
        self.maps: dict[int, Tensor] = {}
        self.relations: dict[int, Relations] = {}

    def begin_layer(self) -> str | None:
        """Count the layer that runs now, and return what is wanted of it."""
        self.layers_run += 1
        return self.keep if self.layers_run in self.layers else None

    def take_relations(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep the running layer's queries, keys and values: (B, A, L, D) each, kept as (B, L, A * D)."""
        # Grouped keys and values are repeated for each query head, so all three have the same width.
        parts = [part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (query, key, value)]
        query_states, key_states, value_states = (part.transpose(1, 2).flatten(2) for part in parts)
        self.relations[self.layers_run] = (query_states, key_states, value_states)

    def take_map(self, probs: Tensor) -> None:
        """Keep the running layer's map, (B, A, L, L)."""
        self.maps[self.layers_run] = probs if self.keep == "heads" else probs.mean(dim=1)


_active_recorder: ContextVar[AttentionRecorder | None] = ContextVar("active_recorder", default=None)


@contextmanager
def record_attention(layers: Collection[int], keep: str) -> Iterator[AttentionRecorder]:
    """Collect from `layers` of the encoder that runs inside this block."""
    recorder = AttentionRecorder(layers, keep)
    token = _active_recorder.set(recorder)
    try:
        yield recorder
    finally:
        _active_recorder.reset(token)


def recorded_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run the fused kernel, and keep what the active recorder wants of this layer.

    A CPU has no fused kernel with dropout, so there attention in training is computed in the open here too.
    Query, key and value are (B, A, L, D); the attention mask is boolean (true: attend) or additive.
    """
    recorder = _active_recorder.get() or AttentionRecorder((), "mean")
    wanted = recorder.begin_layer()
    if wanted == "relation":
        recorder.take_relations(query, key, value)
    wants_map = wanted in ("heads", "mean")
    has_kernel = dropout == 0 or query.device.type != "cpu"
    if has_kernel and not wants_map:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if attention_mask is None and looks_back_only(module, kwargs.get("is_causal")):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    probs = attention_probs(query, key, attention_mask, scaling, kwargs.get("position_bias"))
    if wants_map:
        # Before dropout: a map with holes is no distribution, and no teacher has one.
        recorder.take_map(probs)
    # As in the fused kernel, `dropout` alone decides, which models set to 0 outside training.
    probs = drop_values(probs.to(value.dtype), dropout)
    groups = query.shape[1] // value.shape[1]
    output = probs @ value.repeat_interleave(groups, dim=1)
    return output.transpose(1, 2).contiguous(), None


def looks_back_only(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether the fused kernel would mask later keys by itself; decided as transformers does."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def attention_probs(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float | None, position_bias: Tensor | None
) -> Tensor:
    """Return softmax(Q K^T * scaling + bias) over the keys that the mask allows, (B, A, L, L) in float32."""
    groups = query.shape[1] // key.shape[1]
    scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    # Scaled before the product: in float16 the product alone can overflow.
    scores = (query * scaling) @ key.repeat_interleave(groups, dim=1).transpose(-1, -2)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return scores.softmax(dim=-1, dtype=torch.float32)


AttentionInterface.register(RECORDED_SDPA, recorded_sdpa)
AttentionMaskInterface.register(RECORDED_SDPA, sdpa_mask)
