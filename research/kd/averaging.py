"""An exponential moving average of the weights over the steps of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AveragedWeights:
    """The bias-corrected exponential moving average of some parameters, one copy of them.

    After t steps it is the sum over k = 1 ... t of (1 - d) d^(t - k) w_k, divided by 1 - d^t, with d the decay and w_k
    the weights after step k: the weights add up to 1 from the first step, as in Adam's estimates (Kingma and Ba 2015,
    section 3), so no warm-up is needed and nothing of the start's weights stays. `torch.optim.swa_utils` has no such
    correction, and reads its count of steps from the device at every step.

    Args:
        parameters: Those that train; a frozen one is its own average.
        decay: d, greater than 0 and less than 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.steps = 0
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        share = (1.0 - self.decay) / (1.0 - self.decay**self.steps)
        torch._foreach_lerp_(self.averages, self.parameters, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model hold the average inside, and its own weights again after it; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        if not self.steps:  # before the first step there is nothing to average
            return
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the average."""
        return {"steps": self.steps, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a checkpoint's average back."""
        self.steps = int(state["steps"])
        saved: list[Tensor] = state["averages"]
        for average, kept in zip(self.averages, saved, strict=True):
            average.copy_(kept)
