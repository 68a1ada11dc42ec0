"""Batches of similar length, padded to their own longest row.

Shapes: B rows of a batch, L tokens, W words.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from research.distributed import ALONE, World
from research.storage.arrays import gather_ragged
from research.text.tokens import NO_WORD, Tokens
from research.text.words import WordPairs

Batch = dict[str, Tensor]
# What a loss can be the mean over. When several processes share a batch, it holds what part of each is theirs.
COUNTED = ("rows", "known", "positions", "pairs")
ROWS_AT_ONCE = 4096


def length_batches(
    lengths: NDArray[np.integer[Any]],
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    token_budget: int | None = None,
) -> list[NDArray[np.int64]]:
    """Cut positions 0..N-1 into batches of similar length, of `batch_size` rows.

    With a seed the rows are shuffled among those of nearly equal length (within 10 %), and the
    batches among themselves, anew each epoch; without one the order is longest first, and a batch
    ends before its padded tokens would exceed the budget, though it has at least one row.
    """
    if seed is None:
        order = np.argsort(-lengths, kind="stable")
        batches, start = [], 0
        while start < len(order):
            longest = max(int(lengths[order[start]]), 1)
            size = batch_size if token_budget is None else min(batch_size, max(token_budget // longest, 1))
            batches.append(order[start : start + size])
            start += size
        return batches
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    jittered = generator.uniform(1.0, 1.1, len(order))
    jittered *= lengths[order]
    order = order[np.argsort(jittered, kind="stable")]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[place] for place in generator.permutation(len(batches))]


class BatchLoader:
    """Padded batches of some rows, made on demand from the memory-mapped tokens.

    Every batch holds `index` (B,), the position within `rows`; `row` (B,), the position within the
    data set; `input_ids` and `attention_mask` (B, L); `labels` (B, C), NaN where unknown. With
    `teacher_tokens` it also holds `teacher_input_ids` and `teacher_attention_mask`; with `words` also
    `student_words` (B, L) and their number `num_words`, and beside teacher ids `teacher_words`. Without a
    seed, batches are for evaluation: longest rows first, `token_budget` padded tokens at most.
    Batches follow the student's lengths alone, so they are the same whatever is known of the teacher.
    With `turns` (T, R), an epoch e reads the R positions of line e mod T only, so that all have as many rows and steps.

    In a `world` of several processes each has its part of every training batch's rows, and whole evaluation batches,
    by turns. A part also holds `whole_rows`, the `row` of the whole batch, and of everything COUNTED, as `rows_share`,
    what part of the whole batch's it has. A process without a row gets one whose shares are 0, so that it takes the step too.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        tokens: Tokens,
        labels: NDArray[np.float32],
        batch_size: int,
        *,
        seed: int | None = None,
        token_budget: int | None = None,
        teacher_tokens: Tokens | None = None,
        words: WordPairs | None = None,
        turns: NDArray[np.int64] | None = None,
        world: World = ALONE,
    ) -> None:
        self.rows = rows
        self.tokens = tokens
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.token_budget = token_budget
        self.teacher_tokens = teacher_tokens
        self.words = words
        self.turns = turns
        self.world = world
        self.lengths = tokens.lengths_of(rows)

    @property
    def num_rows(self) -> int:
        """How many rows an epoch holds."""
        return len(self.rows) if self.turns is None else self.turns.shape[1]

    def positions(self, epoch: int) -> NDArray[np.int64]:
        """Return the positions in `rows` that an epoch reads, each once."""
        return np.arange(len(self.rows)) if self.turns is None else self.turns[epoch % len(self.turns)]

    def __len__(self) -> int:
        if self.token_budget is not None:
            return len(self.world.split(self.plan(epoch=0)))
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(epoch=0)

    def iterate(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield one epoch's batches, leaving out the first `skip`: a resumed epoch goes on where it was."""
        batches = self.plan(epoch)[skip:]
        if self.seed is None:
            yield from map(self.collate, self.world.split(batches))
        else:
            yield from map(self.collate if self.world.size == 1 else self.collate_part, batches)

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the positions in `rows` of each batch of an epoch."""
        turn = None if self.turns is None else self.positions(epoch)
        lengths = self.lengths if turn is None else self.lengths[turn]
        batches = length_batches(lengths, self.batch_size, seed=self.seed, epoch=epoch, token_budget=self.token_budget)
        # Views of one order of all rows: copies would cost as much again, and an allocation each.
        return batches if turn is None else [turn[batch] for batch in batches]

    def collate_part(self, index: NDArray[np.int64]) -> Batch:
        """Return this process's part of the batch of some positions in `rows`."""
        part = self.world.split(index)
        batch = self.collate(part if len(part) else index[:1])
        of_part, of_whole = self._count(part), self._count(index)
        shares = {f"{name}_share": torch.tensor(of_part[name] / max(of_whole[name], 1.0)) for name in COUNTED}
        return batch | shares | {"whole_rows": torch.from_numpy(self.rows[index])}

    def _count(self, index: NDArray[np.int64]) -> dict[str, float]:
        """Return how much the rows at some positions have of everything COUNTED."""
        positions = self._num_positions[index].astype(np.float64)
        known = np.count_nonzero(~np.isnan(self.labels[self.rows[index]]))
        counts = (len(index), known, positions.sum(), (positions**2).sum())
        return {name: float(count) for name, count in zip(COUNTED, counts, strict=True)}

    @cached_property
    def _num_positions(self) -> NDArray[np.integer[Any]]:
        """How many positions of each row are compared: the student's tokens, or the words that both models share."""
        if self.words is None:
            return self.lengths
        counts = np.empty(len(self.rows), dtype=np.int64)
        for start in range(0, len(counts), ROWS_AT_ONCE):
            rows = self.rows[start : start + ROWS_AT_ONCE]
            words, _ = gather_ragged(self.words.student, self.tokens.offsets, rows, NO_WORD)
            counts[start : start + len(rows)] = words.max(axis=1, initial=NO_WORD) + 1
        return counts

    def collate(self, index: NDArray[np.int64]) -> Batch:
        """Return the batch of some positions in `rows`, each array padded to its own longest row."""
        rows = self.rows[index]
        input_ids, real = gather_ragged(self.tokens.ids, self.tokens.offsets, rows, self.tokens.pad_id)
        arrays = {"index": index, "row": rows, "input_ids": input_ids, "attention_mask": real.astype(np.int64)}
        arrays["labels"] = self.labels[rows]
        if self.words is not None:
            arrays["student_words"], _ = gather_ragged(self.words.student, self.tokens.offsets, rows, NO_WORD)
            arrays["num_words"] = np.array(arrays["student_words"].max(initial=NO_WORD) + 1)
        if self.teacher_tokens is not None:
            teacher = self.teacher_tokens
            teacher_ids, real = gather_ragged(teacher.ids, teacher.offsets, rows, teacher.pad_id)
            arrays |= {"teacher_input_ids": teacher_ids, "teacher_attention_mask": real.astype(np.int64)}
            if self.words is not None:
                arrays["teacher_words"], _ = gather_ragged(self.words.teacher, teacher.offsets, rows, NO_WORD)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def padding_ratio(loader: BatchLoader, epoch: int = 0) -> float:
    """Return padded tokens over real tokens of one epoch; 1 is no padding at all."""
    padded = sum(len(index) * int(loader.lengths[index].max()) for index in loader.plan(epoch))
    return padded / max(int(loader.lengths[loader.positions(epoch)].sum()), 1)


# Read by the host: which rows these are, how many words they share, and what part of a whole batch they are.
HOST_ENTRIES = ("index", "row", "num_words", "whole_rows", *(f"{name}_share" for name in COUNTED))


def scale_to_share(loss: Tensor, batch: Batch, averaged_over: str) -> Tensor:
    """Turn the mean over this process's part of a batch into its summand of the mean over the whole; one process has it all.

    Args:
        averaged_over: Which of COUNTED the loss is the mean over.
    """
    share = batch.get(f"{averaged_over}_share")
    return loss if share is None else loss * share


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch's tensors to the device, without waiting on CUDA, but for what the host reads."""
    return {name: tensor if name in HOST_ENTRIES else move_tensor(tensor, device) for name, tensor in batch.items()}


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to the device; through pinned memory on CUDA, so that nothing waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
