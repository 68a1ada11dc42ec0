"""An array on disk is whole, or its writing failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fault_injection import file_size_limit

from research.storage import arrays
from research.storage.arrays import append_array, map_array, read_blocks, write_array, write_npy


def append_twice(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        append_array(file, array[: len(array) // 2])
        append_array(file, array[len(array) // 2 :])


ARRAYS: dict[str, np.ndarray] = {
    "ids": np.arange(2000, dtype=np.int32),
    "states": np.arange(600, dtype=np.float16).reshape(60, 10),
    "not contiguous": np.arange(600, dtype=np.float32).reshape(60, 10).T,
    "nothing": np.empty(0, dtype=np.int64),
    "no rows": np.empty((0, 5), dtype=np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_array_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    array = ARRAYS[name]
    for write in (write_array, append_twice):
        write(tmp_path / "cells.bin", array)
        np.testing.assert_array_equal(map_array(tmp_path / "cells.bin", array.dtype).reshape(array.shape), array)
    write_npy(tmp_path / "array.npy", array)
    read = np.load(tmp_path / "array.npy")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("write", [write_array, append_twice, write_npy])
@pytest.mark.parametrize("lost", [1, 100, 4000, 7999])
def test_array_that_does_not_fit_on_the_disk_is_an_error(tmp_path: Path, write: Callable[..., Any], lost: int) -> None:
    """The tofile and save of numpy itself say nothing when it is the last block that does not fit."""
    write(tmp_path / "whole", ARRAYS["ids"])
    size = (tmp_path / "whole").stat().st_size
    with file_size_limit(size - lost), pytest.raises(OSError, match="File too large"):
        write(tmp_path / "torn", ARRAYS["ids"])
    with file_size_limit(size):
        write(tmp_path / "fits", ARRAYS["ids"])


def count_resident(path: Path) -> int:
    """Return the bytes of a mapped file that are in the memory of this process."""
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    mappings = smaps.split(f"{path}\n")[1:]  # what follows its name says how much of it there is
    return sum(1024 * int(mapping.partition("Rss:")[2].split()[0]) for mapping in mappings)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells which pages a process holds")
def test_blocks_of_a_map_are_its_cells_and_stay_in_memory_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "BLOCK_CELLS", 1 << 16)
    cells, path = np.arange((1 << 22) + 5, dtype=np.int32), tmp_path / "cells.bin"
    write_array(path, cells)
    mapped, seen, resident = map_array(path, np.int32), [], []
    for block in read_blocks(mapped):
        seen.append(np.array(block))
        resident.append(count_resident(path))
    np.testing.assert_array_equal(np.concatenate(seen), cells)
    # The system may map two megabytes for a cell that is read.
    assert 4 * (1 << 16) <= max(resident) < cells.nbytes / 3
    assert count_resident(path) == 0
    assert not list(read_blocks(cells[:0]))
