"""Ragged tokens, the words of two tokenizers, and batches of similar length."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import TOKENIZERS, requires_shared, shared_path
from tokenizers import Regex, normalizers
from tokenizers.models import WordPiece

from research.errors import InputError
from research.models.encoders import load_tokenizer
from research.storage.arrays import gather_ragged
from research.storage.cache import Cache
from research.text.batches import BatchLoader, length_batches, padding_ratio
from research.text.tokens import NO_WORD, Tokens, encode, rank_in_row, tokenize
from research.text.words import pair_words
from research_data import load_comments

# Multi-line, emoji with a zero-width joiner, a conjunct with joiner and non-joiner, composed and decomposed letters.
HARD_TEXTS = [
    "খুব ভালো",
    "প্রথম লাইন\nদ্বিতীয়  লাইন\t শেষ",
    "হাসি 👩‍👩‍👧 😀😀 শেষ",
    "র‍্যাব ক\u200cষ শেষ",
    "বা\u09dcি বা\u09a1\u09bcি café cafe\u0301 İstanbul ﬁne",
    "একটি",
    "অনেক লম্বা একটি বাক্য যেখানে শব্দগুলো কাটা পড়ে যায় কারণ জায়গা নেই",
]


@dataclass
class Texts:
    texts: list[str]

    @property
    def text_sha256(self) -> str:
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()

    def iter_texts(self) -> Iterator[str]:
        return iter(self.texts)


def build(kind: str, folder: Path, texts: list[str] = HARD_TEXTS, vocab_size: int = 120, **options: Any) -> Any:
    return TOKENIZERS[kind](texts * 3, folder, vocab_size, **options)


def words_of_rows(tokens: Tokens) -> list[list[int]]:
    assert tokens.words is not None
    return [tokens.words[start:stop].tolist() for start, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("max_length", [6, 64])
def test_ragged_ids_equal_the_tokenizers_own_truncation(kind: str, max_length: int, tmp_path: Path) -> None:
    tokenizer = build(kind, tmp_path / "tokenizer")
    expected = tokenizer(HARD_TEXTS, truncation=True, max_length=max_length)["input_ids"]
    for with_words in (False, True):
        tokens = tokenize(Texts(HARD_TEXTS), tokenizer, max_length, Cache(tmp_path / "cache"), with_words=with_words)
        rows = [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
        assert rows == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_word_of_a_hard_text_is_found_in_order(kind: str, tmp_path: Path) -> None:
    tokens = tokenize(Texts(HARD_TEXTS), build(kind, tmp_path / "t"), 256, Cache(tmp_path / "c"), with_words=True)
    for text, words in zip(HARD_TEXTS, words_of_rows(tokens), strict=True):
        count = len(text.split())
        assert words[0] == 0
        assert words[-1] == count + 1
        assert sorted(set(words)) == list(range(count + 2))
        assert words == sorted(words)


def test_a_word_is_made_of_its_own_characters(tmp_path: Path) -> None:
    tokenizer = build("wordpiece", tmp_path / "t")
    text = "খুব ভালো"
    tokens = tokenize(Texts([text]), tokenizer, 64, Cache(tmp_path / "c"), with_words=True)
    pieces = tokenizer.convert_ids_to_tokens(tokens.ids)
    joined: dict[int, str] = {}
    for piece, word in zip(pieces, words_of_rows(tokens)[0], strict=True):
        joined[word] = joined.get(word, "") + piece.removeprefix("##")
    assert joined == {0: "[CLS]", 1: "খুব", 2: "ভালো", 3: "[SEP]"}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_word_that_max_length_cuts_is_left_out(kind: str, side: str, tmp_path: Path) -> None:
    tokenizer, text = build(kind, tmp_path), HARD_TEXTS[-1]
    tokenizer.truncation_side = side
    whole = encode([text], tokenizer, 256, True)[2].tolist()  # type: ignore[union-attr]
    for max_length in range(2, len(whole) + 2):
        ids, lengths, words = encode([text], tokenizer, max_length, True)
        assert words is not None
        assert ids.tolist() == tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        assert lengths.tolist() == [len(ids)] == [len(words)]
        content, room = whole[1:-1], max_length - 2
        places = range(len(content))
        kept = places[:room] if side == "right" else places[max(0, len(content) - room) :]
        lost = {content[place] for place in places if place not in kept}
        # A byte-level tokenizer may cut inside a character: its word is not whole either.
        expected = [NO_WORD if content[place] in lost else content[place] for place in kept]
        assert words.tolist() == [whole[0], *expected, whole[-1]]


def test_truncation_side_of_a_tokenizer_is_kept_and_part_of_the_key(tmp_path: Path) -> None:
    tokenizer, cache, keys = build("wordpiece", tmp_path / "t"), Cache(tmp_path / "c"), set()
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        tokens = tokenize(Texts(HARD_TEXTS), tokenizer, 6, cache, with_words=False)
        expected = tokenizer(HARD_TEXTS, truncation=True, max_length=6)["input_ids"]
        assert np.split(tokens.ids, tokens.offsets[1:-1])[-1].tolist() == expected[-1]
        keys.add(tokens.key)
    assert len(keys) == 2


def test_tokenizing_leaves_no_truncation_behind(tmp_path: Path) -> None:
    tokenizer = build("wordpiece", tmp_path)
    for with_words in (False, True):
        encode(HARD_TEXTS, tokenizer, 6, with_words)
        assert tokenizer.backend_tokenizer.truncation is None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_token_written_in_a_comment_is_part_of_its_word(kind: str, tmp_path: Path) -> None:
    tokenizer = build(kind, tmp_path)
    text = f"খুব {tokenizer.sep_token} ভালো{tokenizer.cls_token}"
    words = encode([text], tokenizer, 64, True)[2].tolist()  # type: ignore[union-attr]
    assert (words[0], words[-1]) == (0, 4)
    assert sorted(set(words)) == [0, 1, 2, 3, 4]
    assert words == sorted(words)


def test_character_that_a_normaliser_spells_out_stays_in_its_word(tmp_path: Path) -> None:
    texts = ["ক ½… খ", "ﷺ গ"]
    tokenizer = build("unigram", tmp_path, [unicodedata.normalize("NFKC", text) for text in texts] * 9)
    ids, lengths, words = encode(texts, tokenizer, 64, True)
    assert words is not None
    assert len(ids) > sum(map(len, texts))
    first, second = words[: lengths[0]].tolist(), words[lengths[0] :].tolist()
    assert first == sorted(first)
    assert (set(first), set(second)) == ({0, 1, 2, 3, 4}, {0, 1, 2, 3})
    # The second text is cut inside what its first character, a word by itself, was spelt out to.
    cut = encode(texts[1:], tokenizer, 4, True)[2]
    assert cut is not None
    assert cut.tolist() == [0, NO_WORD, NO_WORD, 3]


def test_normalisers_that_change_the_length_do_not_shift_words(tmp_path: Path) -> None:
    plain = build("wordpiece", tmp_path / "a")
    folded = build("wordpiece", tmp_path / "b", lowercase=True, strip_accents=True)
    folded.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), folded.backend_tokenizer.normalizer])
    cache = Cache(tmp_path / "c")
    left = tokenize(Texts(HARD_TEXTS), plain, 256, cache, with_words=True)
    right = tokenize(Texts(HARD_TEXTS), folded, 256, cache, with_words=True)
    assert pair_words(left, right, cache).aligned_share == 1.0


def test_lone_space_tokens_join_the_next_word_and_trailing_ones_none(tmp_path: Path) -> None:
    tokenizer = build("byte_bpe", tmp_path / "t")
    words = words_of_rows(tokenize(Texts(["ক   খ  "]), tokenizer, 64, Cache(tmp_path / "c"), with_words=True))[0]
    assert words[0] == 0
    assert words[-1] == 3
    inside = [word for word in words[1:-1] if word != NO_WORD]
    assert inside == sorted(inside)
    assert set(inside) == {1, 2}


def test_text_that_one_tokenizer_deletes_keeps_its_special_tokens(tmp_path: Path) -> None:
    tokenizer, cache = build("wordpiece", tmp_path / "a"), Cache(tmp_path / "c")
    deleting = build("unigram", tmp_path / "b")
    deleting.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    texts = Texts(["খুব", "ভালো একটি"])
    left = tokenize(texts, tokenizer, 64, cache, with_words=True)
    right = tokenize(texts, deleting, 64, cache, with_words=True)
    pairs = pair_words(left, right, cache)
    student, teacher = (np.split(side, tokens.offsets[1:-1]) for side, tokens in ((pairs.student, left), (pairs.teacher, right)))
    for row in range(2):
        assert (student[row][0], student[row][-1]) == (0, 1)
        assert set(student[row][1:-1]) == {NO_WORD}
        assert sorted(set(teacher[row]) - {NO_WORD}) == [0, 1]


def test_words_of_a_sentence_cut_in_two_ways(tmp_path: Path) -> None:
    pieces = {"teacher": ["তু", "##মি", "খুব", "ভা", "##লো"], "student": ["তুমি", "খু", "##ব", "ভালো"]}
    texts, cache, sides = Texts(["তুমি খুব ভালো", "খুব"]), Cache(tmp_path), {}
    for side, vocabulary in pieces.items():
        tokenizer = build("wordpiece", tmp_path / side)
        ids = {piece: place for place, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary])}
        tokenizer.backend_tokenizer.model = WordPiece(ids, unk_token="[UNK]")
        sides[side] = tokenize(texts, tokenizer, 64, cache, with_words=True)
    pairs = pair_words(sides["student"], sides["teacher"], cache)
    assert pairs.teacher.tolist() == [0, 1, 1, 2, 3, 3, 4, 0, 1, 2]
    assert pairs.student.tolist() == [0, 1, 2, 2, 3, 4, 0, 1, 1, 2]
    assert pairs.aligned_share == 1.0


@pytest.mark.parametrize("other", ["unigram", "byte_bpe"])
def test_paired_words_have_the_same_numbers_on_both_sides(other: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    left = tokenize(Texts(HARD_TEXTS), build("wordpiece", tmp_path / "a"), 12, cache, with_words=True)
    right = tokenize(Texts(HARD_TEXTS), build(other, tmp_path / "b"), 12, cache, with_words=True)
    pairs = pair_words(left, right, cache)
    for row, text in enumerate(HARD_TEXTS):
        student = pairs.student[left.offsets[row] : left.offsets[row + 1]]
        teacher = pairs.teacher[right.offsets[row] : right.offsets[row + 1]]
        shared = sorted(set(student.tolist()) - {NO_WORD})
        assert shared == sorted(set(teacher.tolist()) - {NO_WORD}) == list(range(len(shared)))
        both = set(words_of_rows(left)[row]) & set(words_of_rows(right)[row]) - {NO_WORD}
        assert len(shared) == len(both), text
    assert 0 < pairs.aligned_share < 1


def test_tokenizers_with_the_same_ids_are_recognised(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    first = tokenize(Texts(HARD_TEXTS), build("wordpiece", tmp_path / "a"), 32, cache, with_words=False)
    again = tokenize(Texts(HARD_TEXTS), build("wordpiece", tmp_path / "b"), 32, cache, with_words=False)
    other = tokenize(Texts(HARD_TEXTS), build("unigram", tmp_path / "d"), 32, cache, with_words=False)
    assert first.same_ids(again)
    assert not first.same_ids(other)


def test_an_edited_text_and_another_tokenizer_give_another_entry(tmp_path: Path) -> None:
    cache, tokenizer = Cache(tmp_path / "c"), build("wordpiece", tmp_path / "a")
    keys = {
        tokenize(Texts(texts), chosen, length, cache, with_words=False).key
        for texts, chosen, length in (
            (HARD_TEXTS, tokenizer, 32),
            ([*HARD_TEXTS[:-1], "অন্য"], tokenizer, 32),
            (HARD_TEXTS, build("wordpiece", tmp_path / "b", vocab_size=140), 32),
            (HARD_TEXTS, tokenizer, 33),
        )
    }
    assert len(keys) == 4


def test_slow_tokenizer_is_refused_for_words_only(tmp_path: Path) -> None:
    class Slow:
        name_or_path, is_fast, pad_token_id = "old", False, 0

        def get_vocab(self) -> dict[str, int]:
            return {"a": 1}

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1, 2] for _ in texts]}

    cache = Cache(tmp_path)
    assert tokenize(Texts(["a", "b"]), Slow(), 8, cache, with_words=False).lengths.tolist() == [2, 2]
    with pytest.raises(InputError, match="without character offsets"):
        tokenize(Texts(["a"]), Slow(), 8, cache, with_words=True)


def test_gathered_rows_are_padded_to_their_own_longest_even_when_some_are_empty() -> None:
    flat, offsets = np.arange(10, 16), np.array([0, 2, 2, 5, 6, 6])
    padded, real = gather_ragged(flat, offsets, np.array([4, 2, 0, 1]), -7)
    assert padded.tolist() == [[-7, -7, -7], [12, 13, 14], [10, 11, -7], [-7, -7, -7]]
    assert real.sum(axis=1).tolist() == [0, 3, 2, 0]


def test_rank_counts_within_each_row() -> None:
    chosen = np.array([True, False, True, True, True])
    assert rank_in_row(chosen, np.array([0, 3, 0, 2, 0])).tolist() == [0, 1, 1, 0, 1]


def make_loader(seed: int | None, rows: int = 103) -> BatchLoader:
    generator = np.random.default_rng(3)
    lengths = generator.geometric(0.1, rows)
    tokens = Tokens(
        generator.integers(2, 50, lengths.sum()).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]), None, 1, "key"
    )
    return BatchLoader(np.arange(rows), tokens, np.zeros((rows, 2), dtype=np.float32), 8, seed=seed)


@pytest.mark.parametrize("seed", [None, 7])
def test_an_epoch_holds_every_row_once_unpadded_rows_unchanged(seed: int | None) -> None:
    loader = make_loader(seed)
    seen = []
    for batch in loader.iterate(epoch=2):
        for row, ids, mask in zip(batch["row"], batch["input_ids"], batch["attention_mask"], strict=True):
            start, stop = loader.tokens.offsets[row : row + 2]
            assert ids[mask.bool()].tolist() == loader.tokens.ids[start:stop].tolist()
            assert (ids[~mask.bool()] == 1).all()
            seen.append(int(row))
    assert sorted(seen) == list(range(103))
    assert len(loader) == len(loader.plan(0)) == 13


def test_batches_differ_between_epochs_and_repeat_with_the_seed() -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in make_loader(seed).plan(epoch)]

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1)
    assert plan(1, 0) != plan(2, 0)


def test_skipping_batches_goes_on_where_the_epoch_was() -> None:
    loader = make_loader(5)
    whole = [batch["row"].tolist() for batch in loader.iterate(1)]
    assert [batch["row"].tolist() for batch in loader.iterate(1, skip=4)] == whole[4:]


def test_batches_without_a_seed_go_from_long_to_short() -> None:
    lengths = np.array([3, 9, 1, 7])
    assert [batch.tolist() for batch in length_batches(lengths, 2)] == [[1, 3], [0, 2]]


def test_a_token_budget_ends_a_batch_before_its_padded_tokens_exceed_it() -> None:
    lengths = np.array([3, 9, 1, 7, 2, 3])
    batches = length_batches(lengths, 3, token_budget=8)
    # A row longer than the budget is a batch by itself, and three short rows are all that batch_size allows.
    assert [batch.tolist() for batch in batches] == [[1], [3], [0, 5], [4, 2]]
    assert [len(batch) for batch in length_batches(lengths, 3, token_budget=1000)] == [3, 3]


def test_a_loader_with_a_token_budget_counts_its_batches() -> None:
    loader = make_loader(None)
    loader.token_budget = 40
    assert len(loader) == len(list(loader)) > 13


@requires_shared
def test_padding_on_the_real_comments_is_under_four_percent(tmp_path: Path) -> None:
    comments = load_comments(shared_path("data", "bn_cyberbully5.csv"))
    tokenizer = load_tokenizer(str(shared_path("models", "me5-small-bn")))
    tokens = tokenize(comments, tokenizer, 128, Cache(tmp_path), with_words=False)
    loader = BatchLoader(np.arange(len(comments)), tokens, comments.labels, 32, seed=0)
    assert padding_ratio(loader) <= 1.04
