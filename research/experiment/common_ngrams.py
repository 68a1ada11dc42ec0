"""Whether the training texts have character n-grams in common: seen before a run writes anything, as no fit can do without."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError
from research.models.tfidf import share_ngrams
from research_config import PIPELINES, ExperimentConfig
from research_data import Comments, Split

MOST_PARTS = 5


def check_ngrams(config: ExperimentConfig, comments: Comments, split: Split) -> None:
    """Check the texts of every fit of --pipeline tfidf or --teacher_tfidf; of texts that do share, a few are read.

    Raises:
        InputError: those of a fit have no n-grams in common.
    """
    pipeline = PIPELINES[config.pipeline]
    fits: list[NDArray[np.int64]] = []
    if pipeline.tfidf:
        flag, fits = "--pipeline tfidf", [split.train]
    elif pipeline.teacher and config.teacher_tfidf:
        flag, parts = "--teacher_tfidf", part_texts(comments.text_hash[split.train])
        fits = [split.train[learned_without(part, parts)] for part in range(int(parts.max()) + 1)]
    for rows in fits:
        if not share_ngrams(comments.iter_texts_of(rows)):
            beside = "" if len(rows) == len(split.train) else f" of {len(split.train)}, those that answer for the others,"
            raise InputError(f"{flag}: {len(rows)} training texts{beside} have no n-grams in common")


def part_texts(text_hash: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the part, (N,) from 0, of each row: of equal numbers of distinct texts, drawn always alike.

    Rows of one text are in one part, or a fit would have seen what it answers for.
    """
    distinct, text_of_row = np.unique(text_hash, return_inverse=True)
    return np.random.default_rng(0).permutation(len(distinct))[text_of_row] % min(MOST_PARTS, len(distinct))


def learned_without(part: int, parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places of what a fit that answers for a part learns from.

    A single distinct text is answered for by itself: there is no other.

    Args:
        parts: (N,) of all rows to learn from.
    """
    return np.flatnonzero((parts != part) | (parts.max() == 0))
