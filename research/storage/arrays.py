"""Arrays on disk: written whole or not at all, read as memory maps, and rows gathered from ragged ones."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

# Of a memory map, to be looked at together: one or two MB.
BLOCK_CELLS = 1 << 18


def append_array(file: BinaryIO, array: NDArray[Any]) -> None:
    """Write an array's cells to an open file, to be read by `map_array`.

    Not by numpy's tofile or save: those lose the last block on a full disk and say nothing.
    """
    file.write(np.ascontiguousarray(array).data)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array's cells alone to a file, to be read by `map_array`."""
    with open(path, "wb") as file:
        append_array(file, array)


def start_npy(file: BinaryIO, shape: tuple[int, ...], dtype: Any) -> None:
    """Begin a file in numpy's own format; cells appended to it are read by np.load."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_npy(path: Path, array: NDArray[Any]) -> None:
    """Write an array with its shape in numpy's own format, to be read by np.load."""
    with open(path, "wb") as file:
        start_npy(file, array.shape, array.dtype)
        append_array(file, array)


def map_array(path: Path, dtype: Any) -> Any:
    """Memory-map a flat binary file; an empty file is an empty array."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def release_pages(*arrays: NDArray[Any]) -> None:
    """Give the pages of memory maps back to the system, which still holds the files in its cache.

    Without it a process that reads all of a file in any order ends up with all of it in its resident set.
    """
    for array in arrays:
        owner: Any = array
        while isinstance(owner, np.ndarray):  # a reshaped map is a view of the map
            owner = owner.base
        if isinstance(owner, mmap.mmap):
            owner.madvise(mmap.MADV_DONTNEED)


def read_blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield a flat array some cells at a time, letting the pages of a memory map go after each block."""
    for start in range(0, len(array), BLOCK_CELLS):
        yield array[start : start + BLOCK_CELLS]
        release_pages(array)


def return_free_memory() -> None:
    """Give freed memory back to the system; glibc would keep it for the whole run."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def read_ragged(flat: NDArray[Any], starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[Any]:
    """Return the cells flat[start : start + count] of some rows, one row after the other.

    The pages of a memory map are let go again: a row brings 64 KB of its file into memory, so even a few batches
    would add up; letting go takes under 0.2 ms.
    """
    before = np.cumsum(counts) - counts
    cells = flat[np.arange(int(counts.sum())) + np.repeat(starts - before, counts)]
    release_pages(flat)
    return cells


def gather_ragged(
    flat: NDArray[Any], offsets: NDArray[np.int64], rows: NDArray[np.int64], fill: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return rows of a ragged array padded to their own longest, (B, L), and the mask of real cells."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    real = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    padded = np.full(real.shape, fill, dtype=np.int64)
    padded[real] = read_ragged(flat, starts, lengths)
    return padded, real
