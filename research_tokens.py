"""Tokenised comments on disk, the words that two tokenizers share, and batches of similar length.

Shapes: N rows, B rows of a batch, L tokens, W words.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from research_cache import Cache, digest_key
from research_config import InputError

log = logging.getLogger(__name__)

CHUNK_ROWS = 8192
NO_WORD = -1
# Part of the cache keys: raise it when the stored layout or the rule that gives a token its word changes.
TOKENS_FORMAT = 2
Batch = dict[str, Tensor]


class TextSource(Protocol):
    """What tokenising needs of the comments: their texts in row order and a hash of them all."""

    @property
    def text_sha256(self) -> str: ...

    def iter_texts(self) -> Iterator[str]: ...


class RowStore(Protocol):
    """Something that keeps padded arrays of rows, named as batches carry them."""

    def collate(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]: ...

    def release_pages(self) -> None: ...


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
        return np.diff(self.offsets)

    def same_ids(self, other: Tokens) -> bool:
        """Whether both tokenizers gave every row the same ids."""
        return self.key == other.key or (np.array_equal(self.offsets, other.offsets) and np.array_equal(self.ids, other.ids))


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
    import tokenizers

    if tokenizer.pad_token_id is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path}: has no padding token; set pad_token in its config")
    if with_words and not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: is a slow one without character offsets, so its words cannot be "
            "aligned with the other model's. Use --kd_method logit or a fast tokenizer (tokenizer.json)."
        )
    key = {
        "text": texts.text_sha256,
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "max_length": max_length,
        "words": with_words,
        "tokenizers": tokenizers.__version__,
        "format": TOKENS_FORMAT,
    }

    def build(folder: Path, _scratch: Path) -> None:
        write_tokens(folder, texts.iter_texts(), tokenizer, max_length, with_words)
        return_free_memory()

    folder = cache.fetch("tokens", key, build)
    return Tokens(
        ids=map_array(folder / "ids.bin", np.int32),
        offsets=map_array(folder / "offsets.bin", np.int64),
        words=map_array(folder / "words.bin", np.int32) if with_words else None,
        pad_id=tokenizer.pad_token_id,
        key=digest_key(key),
    )


def map_array(path: Path, dtype: Any) -> Any:
    """Memory-map a flat binary file; an empty file is an empty array."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def release_pages(*arrays: NDArray[Any]) -> None:
    """Give the pages of memory maps back to the system, which still holds the files in its cache.

    Without it a process that reads all of a file in any order ends up with all of it in its resident set.
    """
    for array in arrays:
        if isinstance(array.base, mmap.mmap):
            array.base.madvise(mmap.MADV_DONTNEED)


