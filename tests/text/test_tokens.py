"""Ragged token ids, and the word each of them belongs to."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import TOKENIZERS
from support.texts import HARD_TEXTS, Texts, build_tokenizer, words_of_rows

from research.errors import InputError
from research.storage.cache import Cache
from research.text.tokens import NO_WORD, encode, rank_in_row, tokenize


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("max_length", [6, 64])
def test_ragged_ids_equal_the_tokenizers_own_truncation(kind: str, max_length: int, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(kind, tmp_path / "tokenizer")
    expected = tokenizer(HARD_TEXTS, truncation=True, max_length=max_length)["input_ids"]
    for with_words in (False, True):
        tokens = tokenize(Texts(HARD_TEXTS), tokenizer, max_length, Cache(tmp_path / "cache"), with_words=with_words)
        rows = [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
        assert rows == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_word_of_a_hard_text_is_found_in_order(kind: str, tmp_path: Path) -> None:
    tokens = tokenize(Texts(HARD_TEXTS), build_tokenizer(kind, tmp_path / "t"), 256, Cache(tmp_path / "c"), with_words=True)
    for text, words in zip(HARD_TEXTS, words_of_rows(tokens), strict=True):
        count = len(text.split())
        assert words[0] == 0
        assert words[-1] == count + 1
        assert sorted(set(words)) == list(range(count + 2))
        assert words == sorted(words)


def test_a_word_is_made_of_its_own_characters(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("wordpiece", tmp_path / "t")
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
    tokenizer, text = build_tokenizer(kind, tmp_path), HARD_TEXTS[-1]
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
    tokenizer, cache, keys = build_tokenizer("wordpiece", tmp_path / "t"), Cache(tmp_path / "c"), set()
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        tokens = tokenize(Texts(HARD_TEXTS), tokenizer, 6, cache, with_words=False)
        expected = tokenizer(HARD_TEXTS, truncation=True, max_length=6)["input_ids"]
        assert np.split(tokens.ids, tokens.offsets[1:-1])[-1].tolist() == expected[-1]
        keys.add(tokens.key)
    assert len(keys) == 2


def test_tokenizing_leaves_no_truncation_behind(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("wordpiece", tmp_path)
    for with_words in (False, True):
        encode(HARD_TEXTS, tokenizer, 6, with_words)
        assert tokenizer.backend_tokenizer.truncation is None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_token_written_in_a_comment_is_part_of_its_word(kind: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(kind, tmp_path)
    text = f"খুব {tokenizer.sep_token} ভালো{tokenizer.cls_token}"
    words = encode([text], tokenizer, 64, True)[2].tolist()  # type: ignore[union-attr]
    assert (words[0], words[-1]) == (0, 4)
    assert sorted(set(words)) == [0, 1, 2, 3, 4]
    assert words == sorted(words)


def test_character_that_a_normaliser_spells_out_stays_in_its_word(tmp_path: Path) -> None:
    texts = ["ক ½… খ", "ﷺ গ"]
    tokenizer = build_tokenizer("unigram", tmp_path, [unicodedata.normalize("NFKC", text) for text in texts] * 9)
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


def test_lone_space_tokens_join_the_next_word_and_trailing_ones_none(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("byte_bpe", tmp_path / "t")
    words = words_of_rows(tokenize(Texts(["ক   খ  "]), tokenizer, 64, Cache(tmp_path / "c"), with_words=True))[0]
    assert words[0] == 0
    assert words[-1] == 3
    inside = [word for word in words[1:-1] if word != NO_WORD]
    assert inside == sorted(inside)
    assert set(inside) == {1, 2}


def test_tokenizers_with_the_same_ids_are_recognised(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    first = tokenize(Texts(HARD_TEXTS), build_tokenizer("wordpiece", tmp_path / "a"), 32, cache, with_words=False)
    again = tokenize(Texts(HARD_TEXTS), build_tokenizer("wordpiece", tmp_path / "b"), 32, cache, with_words=False)
    other = tokenize(Texts(HARD_TEXTS), build_tokenizer("unigram", tmp_path / "d"), 32, cache, with_words=False)
    assert first.same_ids(again)
    assert not first.same_ids(other)


def test_an_edited_text_and_another_tokenizer_give_another_entry(tmp_path: Path) -> None:
    cache, tokenizer = Cache(tmp_path / "c"), build_tokenizer("wordpiece", tmp_path / "a")
    keys = {
        tokenize(Texts(texts), chosen, length, cache, with_words=False).key
        for texts, chosen, length in (
            (HARD_TEXTS, tokenizer, 32),
            ([*HARD_TEXTS[:-1], "অন্য"], tokenizer, 32),
            (HARD_TEXTS, build_tokenizer("wordpiece", tmp_path / "b", vocab_size=140), 32),
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


def test_rank_counts_within_each_row() -> None:
    chosen = np.array([True, False, True, True, True])
    assert rank_in_row(chosen, np.array([0, 3, 0, 2, 0])).tolist() == [0, 1, 1, 0, 1]
