"""A teacher's logits of many rows, computed part by part, so that a run that was killed goes on where it was.

Shapes: N rows, C labels.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from research.evaluation.predict import predict_logits
from research.logs import PhaseProgress
from research.storage.arrays import append_array, return_free_memory, start_npy
from research.storage.files import is_as_written, write_checked
from research.text.batches import Batch, BatchLoader

log = logging.getLogger(__name__)
# Of a part, about: seconds on a card, minutes on a CPU.
PART_ROWS = 8192
# Rows that are put into their order at a time: 20 MB of five labels.
BLOCK_ROWS = 1 << 20


@dataclass(frozen=True, eq=False)
class Part:
    """Some batches of a loader, one after the other.

    Attributes:
        batches: The positions of each batch's rows among the loader's.
        stem: Begins the name of the part's file; changes with the positions.
    """

    batches: list[NDArray[np.int64]]
    stem: str

    @property
    def positions(self) -> NDArray[np.int64]:
        """Those of all its rows, in the order of its logits."""
        return np.concatenate(self.batches)

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    def find(self, folder: Path) -> Path | None:
        """Return the part's file; one whose bytes are not those that were written is deleted."""
        for path in folder.glob(f"{self.stem}.*.npy"):
            if is_as_written(path):
                return path
            path.unlink()
        return None

    def write(self, logits: NDArray[np.float32], folder: Path) -> None:
        """Write the part's logits, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, logits)
        write_checked(folder, self.stem, ".npy", buffer.getbuffer())


def cut_parts(batches: Sequence[NDArray[np.int64]], part_rows: int) -> Iterator[Part]:
    """Put batches, given as the positions of their rows, together to parts of at least `part_rows` rows, but for the last."""
    gathered: list[NDArray[np.int64]] = []
    number = rows = 0
    for place, batch in enumerate(batches):
        gathered.append(batch)
        rows += len(batch)
        if rows >= part_rows or place == len(batches) - 1:
            digest = hashlib.sha256(b"".join(positions.tobytes() for positions in gathered)).hexdigest()
            yield Part(gathered, f"part-{number:06d}-{digest[:16]}")
            gathered, rows, number = [], 0, number + 1


def label_parts(load: Callable[[], nn.Module], loader: BatchLoader, device: torch.device, folder: Path) -> list[Part]:
    """Leave the logits of a loader's rows in a folder, part by part, and return the parts.

    Every batch is one of the loader's, so a row's logits have the same bits whether the work was stopped in between or not.
    All processes of the loader's world call it and share the batches of as many parts as they are; the first writes.

    Args:
        load: Returns the teacher; called when a part is missing.
        folder: Parts that an earlier process left there are not computed again.

    Raises:
        OSError: a part could not be written, as on a full disk.
    """
    world, parts = loader.world, list(cut_parts(loader.plan(epoch=0), PART_ROWS))
    missing = world.lead(lambda: [number for number, part in enumerate(parts) if part.find(folder) is None])
    done = loader.num_rows - sum(len(parts[number]) for number in missing)
    if done:
        log.info("teacher outputs: %s of %s rows are there already", f"{done:,}", f"{loader.num_rows:,}")
    with PhaseProgress("teacher outputs", loader.num_rows, "rows", done) as progress:
        for start in range(0, len(missing), world.size):
            together = [parts[number] for number in missing[start : start + world.size]]
            batches = collate_parts(together, loader, progress)
            num_rows = sum(map(len, together))
            logits = predict_logits(load().to(device), batches, device, num_rows=num_rows, world=world)
            world.lead(partial(write_parts, together, logits, folder))
            return_free_memory()  # of batches that have other sizes from part to part; takes 0.3 ms
    return parts


def collate_parts(parts: Sequence[Part], loader: BatchLoader, progress: PhaseProgress) -> Iterator[Batch]:
    """Yield this process's batches of some parts; `index` is a row's place among those of the parts."""
    batches = [batch for part in parts for batch in part.batches]
    starts = np.cumsum([0, *map(len, batches)])
    for place in loader.world.split(list(range(len(batches)))):
        yield loader.collate(batches[place]) | {"index": torch.arange(starts[place], starts[place + 1])}
        progress.advance(len(batches[place]) * loader.world.size)


def write_parts(parts: Sequence[Part], logits: NDArray[np.float32], folder: Path) -> None:
    """Write the logits of some parts, which follow one another in them."""
    start = 0
    for part in parts:
        part.write(logits[start : start + len(part)], folder)
        start += len(part)


def join_parts(parts: Sequence[Part], folder: Path, target: Path) -> None:
    """Write the parts' logits to one file, (N, C) float32 in the order of the rows, a block of rows in memory at a time.

    Raises:
        OSError: it could not be written, as on a full disk.
    """
    num_rows = sum(map(len, parts))
    with open(target, "wb") as file:
        for start in range(0, num_rows, BLOCK_ROWS):
            block: NDArray[np.float32] | None = None
            for part in parts:
                positions = part.positions
                inside = (positions >= start) & (positions < start + BLOCK_ROWS)
                if not inside.any():
                    continue
                logits: NDArray[np.float32] = np.load(next(folder.glob(f"{part.stem}.*.npy")), mmap_mode="r")
                if block is None:
                    block = np.empty((min(BLOCK_ROWS, num_rows - start), logits.shape[1]), dtype=np.float32)
                block[positions[inside] - start] = logits[inside]
            assert block is not None
            if start == 0:
                start_npy(file, (num_rows, block.shape[1]), np.float32)
            append_array(file, block)
