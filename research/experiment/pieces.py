"""The pieces of the student's tokenizer that a run's texts hold, and a tokenizer of these alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.errors import naming_flag
from research.models.vocabulary import choose_pieces, trim_tokenizer
from research.text.tokens import CHUNK_ROWS, encode
from research_config import ExperimentConfig
from research_data import Comments, Split

log = logging.getLogger(__name__)
UNCUT = 1 << 30  # more tokens than any text has
SAMPLES = 256


@dataclass(frozen=True)
class Pieces:
    """What the student's tokenizer is made of.

    Attributes:
        kept: The ids of its pieces in the tokenizer it was made from, ascending; None when these are all.
        counts: How often the training and unlabelled texts hold each of its own ids, later ids not being there; None
            where vectors are not weighted by it.
    """

    kept: tuple[int, ...] | None = None
    counts: NDArray[np.int64] | None = None


def fit_tokenizer(config: ExperimentConfig, tokenizer: Any, comments: Comments, split: Split) -> tuple[Any, Pieces | None]:
    """Return the student's tokenizer, trimmed when --trim_student_vocab says so, and what is known of its pieces.

    Only the texts that the student learns from are read: those of validation and test have to do with what is
    left, as any new text has. Nothing is read for a student that needs no counts.

    Raises:
        InputError: the tokenizer cannot be trimmed.
    """
    least, weighted = config.trim_student_vocab, config.student_kind == "static" and config.static_weighting == "sif"
    if least is None and not weighted:
        return tokenizer, None
    counts, samples = count_pieces(comments, np.concatenate([split.train, split.unlabelled]), tokenizer)
    if least is None:
        return tokenizer, Pieces(counts=counts)
    with naming_flag("trim_student_vocab"):
        kept = choose_pieces(tokenizer, counts, least)
        trimmed = trim_tokenizer(tokenizer, kept, samples)
    log.info("the student keeps %s of the %s pieces of its tokenizer", f"{len(kept):,}", f"{len(tokenizer):,}")
    padded = np.pad(counts, (0, max(int(kept[-1]) + 1 - len(counts), 0)))
    return trimmed, Pieces(tuple(kept.tolist()), padded[kept] if weighted else None)


def count_pieces(comments: Comments, rows: NDArray[np.int64], tokenizer: Any) -> tuple[NDArray[np.int64], list[str]]:
    """Return how often each id stands in the texts of some rows, and some of these texts."""
    texts = comments.iter_texts_of(rows)
    counts, samples = np.zeros(0, dtype=np.int64), list[str]()
    while chunk := list(islice(texts, CHUNK_ROWS)):
        samples += chunk[: SAMPLES - len(samples)]
        ids, _, _ = encode(chunk, tokenizer, UNCUT, with_words=False)
        found = np.bincount(ids, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts, samples
