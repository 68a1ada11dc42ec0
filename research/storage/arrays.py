"""Flat binary arrays read as memory maps, and rows gathered from ragged ones."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def map_array(path: Path, dtype: Any) -> Any:
    """Memory-map a flat binary file; an empty file is an empty array."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def release_pages(*arrays: NDArray[Any]) -> None:
    """Give the pages of memory maps back to the system, which still holds the files in its cache.

    Without it a process that reads all of a file in any order ends up with all of it in its resident set.
    """
    for array in arrays:
        if isinstance(array.base, mmap.mmap):
            array.base.madvise(mmap.MADV_DONTNEED)


def return_free_memory() -> None:
    """Give freed memory back to the system; glibc would keep it for the whole run."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def gather_ragged(
    flat: NDArray[Any], offsets: NDArray[np.int64], rows: NDArray[np.int64], fill: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return rows of a ragged array padded to their own longest, (B, L), and the mask of real cells."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    columns = np.arange(int(lengths.max(initial=0)))
    real = columns < lengths[:, None]
    padded = np.full(real.shape, fill, dtype=np.int64)
    padded[real] = flat[(starts[:, None] + columns)[real]]
    return padded, real
