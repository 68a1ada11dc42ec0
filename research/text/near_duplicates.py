"""Texts that nearly equal one of a given set: the same letters but for a few, whatever stands around them.

Two texts are near-duplicates when their sets of character 5-grams have a Jaccard index of at least 0.8, taken of
their letters alone (`reduce_to_letters`). The search is exact: what MinHash finds with some probability, prefix
filtering finds always (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007, "All pairs"). With all grams
in one order, the rarest first, two sets as similar as that share one of the first n - ceil(0.8 n) + 1 grams of each, n
being its size. Only texts that do are compared, gram by gram.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

GRAM = 5
# The least Jaccard index, as a fraction, so that all comparisons are between whole numbers.
LEAST, OUT_OF = 4, 5
# Numbers of texts and of grams are packed into 64 bits: 12 for a text of a chunk, 51 for the hash of a gram.
CHUNK_TEXTS, HASH_BITS = 4096, 51
# Pairs that are held at a time while candidates are gathered and compared.
PAIRS_AT_ONCE = 1 << 21
# Odd numbers drawn once: a gram's hash is the sum of its code points times these, modulo 2^64, without the low bits.
FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], dtype=np.uint64
)
FIRST_CANDIDATES = 4
REPEATED = re.compile(r"(.)\1+", re.DOTALL)


class _Letters(dict[int, int | None]):
    """For `str.translate`: every letter and the marks on it stay; all else goes."""

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        # Variation selectors, which choose how an emoji looks, count as marks.
        selector = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
        self[code] = code if category[0] in "LM" and category != "Me" and not selector else None
        return self[code]


LETTERS = _Letters()


def reduce_to_letters(text: str) -> str:
    """Return the text's letters with their marks: case-folded, without spaces, punctuation, digits, emoji and invisible signs.

    A character that is repeated stands there once.
    """
    return REPEATED.sub(r"\1", unicodedata.normalize("NFKC", text).casefold().translate(LETTERS))


@dataclass(frozen=True, eq=False)
class Grams:
    """The distinct grams of T texts, text after text: `hashes` (G,) uint64, and how many each has, `sizes` (T,) int64."""

    hashes: NDArray[np.uint64]
    sizes: NDArray[np.int64]

    @property
    def texts(self) -> NDArray[np.int64]:
        """The text of each gram, (G,)."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)


def hash_grams(keys: Sequence[str]) -> Grams:
    """Return the grams of at most CHUNK_TEXTS keys; a shorter key than a gram is one gram, an empty one has none."""
    assert len(keys) <= CHUNK_TEXTS
    lengths = np.array([max(len(key), GRAM) if key else 0 for key in keys], dtype=np.int64)
    if not lengths.sum():
        return Grams(np.zeros(0, np.uint64), np.zeros(len(keys), np.int64))
    joined = "".join(key.ljust(GRAM, "\0") if key else "" for key in keys)
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32).astype(np.uint64)
    sums = np.zeros(len(codes) - GRAM + 1, np.uint64)
    for place, factor in enumerate(FACTORS):
        sums += codes[place : place + len(sums)] * factor
    text = np.repeat(np.arange(len(keys)), lengths)
    inside = text[: len(sums)] == text[GRAM - 1 :]
    hashes = sums[inside] >> np.uint64(64 - HASH_BITS)
    packed = np.unique((text[: len(sums)][inside].astype(np.uint64) << np.uint64(HASH_BITS)) | hashes)
    sizes = np.bincount((packed >> np.uint64(HASH_BITS)).astype(np.int64), minlength=len(keys))
    return Grams(packed & np.uint64((1 << HASH_BITS) - 1), sizes)


