"""The words that two tokenizers share, numbered once for all rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from research.storage.arrays import append_array, map_array, release_pages
from research.storage.cache import Cache
from research.text.tokens import CHUNK_ROWS, NO_WORD, Tokens


@dataclass(frozen=True)
class WordPairs:
    """The words that both tokenizers kept whole, numbered from 0 in each row.

    `student` and `teacher` are flat like the tokens' ids; a token of no shared word has NO_WORD.
    `aligned_share` is the number of shared words over the number of words that at least one of the
    tokenizers kept whole, special tokens counted as words.
    """

    student: NDArray[np.int32]
    teacher: NDArray[np.int32]
    aligned_share: float


def pair_words(student: Tokens, teacher: Tokens, cache: Cache) -> WordPairs:
    """Number the words that student and teacher tokens share, once for all rows."""

    def build(folder: Path, _scratch: Path) -> None:
        shared_words = all_words = 0
        with open(folder / "student.bin", "wb") as student_file, open(folder / "teacher.bin", "wb") as teacher_file:
            for start in range(0, len(student.offsets) - 1, CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, len(student.offsets) - 1)
                left, right, shared, union = share_words(row_words(student, start, stop), row_words(teacher, start, stop))
                append_array(student_file, left)
                append_array(teacher_file, right)
                shared_words, all_words = shared_words + shared, all_words + union
        (folder / "share.json").write_text(json.dumps(shared_words / max(all_words, 1)))

    def read(folder: Path) -> WordPairs:
        pairs = WordPairs(
            student=map_array(folder / "student.bin", np.int32),
            teacher=map_array(folder / "teacher.bin", np.int32),
            aligned_share=json.loads((folder / "share.json").read_text()),
        )
        if (len(pairs.student), len(pairs.teacher)) != (len(student.ids), len(teacher.ids)):
            raise ValueError(f"words of {len(pairs.student)} and {len(pairs.teacher)} tokens")
        return pairs

    return read(cache.fetch("words", {"student": student.key, "teacher": teacher.key}, build, read))


def row_words(tokens: Tokens, start: int, stop: int) -> NDArray[np.int64]:
    """Return one number per token of rows start..stop, unique to its row and word; NO_WORD stays."""
    assert tokens.words is not None
    offsets = tokens.offsets[start : stop + 1]
    words = tokens.words[offsets[0] : offsets[-1]].astype(np.int64)
    rows = np.repeat(np.arange(stop - start), np.diff(offsets))
    release_pages(tokens.offsets, tokens.words)
    return np.where(words == NO_WORD, NO_WORD, (rows << 32) | words)


def share_words(student: NDArray[np.int64], teacher: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32], int, int]:
    """Renumber the words found on both sides; return both flat arrays and the counts shared and in all."""
    student_words, teacher_words = np.unique(student), np.unique(teacher)
    shared = np.intersect1d(student_words, teacher_words, assume_unique=True)
    shared = shared[shared != NO_WORD]
    every = np.union1d(student_words, teacher_words)
    starts = np.searchsorted(shared, (shared >> 32) << 32)
    numbers = (np.arange(len(shared)) - starts).astype(np.int32)

    def renumber(words: NDArray[np.int64]) -> NDArray[np.int32]:
        if not len(shared):
            return np.full(len(words), NO_WORD, dtype=np.int32)
        places = np.minimum(np.searchsorted(shared, words), len(shared) - 1)
        return np.where(shared[places] == words, numbers[places], NO_WORD).astype(np.int32)

    return renumber(student), renumber(teacher), len(shared), int((every != NO_WORD).sum())
