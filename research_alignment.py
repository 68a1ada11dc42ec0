"""Pool token states and attention maps to the words that two tokenizers share.

Shapes: B batch, L tokens, W words, H width. A token's word is an index from 0 in its row, or -1 for
a token of no shared word. Both models' tensors then have the same W positions in the same order.
Pooling is a batched product in float32, under autocast too: half precision would round the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