class NearDuplicates:
    """Finds the near-duplicates of some texts.

    Memory grows with these texts, about 3 kB each while it is built; those that are looked up cost none.

    Args:
        texts: Those to be found again.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        keys = sorted({key for text in texts if (key := reduce_to_letters(text))})
        self.keys = frozenset(keys)
        chunks = [hash_grams(chunk) for chunk in _chunks(keys)]
        hashes = np.concatenate([chunk.hashes for chunk in chunks]) if chunks else np.zeros(0, np.uint64)
        self.sizes = np.concatenate([chunk.sizes for chunk in chunks]) if chunks else np.zeros(0, np.int64)
        self.hashes, numbers, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        # The place of every gram in the order of all, the rarest first; of equally rare ones, by their hashes.
        self.places = np.empty(len(counts), np.int64)
        self.places[np.argsort(counts, kind="stable")] = np.arange(len(counts))
        texts_of_grams = np.repeat(np.arange(len(self.sizes)), self.sizes)
        # Ascending by text and, within it, by place.
        self.grams = np.sort((texts_of_grams << 32) | self.places[numbers])
        first = self.grams[_in_prefix(self.sizes)]
        order = np.argsort(first & 0xFFFFFFFF, kind="stable")
        self.posted_places, self.posted_texts = first[order] & 0xFFFFFFFF, first[order] >> 32

    def find(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return which of some texts are near-duplicates, (T,)."""
        found = [self._find(chunk) for chunk in _chunks(texts)]
        return np.concatenate(found) if found else np.zeros(0, bool)

    def _find(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        keys = [reduce_to_letters(text) for text in texts]
        near = np.array([key in self.keys for key in keys], dtype=bool)
        grams = hash_grams(["" if known else key for key, known in zip(keys, near.tolist(), strict=True)])
        if not len(self.hashes) or not len(grams.hashes):
            return near
        number = np.minimum(np.searchsorted(self.hashes, grams.hashes), len(self.hashes) - 1)
        # A gram that none of the texts to be found has is rarer than all others: its place is 0, theirs begin at 1.
        places = np.where(self.hashes[number] == grams.hashes, self.places[number] + 1, 0)
        ordered = np.sort((grams.texts << 32) | places)
        asked, places = ordered >> 32, (ordered & 0xFFFFFFFF) - 1
        probes = np.flatnonzero(_in_prefix(grams.sizes) & (places >= 0))
        low = np.searchsorted(self.posted_places, places[probes], side="left")
        counts = np.searchsorted(self.posted_places, places[probes], side="right") - low
        starts = np.cumsum(grams.sizes) - grams.sizes
        for part in _parts(counts, PAIRS_AT_ONCE):
            posted = self.posted_texts[_ranges(low[part], counts[part])]
            pairs = np.unique((np.repeat(asked[probes[part]], counts[part]) << 32) | posted)
            query, other = pairs >> 32, pairs & 0xFFFFFFFF
            smaller, larger = np.sort(np.stack([grams.sizes[query], self.sizes[other]]), axis=0)
            fits = (OUT_OF * smaller >= LEAST * larger) & ~near[query]
            query, other = query[fits], other[fits]
            # Most texts of a cluster are found at one of their first candidates, and need no more.
            turn = _rank(query) // FIRST_CANDIDATES
            for which in (turn == 0, turn > 0):
                left = np.flatnonzero(which & ~near[query])
                for slice_ in _parts(grams.sizes[query[left]], PAIRS_AT_ONCE):
                    some = left[slice_]
                    some = some[~near[query[some]]]
                    similar = self._compare(query[some], other[some], starts, grams.sizes, places)
                    near[query[some][similar]] = True
        return near

    def _compare(
        self,
        query: NDArray[np.int64],
        other: NDArray[np.int64],
        starts: NDArray[np.int64],
        sizes: NDArray[np.int64],
        places: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Return which pairs of texts are similar, by all of their grams.

        Args:
            query, other: (P,) numbers of the texts asked about, and of those to be found.
            starts, sizes, places: Where each text asked about has its grams, how many, and their places.
        """
        pair = np.repeat(np.arange(len(query)), sizes[query])
        wanted = places[_ranges(starts[query], sizes[query])]
        packed = (other[pair] << 32) | wanted
        found = np.searchsorted(self.grams, packed)
        there = (wanted >= 0) & (self.grams[np.minimum(found, len(self.grams) - 1)] == packed)
        shared = np.bincount(pair[there], minlength=len(query))
        return OUT_OF * shared >= LEAST * (sizes[query] + self.sizes[other] - shared)


def _in_prefix(sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which grams, text after text in the order of their places, are among those that similar texts share one of."""
    lengths = sizes - -(-LEAST * sizes // OUT_OF) + 1
    rank = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank < np.repeat(lengths, sizes)


def _rank(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each of some ascending numbers, how many equal ones stand before it."""
    return np.arange(len(numbers)) - np.searchsorted(numbers, numbers, side="left")


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return start, start + 1, ... of each count, one after the other."""
    return np.arange(int(counts.sum())) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


def _parts(counts: NDArray[np.int64], most: int) -> Iterator[slice]:
    """Cut positions into runs whose counts add up to at most `most`, or which are a single one."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    stream = iter(texts)
    while chunk := list(islice(stream, CHUNK_TEXTS)):
        yield chunk
