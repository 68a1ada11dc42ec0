"""Comments tokenised once and kept ragged on disk.

Shapes: N rows, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError
from research.logs import PhaseProgress
from research.storage.arrays import BLOCK_CELLS, append_array, map_array, read_blocks, release_pages, return_free_memory
from research.storage.cache import Cache, digest_key

CHUNK_ROWS = 8192
NO_WORD = -1
# Part of the cache keys: raise it when the stored layout or the rule that gives a token its word changes.
TOKENS_FORMAT = 2


class TextSource(Protocol):
    """What tokenising needs of the comments: their texts in row order and a hash of them all."""

    def __len__(self) -> int: ...

    @property
    def text_sha256(self) -> str:
        """A hash of all texts, in order."""

    def iter_texts(self) -> Iterator[str]:
        """Yield every text, in the order of the rows."""


@dataclass(frozen=True)
class Tokens:
    """One tokenizer's ids of every row, ragged: row i is ids[offsets[i]:offsets[i + 1]].

    `words` holds, for each token, the position of its whitespace word in the text: 0 for special
    tokens before the text, k for the k-th word, number of words + 1 for special tokens after it,
    NO_WORD for a token of a word that `max_length` cut. Arrays are memory-mapped.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    words: NDArray[np.int32] | None
    pad_id: int
    key: str

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens in each row."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the number of tokens of some rows."""
        lengths = np.empty(len(rows), dtype=np.int32)
        for start in range(0, len(rows), BLOCK_CELLS):
            block = rows[start : start + BLOCK_CELLS]
            lengths[start : start + len(block)] = self.offsets[block + 1] - self.offsets[block]
            release_pages(self.offsets)
        return lengths

    def take(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids of some rows one after the other, and their offsets, as `ids` and `offsets` are those of all."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths_of(rows))])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], np.diff(offsets))
        return self.ids[places], offsets

    def same_ids(self, other: Tokens) -> bool:
        """Whether both tokenizers gave every row the same ids."""
        return self.key == other.key or (_are_equal(self.offsets, other.offsets) and _are_equal(self.ids, other.ids))


def _are_equal(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, read_blocks(one), read_blocks(other)))


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Return a hash of everything that decides a tokenizer's ids."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        content = json.dumps([backend.to_str(), tokenizer.truncation_side, tokenizer.split_special_tokens])
    else:
        content = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), repr(tokenizer)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def tokenize(texts: TextSource, tokenizer: Any, max_length: int, cache: Cache, *, with_words: bool) -> Tokens:
    """Tokenise every text once, without padding, and keep the ids in the cache.

    Args:
        with_words: Also keep each token's word, which needs character offsets (a fast tokenizer).

    Raises:
        InputError: the tokenizer has no padding token, or no offsets when words are asked for.
    """
    if tokenizer.pad_token_id is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path}: has no padding token; set pad_token in its config")
    if with_words and not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: is a slow one without character offsets, so its words cannot be "
            "aligned with the other model's. Use --kd_method logit or a fast tokenizer (tokenizer.json)."
        )
    key = tokens_key(texts, tokenizer, max_length, with_words=with_words)

    def build(folder: Path, _scratch: Path) -> None:
        write_tokens(folder, texts, tokenizer, max_length, with_words)
        return_free_memory()

    def read(folder: Path) -> Tokens:
        return read_tokens(folder, tokenizer.pad_token_id, digest_key(key), with_words)

    return read(cache.fetch("tokens", key, build, read))


def tokens_key(texts: TextSource, tokenizer: Any, max_length: int, *, with_words: bool) -> dict[str, Any]:
    """Return everything that the tokens of `tokenize` depend on."""
    return {
        "text": texts.text_sha256,
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "max_length": max_length,
        "words": with_words,
        "tokenizers": version("tokenizers"),
        "format": TOKENS_FORMAT,
    }


def read_tokens(folder: Path, pad_id: int, key: str, with_words: bool) -> Tokens:
    """Map what `write_tokens` wrote.

    Raises:
        ValueError: its files do not fit each other.
    """
    ids = map_array(folder / "ids.bin", np.int32)
    offsets = map_array(folder / "offsets.bin", np.int64)
    words = map_array(folder / "words.bin", np.int32) if with_words else None
    if offsets[-1] != len(ids) or (words is not None and len(words) != len(ids)):
        raise ValueError(f"{len(ids)} ids, {offsets[-1]} in its offsets, {len(ids) if words is None else len(words)} words")
    return Tokens(ids, offsets, words, pad_id, key)


