"""The words of two tokenizers, paired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.texts import HARD_TEXTS, Texts, build_tokenizer, words_of_rows
from tokenizers import Regex, normalizers
from tokenizers.models import WordPiece

from research.storage.cache import Cache
from research.text.tokens import NO_WORD, tokenize
from research.text.words import pair_words


def test_normalisers_that_change_the_length_do_not_shift_words(tmp_path: Path) -> None:
    plain = build_tokenizer("wordpiece", tmp_path / "a")
    folded = build_tokenizer("wordpiece", tmp_path / "b", lowercase=True, strip_accents=True)
    folded.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), folded.backend_tokenizer.normalizer])
    cache = Cache(tmp_path / "c")
    left = tokenize(Texts(HARD_TEXTS), plain, 256, cache, with_words=True)
    right = tokenize(Texts(HARD_TEXTS), folded, 256, cache, with_words=True)
    assert pair_words(left, right, cache).aligned_share == 1.0


def test_text_that_one_tokenizer_deletes_keeps_its_special_tokens(tmp_path: Path) -> None:
    tokenizer, cache = build_tokenizer("wordpiece", tmp_path / "a"), Cache(tmp_path / "c")
    deleting = build_tokenizer("unigram", tmp_path / "b")
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
        tokenizer = build_tokenizer("wordpiece", tmp_path / side)
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
    left = tokenize(Texts(HARD_TEXTS), build_tokenizer("wordpiece", tmp_path / "a"), 12, cache, with_words=True)
    right = tokenize(Texts(HARD_TEXTS), build_tokenizer(other, tmp_path / "b"), 12, cache, with_words=True)
    pairs = pair_words(left, right, cache)
    for row, text in enumerate(HARD_TEXTS):
        student = pairs.student[left.offsets[row] : left.offsets[row + 1]]
        teacher = pairs.teacher[right.offsets[row] : right.offsets[row + 1]]
        shared = sorted(set(student.tolist()) - {NO_WORD})
        assert shared == sorted(set(teacher.tolist()) - {NO_WORD}) == list(range(len(shared)))
        both = set(words_of_rows(left)[row]) & set(words_of_rows(right)[row]) - {NO_WORD}
        assert len(shared) == len(both), text
    assert 0 < pairs.aligned_share < 1
