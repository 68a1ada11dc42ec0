"""A model's logits over a loader. Any module that returns logits will do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from research.distributed import ALONE, World
from research.sharding import answering, is_sharded

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# More than one, which some models need to pool or to make a map.
IDLE_TOKENS = 4


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and give every submodule its own flag back afterwards.

    `model.train()` alone would also wake a frozen encoder that was kept in eval mode.
    """
    training_flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training_flags:
            module.training = was_training


def idle_inputs(device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (1, L), for a process that runs a sharded model only because the others do."""
    import torch

    ids = torch.zeros((1, IDLE_TOKENS), dtype=torch.int64, device=device)
    return ids, torch.ones_like(ids)


def predict_logits(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    device: torch.device | str,
    *,
    num_rows: int | None = None,
    world: World = ALONE,
) -> npt.NDArray[np.float32]:
    """Run a model over a loader and return its logits, (N, C), in dataset order.

    Batches are dicts of CPU tensors: `index` (B,), the rows' places in the result, and
    `input_ids` and `attention_mask`, (B, L). Any batch order will do, so length-sorted
    batches are fine. N is `num_rows`, or else `loader.num_rows`. In a world of several processes each
    has its own batches, and all return the logits of all. Logits stay on the device until the
    end, since reading each batch would stall a GPU once a batch.

    Raises:
        FloatingPointError: some logits are not finite, as after an overflow in float16.
    """
    import torch

    device = torch.device(device)
    if num_rows is None:
        num_rows = loader.num_rows  # type: ignore[attr-defined]
    logits: Tensor | None = None
    given = np.zeros(num_rows, dtype=bool)
    with evaluating(model):
        for batch in world.take_turns(loader) if is_sharded(model) else loader:
            if batch is None:
                with answering(model):
                    model(*idle_inputs(device))
                continue
            input_ids = batch["input_ids"].to(device, non_blocking=True)
            attention_mask = batch["attention_mask"].to(device, non_blocking=True)
            with answering(model):
                computed = model(input_ids, attention_mask)["logits"].float()  # (B, C)
            if logits is None:
                logits = torch.empty(num_rows, computed.shape[1], device=device)
            logits[batch["index"].to(device, non_blocking=True)] = computed
            given[batch["index"].numpy()] = True
    merged, given = world.merge_rows(None if logits is None else logits.cpu().numpy(), given)
    assert merged is not None and given.all(), f"loader gave {given.sum()} of {num_rows} rows"
    num_broken = num_rows - int(np.isfinite(merged).all(axis=1).sum())
    if num_broken:
        raise FloatingPointError(
            f"evaluation: logits of {num_broken} of {num_rows} rows are not finite. Try --no-amp or a lower --lr."
        )
    return merged