def write_tokens(folder: Path, texts: TextSource, tokenizer: Any, max_length: int, with_words: bool) -> None:
    """Stream the texts through the tokenizer in large batches, so memory does not grow with the rows."""
    total = 0
    stream = texts.iter_texts()
    with (
        PhaseProgress("tokenising", len(texts), "texts") as progress,
        open(folder / "ids.bin", "wb") as ids_file,
        open(folder / "offsets.bin", "wb") as offsets_file,
        open(folder / "words.bin", "wb") as words_file,
    ):
        append_array(offsets_file, np.zeros(1, dtype=np.int64))
        while chunk := list(islice(stream, CHUNK_ROWS)):
            ids, lengths, words = encode(chunk, tokenizer, max_length, with_words)
            append_array(ids_file, ids)
            append_array(offsets_file, total + np.cumsum(lengths))
            total += int(lengths.sum())
            if words is not None:
                append_array(words_file, words)
            progress.advance(len(chunk))


def encode(
    texts: list[str], tokenizer: Any, max_length: int, with_words: bool
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32] | None]:
    """Return the flat ids of all texts, each text's number of them and, when asked, the flat array of their words."""
    if not tokenizer.is_fast:
        return *flatten(tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]), None
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    if not with_words:
        backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
        encodings = backend.encode_batch_fast(texts)
        # What is set stays set in the tokenizer, and would be saved with it.
        backend.no_truncation()
        return *flatten([encoding.ids for encoding in encodings]), None
    # Whole texts are encoded and cut here: which words were cut can only be told from both sides of the cut.
    backend.no_truncation()
    encodings = backend.encode_batch(texts)
    ids, lengths = flatten([encoding.ids for encoding in encodings])
    special = np.fromiter(chain.from_iterable(encoding.special_tokens_mask for encoding in encodings), bool, len(ids))
    words = locate_words(texts, encodings, lengths, special)
    return truncate(ids, words, lengths, special, max_length, tokenizer.truncation_side)


def flatten(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the values of all rows one after the other, and the rows' lengths."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def locate_words(
    texts: Sequence[str], encodings: Sequence[Any], lengths: NDArray[np.int64], special: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Return the flat array of every token's word in its whole text, numbered as in `Tokens.words`.

    A token belongs to the word that holds its last character, or, when that is white space (a
    lone metaspace or newline token), to the next word: normalisers and metaspaces may stretch a
    token's start over the gap before it. A token after the last word is of none. Offsets refer to
    the text as it was given, so a normaliser that changes its length does no harm.

    Args:
        lengths: Number of tokens of each text.
        special: Which tokens, flat, the tokenizer puts around the text.
    """
    word_spans = [[match.span() for match in re.finditer(r"\S+", text)] for text in texts]
    word_counts = np.array([len(spans) for spans in word_spans])
    text_starts = np.cumsum([0] + [len(text) for text in texts[:-1]])
    first_words = np.cumsum(word_counts) - word_counts
    word_ends = np.array([end for spans in word_spans for _, end in spans], dtype=np.int64)
    word_ends += np.repeat(text_starts, word_counts)

    rows = np.repeat(np.arange(len(texts)), lengths)
    spans = np.fromiter(
        chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings)), np.int64, 2 * len(rows)
    ).reshape(-1, 2)
    last_character = np.maximum(spans[:, 1] - 1, spans[:, 0]) + text_starts[rows]
    found = np.searchsorted(word_ends, last_character, side="right") - first_words[rows]
    words = np.where(found < word_counts[rows], found + 1, NO_WORD)

    rank = rank_in_row(~special, lengths)
    opens = rank == 0
    # A text without content tokens has special tokens only: the first opens it, the others close it.
    empty = np.bincount(rows[~special], minlength=len(texts)) == 0
    opens &= ~empty[rows] | (rank_in_row(special, lengths) == 0)
    return np.where(special, np.where(opens, 0, word_counts[rows] + 1), words).astype(np.int32)


def truncate(
    ids: NDArray[np.int32],
    words: NDArray[np.int32],
    lengths: NDArray[np.int64],
    special: NDArray[np.bool_],
    max_length: int,
    side: str,
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """Cut rows to `max_length` as the tokenizer does, keeping special tokens; a word cut in two becomes NO_WORD.

    `side` is the end of the text that is lost, "right" or "left".
    """
    rows = np.repeat(np.arange(len(lengths)), lengths)
    contents = np.bincount(rows[~special], minlength=len(lengths))
    room = np.clip(max_length - (lengths - contents), 0, contents)
    rank = rank_in_row(~special, lengths)
    kept = special | (rank < room[rows] if side == "right" else rank >= (contents - room)[rows])
    if not kept.all():
        word_keys = (rows << 32) | words
        words = np.where(~special & np.isin(word_keys, word_keys[~kept]), NO_WORD, words).astype(np.int32)
    return ids[kept], np.bincount(rows[kept], minlength=len(lengths)), words[kept]


def rank_in_row(chosen: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each flat cell, how many chosen cells lie before it in its row."""
    before: NDArray[np.int64] = np.cumsum(chosen, dtype=np.int64) - chosen
    starts = np.cumsum(lengths) - lengths
    # A row of length 0 may start past the end of the array; nothing is repeated for it.
    return before - np.repeat(np.append(before, 0)[starts], lengths)
