"""Dropout from 16 random bits a value: on a CPU the bits and the mask cost a quarter of torch's own dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 1 << 16  # values of 16 random bits


class BitDropout(nn.Dropout):
    """`nn.Dropout` by `drop_values`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop values in training, none in evaluation."""
        return drop_values(input, self.p) if self.training else input


def drop_values(values: Tensor, p: float) -> Tensor:
    """Set each value to 0 with probability p and scale the others by 1 / (1 - p), as dropout in training does.

    On the CPU p is rounded to a multiple of 2**-16, and the scale is that of the rounded p, so the
    expectation is exact. Elsewhere, where torch's own kernel is fast, that one runs.
    """
    threshold = round(p * LEVELS)
    if threshold == 0:
        return values
    if values.device.type != "cpu" or threshold == LEVELS:
        return nn.functional.dropout(values, p)
    count = values.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(values.shape)
    kept = (bits >= threshold - LEVELS // 2).to(values.dtype)
    return values * kept.mul_(LEVELS / (LEVELS - threshold))


def replace_dropout(model: nn.Module, kind: type[nn.Dropout]) -> None:
    """Make every dropout of a model one of this kind, in the mode, training or not, that it was in."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, kind(child.p).train(child.training))