def return_free_memory() -> None:
    """Give freed memory back to the system; glibc would keep it for the whole run."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def write_tokens(folder: Path, texts: Iterator[str], tokenizer: Any, max_length: int, with_words: bool) -> None:
    """Stream the texts through the tokenizer in large batches, so memory does not grow with the rows."""
    total = 0
    with (
        open(folder / "ids.bin", "wb") as ids_file,
        open(folder / "offsets.bin", "wb") as offsets_file,
        open(folder / "words.bin", "wb") as words_file,
    ):
        np.zeros(1, dtype=np.int64).tofile(offsets_file)
        while chunk := list(islice(texts, CHUNK_ROWS)):
            ids, lengths, words = encode(chunk, tokenizer, max_length, with_words)
            ids.tofile(ids_file)
            (total + np.cumsum(lengths)).tofile(offsets_file)
            total += int(lengths.sum())
            if words is not None:
                words.tofile(words_file)


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
                left.tofile(student_file)
                right.tofile(teacher_file)
                shared_words, all_words = shared_words + shared, all_words + union
        (folder / "share.json").write_text(json.dumps(shared_words / max(all_words, 1)))

    folder = cache.fetch("words", {"student": student.key, "teacher": teacher.key}, build)
    return WordPairs(
        student=map_array(folder / "student.bin", np.int32),
        teacher=map_array(folder / "teacher.bin", np.int32),
        aligned_share=json.loads((folder / "share.json").read_text()),
    )


def row_words(tokens: Tokens, start: int, stop: int) -> NDArray[np.int64]:
    """Return one number per token of rows start..stop, unique to its row and word; NO_WORD stays."""
    assert tokens.words is not None
    offsets = tokens.offsets[start : stop + 1]
    words = tokens.words[offsets[0] : offsets[-1]].astype(np.int64)
    rows = np.repeat(np.arange(stop - start), np.diff(offsets))
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


def gather_ragged(
    flat: NDArray[Any], offsets: NDArray[np.int64], rows: NDArray[np.int64], fill: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return rows of a ragged array padded to their own longest, (B, L), and the mask of real cells."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    columns = np.arange(int(lengths.max(initial=0)))
    real = columns < lengths[:, None]
    padded = np.full(real.shape, fill, dtype=np.int64)
    padded[real] = flat[(starts[:, None] + columns)[real]]
    return padded, real


def length_batches(
    lengths: NDArray[np.int64],
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    token_budget: int | None = None,
) -> list[NDArray[np.int64]]:
    """Cut positions 0..N-1 into batches of similar length, of `batch_size` rows.

    With a seed the rows are shuffled among those of nearly equal length (within 10 %), and the
    batches among themselves, anew each epoch; without one the order is longest first, and a batch
    ends before its padded tokens would exceed the budget, though it has at least one row.
    """
    if seed is None:
        order = np.argsort(-lengths, kind="stable")
        batches, start = [], 0
        while start < len(order):
            longest = max(int(lengths[order[start]]), 1)
            size = batch_size if token_budget is None else min(batch_size, max(token_budget // longest, 1))
            batches.append(order[start : start + size])
            start += size
        return batches
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    jittered = lengths[order] * generator.uniform(1.0, 1.1, len(order))
    order = order[np.argsort(jittered, kind="stable")]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[place] for place in generator.permutation(len(batches))]


class BatchLoader:
    """Padded batches of some rows, made on demand from the memory-mapped tokens.

    Every batch holds `index` (B,), the position within `rows`; `row` (B,), the position within the
    data set; `input_ids` and `attention_mask` (B, L); `labels` (B, C), NaN where unknown. With
    `teacher_tokens` it also holds `teacher_input_ids` and `teacher_attention_mask`; with `words` also
    `student_words` (B, L) and their number `num_words`, and beside teacher ids `teacher_words`; with
    `teacher_logits` those rows of it (B, C); with `teacher_layers` what that keeps of the teacher.
    Without a seed, batches are for evaluation: longest rows first, `token_budget` padded tokens at most.
    Batches follow the student's lengths alone, so they are the same whatever is known of the teacher.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        tokens: Tokens,
        labels: NDArray[np.float32],
        batch_size: int,
        *,
        seed: int | None = None,
        token_budget: int | None = None,
        teacher_tokens: Tokens | None = None,
        words: WordPairs | None = None,
        teacher_logits: NDArray[np.float32] | None = None,
        teacher_layers: RowStore | None = None,
    ) -> None:
        self.rows = rows
        self.tokens = tokens
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.token_budget = token_budget
        self.teacher_tokens = teacher_tokens
        self.words = words
        self.teacher_logits = teacher_logits
        self.teacher_layers = teacher_layers
        self.lengths = tokens.lengths[rows]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def __len__(self) -> int:
        if self.token_budget is not None:
            return len(self.plan(epoch=0))
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(epoch=0)

    def iterate(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield one epoch's batches, leaving out the first `skip`: a resumed epoch goes on where it was."""
        for index in self.plan(epoch)[skip:]:
            batch = self.collate(index)
            # A row brings 64 KB of its file into memory, so even a few batches add up; letting go takes under 0.2 ms.
            self.release_pages()
            yield batch

    def release_pages(self) -> None:
        """Let go of what has been read of the memory maps, so that memory does not grow with the rows."""
        for tokens in (self.tokens, self.teacher_tokens):
            if tokens is not None:
                release_pages(tokens.ids)
        if self.words is not None:
            release_pages(self.words.student, self.words.teacher)
        if self.teacher_logits is not None:
            release_pages(self.teacher_logits)
        if self.teacher_layers is not None:
            self.teacher_layers.release_pages()

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        return length_batches(self.lengths, self.batch_size, seed=self.seed, epoch=epoch, token_budget=self.token_budget)

    def collate(self, index: NDArray[np.int64]) -> Batch:
        rows = self.rows[index]
        input_ids, real = gather_ragged(self.tokens.ids, self.tokens.offsets, rows, self.tokens.pad_id)
        arrays = {"index": index, "row": rows, "input_ids": input_ids, "attention_mask": real.astype(np.int64)}
        arrays["labels"] = self.labels[rows]
        if self.words is not None:
            arrays["student_words"], _ = gather_ragged(self.words.student, self.tokens.offsets, rows, NO_WORD)
            arrays["num_words"] = np.array(arrays["student_words"].max(initial=NO_WORD) + 1)
        if self.teacher_tokens is not None:
            teacher = self.teacher_tokens
            teacher_ids, real = gather_ragged(teacher.ids, teacher.offsets, rows, teacher.pad_id)
            arrays |= {"teacher_input_ids": teacher_ids, "teacher_attention_mask": real.astype(np.int64)}
            if self.words is not None:
                arrays["teacher_words"], _ = gather_ragged(self.words.teacher, teacher.offsets, rows, NO_WORD)
        if self.teacher_logits is not None:
            arrays["teacher_logits"] = self.teacher_logits[rows]
        if self.teacher_layers is not None:
            arrays |= self.teacher_layers.collate(rows)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def padding_ratio(loader: BatchLoader, epoch: int = 0) -> float:
    """Return padded tokens over real tokens of one epoch; 1 is no padding at all."""
    lengths = loader.tokens.lengths[loader.rows]
    padded = sum(len(index) * int(lengths[index].max()) for index in loader.plan(epoch))
    return padded / max(int(lengths.sum()), 1)
