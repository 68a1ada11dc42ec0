"""A teacher's logits of many rows, computed part by part, so that a run that was killed goes on where it was.

Shapes: N rows, C labels.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from research.evaluation.predict import predict_logits
from research.logs import PhaseProgress
from research.storage.arrays import append_array, start_npy
from research.storage.files import hash_file, write_atomic
from research.text.batches import Batch, BatchLoader

log = logging.getLogger(__name__)
# Of a part, about: seconds on a card, minutes on a CPU.
PART_ROWS = 8192
# Rows that are put into their order at a time: 20 MB of five labels.
BLOCK_ROWS = 1 << 20


@dataclass(frozen=True, eq=False)
class Part:
    """Some whole batches of a loader, one after the other.

    Attributes:
        positions: Of their rows among the loader's, in the order of the batches.
        stem: Begins the name of the part's file; changes with the positions.
    """

    positions: NDArray[np.int64]
    stem: str

    def find(self, folder: Path) -> Path | None:
        """Return the part's file; one whose bytes are not those that were written is deleted."""
        for path in folder.glob(f"{self.stem}.*.npy"):
            if hash_file(path) == path.name.split(".")[1]:
                return path
            path.unlink()
        return None

    def write(self, logits: NDArray[np.float32], folder: Path) -> None:
        """Write the part's logits, in the order of its positions, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, logits)
        content = buffer.getbuffer()
        write_atomic(folder / f"{self.stem}.{hashlib.sha256(content).hexdigest()}.npy", content)


def cut_parts(batches: Sequence[NDArray[np.int64]], part_rows: int) -> Iterator[Part]:
    """Put batches, given as the positions of their rows, together to parts of at least `part_rows` rows, but for the last."""
    gathered: list[NDArray[np.int64]] = []
    number = rows = 0
    for place, batch in enumerate(batches):
        gathered.append(batch)
        rows += len(batch)
        if rows >= part_rows or place == len(batches) - 1:
            positions = np.concatenate(gathered)
            yield Part(positions, f"part-{number:06d}-{hashlib.sha256(positions.tobytes()).hexdigest()[:16]}")
            gathered, rows, number = [], 0, number + 1


def label_parts(load: Callable[[], nn.Module], loader: BatchLoader, device: torch.device, folder: Path) -> list[Part]:
    """Leave the logits of a loader's rows in a folder, part by part, and return the parts.

    Every batch is one of the loader's, so a row's logits have the same bits in one run and in several. All processes of
    the loader's world call it; the first writes.

    Args:
        load: Returns the teacher; called when a part is missing.
        folder: Parts that an earlier process left there are not computed again.

    Raises:
        OSError: a part could not be written, as on a full disk.
    """
    world, parts = loader.world, list(cut_parts(loader.plan(epoch=0), PART_ROWS))
    missing = world.lead(lambda: [number for number, part in enumerate(parts) if part.find(folder) is None])
    done = loader.num_rows - sum(len(parts[number].positions) for number in missing)
    if done:
        log.info("teacher outputs: %s of %s rows are there already", f"{done:,}", f"{loader.num_rows:,}")
    with PhaseProgress("teacher outputs", loader.num_rows, "rows", done) as progress:

        def counted(batches: BatchLoader) -> Iterator[Batch]:
            for batch in batches:
                yield batch
                progress.advance(len(batch["index"]) * world.size)

        for number in missing:
            part, rows = parts[number], loader.take(parts[number].positions)
            logits = predict_logits(load().to(device), counted(rows), device, num_rows=rows.num_rows, world=world)
            world.lead(lambda part=part, logits=logits: part.write(logits, folder))  # type: ignore[misc]
    return parts


def join_parts(parts: Sequence[Part], folder: Path, target: Path) -> None:
    """Write the parts' logits to one file, (N, C) float32 in the order of the rows, a block of rows in memory at a time.

    Raises:
        OSError: it could not be written; or a part is gone.
    """
    num_rows = sum(len(part.positions) for part in parts)
    with open(target, "wb") as file:
        for start in range(0, num_rows, BLOCK_ROWS):
            block: NDArray[np.float32] | None = None
            for part in parts:
                inside = (part.positions >= start) & (part.positions < start + BLOCK_ROWS)
                if not inside.any():
                    continue
                path = part.find(folder) if start == 0 else next(folder.glob(f"{part.stem}.*.npy"), None)
                if path is None:
                    raise FileNotFoundError(f"{folder / part.stem}: was deleted while it was in use")
                logits: NDArray[np.float32] = np.load(path, mmap_mode="r")
                if block is None:
                    block = np.empty((min(BLOCK_ROWS, num_rows - start), logits.shape[1]), dtype=np.float32)
                block[part.positions[inside] - start] = logits[inside]
            assert block is not None
            if start == 0:
                start_npy(file, (num_rows, block.shape[1]), np.float32)
            append_array(file, block)
