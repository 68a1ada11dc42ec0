"""A model that counts what it is asked, and its logits of some rows as the cache keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from research.distributed import ALONE, World, join_world
from research.kd import labelling
from research.kd.teacher import Teacher, fetch_logits
from research.models.classifiers import NO_LAYERS
from research.storage.cache import Cache
from research.text.batches import BatchLoader
from research.text.tokens import Tokens

ROWS, CPU = 60, torch.device("cpu")


def build_loader(rows: int = ROWS, seed: int = 0, world: World = ALONE) -> BatchLoader:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 9, 2 * rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Tokens(generator.integers(1, 50, lengths.sum()).astype(np.int32), offsets, None, pad_id=0, key=f"{rows} {seed}")
    asked = generator.permutation(2 * rows)[:rows]
    return BatchLoader(asked, tokens, np.zeros((2 * rows, 1), np.float32), 1024, token_budget=24, world=world)


class Counting(nn.Module):
    """Logits that differ with the batch a row is in, so that other batches would show; stops after so many calls."""

    def __init__(self, calls_left: int = 1000) -> None:
        super().__init__()
        self.calls_left, self.rows = calls_left, 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        if not self.calls_left:
            raise KeyboardInterrupt
        self.calls_left -= 1
        self.rows += len(input_ids)
        total = (input_ids * attention_mask).sum(dim=1).float()
        return {"logits": torch.stack([total, total + total.mean(), total.cumsum(0)], dim=1)}


def label(model: nn.Module, cache: Path, world: World = ALONE) -> Path:
    """Return the file that the cache has of the logits."""
    teacher = Teacher({"name": "counting"}, NO_LAYERS, lambda: model, lambda _: None, {}, 0)  # type: ignore[arg-type, return-value]
    fetch_logits(teacher, build_loader(world=world), CPU, Cache(cache, world))
    return next(cache.glob("logits/*/logits.npy"))


def use_small_parts() -> None:
    """Cut ROWS into about six parts, which are put together in four blocks."""
    labelling.PART_ROWS, labelling.BLOCK_ROWS = 10, 16


def label_together(cache: Path) -> None:
    """Be one process of several that label together, and leave a file that says how many rows it was asked."""
    use_small_parts()
    world, model = join_world("cpu"), Counting()
    label(model, cache, world)
    (cache / f"asked_{world.rank}").write_text(str(model.rows))
    world.leave()
