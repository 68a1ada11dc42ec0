"""Which rows share a text, as predictions.csv tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from research.experiment.saving import first_of_texts


def test_rows_of_one_text_name_the_first_row_of_their_own_table() -> None:
    comments: Any = SimpleNamespace(
        source=np.array([0, 0, 0, 0, 2, 2, 2]),
        find_source_rows=np.array([0, 2, 3, 5, 1, 2, 4]).__getitem__,  # rows without a text are counted too
        text_hash=np.array([7, 8, 7, 9, 8, 7, 8], dtype=np.uint64),
    )
    assert first_of_texts(comments, np.array([3, 2, 0])).tolist() == [5, 0, 0]
    assert first_of_texts(comments, np.array([6, 4, 5])).tolist() == [1, 1, 2]
