"""Batches of similar length, padded to their own longest row.

Shapes: B rows of a batch, L tokens, W words.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from research.storage.arrays import gather_ragged
from research.text.tokens import NO_WORD, Tokens
from research.text.words import WordPairs

Batch = dict[str, Tensor]


def length_batches(
    lengths: NDArray[np.int64],
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
    jittered = lengths[order] * generator.uniform(1.0, 1.1, len(order))
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
    ) -> None:
        self.rows = rows
        self.tokens = tokens
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.token_budget = token_budget
        self.teacher_tokens = teacher_tokens
        self.words = words
        self.lengths = tokens.lengths[rows]

    @property
    def num_rows(self) -> int:
        """How many rows an epoch holds."""
        return len(self.rows)

    def __len__(self) -> int:
        if self.token_budget is not None:
            return len(self.plan(epoch=0))
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(epoch=0)

    def iterate(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield one epoch's batches, leaving out the first `skip`: a resumed epoch goes on where it was."""
        for index in self.plan(epoch)[skip:]:
            yield self.collate(index)

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the positions in `rows` of each batch of an epoch."""
        return length_batches(self.lengths, self.batch_size, seed=self.seed, epoch=epoch, token_budget=self.token_budget)

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
    lengths = loader.tokens.lengths[loader.rows]
    padded = sum(len(index) * int(lengths[index].max()) for index in loader.plan(epoch))
    return padded / max(int(lengths.sum()), 1)


# Read by the host: which rows these are, and how many words they share.
HOST_ENTRIES = ("index", "row", "num_words")


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch's tensors to the device, without waiting on CUDA, but for what the host reads."""
    return {name: tensor if name in HOST_ENTRIES else move_tensor(tensor, device) for name, tensor in batch.items()}


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to the device; through pinned memory on CUDA, so that nothing waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
