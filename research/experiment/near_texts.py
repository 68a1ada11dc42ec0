"""Rows whose texts nearly equal one that is held out: left out of the unlabelled ones, and counted among those of training."""

from __future__ import annotations

import dataclasses
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from research.text.near_duplicates import CHUNK_TEXTS, NearDuplicates
from research_data import Comments, Split


def leave_out_near_texts(comments: Comments, split: Split) -> Split:
    """Return the split without unlabelled rows whose text nearly equals one of validation or test.

    Training rows that nearly equal a test text stay, since a text that people repeat with small changes is part of
    the data as it is, and leaving them out would change what every earlier number was measured on: they are counted.

    Raises:
        InputError: a table has changed since it was read.
    """
    near_train = mark_near(comments, split.train, split.test)
    near_unlabelled = mark_near(comments, split.unlabelled, np.union1d(split.validation, split.test))
    counts = {"train": int(near_train.sum()), "unlabelled": int(near_unlabelled.sum())}
    return dataclasses.replace(split, unlabelled=split.unlabelled[~near_unlabelled], near_duplicates=counts)


def mark_near(comments: Comments, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of some rows, ascending, have a text that nearly equals one of the others."""
    if not len(rows):
        return np.zeros(0, dtype=bool)
    held = NearDuplicates(comments.iter_texts_of(others))
    texts = comments.iter_texts_of(rows)
    return np.concatenate([held.find(chunk) for chunk in iter(lambda: list(islice(texts, CHUNK_TEXTS)), [])])
