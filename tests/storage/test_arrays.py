"""Rows of different lengths in one flat array."""

from __future__ import annotations

import numpy as np

from research.storage.arrays import gather_ragged


def test_gathered_rows_are_padded_to_their_own_longest_even_when_some_are_empty() -> None:
    flat, offsets = np.arange(10, 16), np.array([0, 2, 2, 5, 6, 6])
    padded, real = gather_ragged(flat, offsets, np.array([4, 2, 0, 1]), -7)
    assert padded.tolist() == [[-7, -7, -7], [12, 13, 14], [10, 11, -7], [-7, -7, -7]]
    assert real.sum(axis=1).tolist() == [0, 3, 2, 0]
