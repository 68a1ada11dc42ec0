"""The n-grams of pieces that a set of texts has in common, numbered and counted (no torch).

Shapes: N texts, F n-grams of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

LEAST_TEXTS = 2  # that hold an n-gram of the table
MOST_NGRAMS = 65_536  # of a table


@dataclass(frozen=True)
class NgramTable:
    """The n-grams that are looked for: `codes` (F,) rising, `idf` (F,), of pieces under `vocabulary`, `longest` at most."""

    codes: NDArray[np.int64]
    idf: NDArray[np.float64]
    vocabulary: int
    longest: int

    def weigh(self, ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> csr_matrix:
        """Return tf-idf of N texts (N, F) as `number_ngrams` takes them, of unit length where no n-gram stands twice in one.

        An n-gram that stands k times counts k idf², not k² idf², in the length, which a sum over the text's places gives.
        """
        from scipy.sparse import csr_matrix

        codes, rows = number_ngrams(ids, offsets, self.vocabulary, self.longest)
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        known = self.codes[places] == codes
        rows, places = rows[known], places[known]
        squares = np.bincount(rows, self.idf[places] ** 2, minlength=len(offsets) - 1)
        values = self.idf[places] / np.sqrt(squares[rows])
        return csr_matrix((values, (rows, places)), shape=(len(offsets) - 1, len(self.codes)))


def list_ngrams(ids: NDArray[np.int32], offsets: NDArray[np.int64], vocabulary: int, longest: int) -> NgramTable:
    """Return the table of the n-grams that stand in LEAST_TEXTS of N texts or more; of too many, those in most texts.

    idf = ln((1 + N) / (1 + number of texts that hold it)) + 1, as scikit-learn has it.
    """
    codes, rows = number_ngrams(ids, offsets, vocabulary, longest)
    order = np.lexsort((rows, codes))
    codes, rows = codes[order], rows[order]
    first_in_row = np.ones(len(codes), dtype=bool)
    first_in_row[1:] = (codes[1:] != codes[:-1]) | (rows[1:] != rows[:-1])
    codes, counts = np.unique(codes[first_in_row], return_counts=True)
    kept = np.flatnonzero(counts >= LEAST_TEXTS)
    kept = np.sort(kept[np.argsort(-counts[kept], kind="stable")[:MOST_NGRAMS]])
    return NgramTable(codes[kept], np.log(len(offsets) / (1 + counts[kept])) + 1, vocabulary, longest)


def number_ngrams(
    ids: NDArray[np.int32], offsets: NDArray[np.int64], vocabulary: int, longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the code of every n-gram of 1 to `longest` pieces, and the text that it stands in.

    The code of pieces p_1 ... p_k is the number with the digits p_i + 1 in base V + 1, of V pieces; no two share one.

    Args:
        ids: Of all texts, one after the other: text i is ids[offsets[i]:offsets[i + 1]].
    """
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    code = np.zeros(len(ids), dtype=np.int64)
    codes, of_text = [], []
    for offset in range(longest):
        ending = len(ids) - offset
        code = code[:ending] * (vocabulary + 1) + ids[offset:] + 1
        whole = rows[:ending] == rows[offset:]
        codes.append(code[whole])
        of_text.append(rows[:ending][whole])
    return np.concatenate(codes), np.concatenate(of_text)


def check_countable(vocabulary: int, longest: int) -> None:
    """Make sure that every code is a number of 63 bits.

    Raises:
        InputError: the n-grams are too long for that many pieces.
    """
    if not is_countable(vocabulary, longest):
        most = max(length for length in range(longest) if is_countable(vocabulary, length))
        raise InputError(f"n-grams of a vocabulary of {vocabulary} pieces can be at most {most} pieces long, got {longest}")


def is_countable(vocabulary: int, longest: int) -> bool:
    """Whether every code of n-grams of up to that many of these pieces is a number of 63 bits."""
    return (vocabulary + 1) ** longest < 2**63
