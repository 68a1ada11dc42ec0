"""Warnings about tokenizers and sizes: they come when something is wrong, and only then."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from support.builders import TOKENIZERS, make_texts
from torch import nn

from research.text.diagnostics import TokenizerFit, inspect_tokenizer, report_alignment, report_sizes, report_tokenizer

BANGLA = (*make_texts(40), "খুব ভালো", "তুমি খুব বোকা")
ENGLISH = ("The Cat sat on the Mat", "A Dog and THE Cat", "on the mat")


def test_uncased_tokenizer_that_strips_accents_is_caught_deleting_vowel_signs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = TOKENIZERS["wordpiece"](BANGLA, tmp_path, 200, lowercase=True, strip_accents=True)
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("খুব") == "খব"
    assert inspect_tokenizer(tokenizer, ["খুব"]).lost_share == pytest.approx(1 / 3)
    report_tokenizer("student", tokenizer, BANGLA)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "the student's tokenizer" in warnings[0] and "letters and vowel signs" in warnings[0]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_tokenizer_that_keeps_every_sign_is_not_caught(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TOKENIZERS[kind](BANGLA, tmp_path, 400)
    assert inspect_tokenizer(tokenizer, BANGLA).lost_share == 0
    assert inspect_tokenizer(tokenizer, BANGLA).unknown_share == 0
    report_tokenizer("teacher", tokenizer, BANGLA)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_lower_casing_english_is_no_loss(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["wordpiece"](ENGLISH, tmp_path, 100, lowercase=True)
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("The Cat") == "the cat"
    assert inspect_tokenizer(tokenizer, ENGLISH) == TokenizerFit(pytest.approx(1, abs=1), 0, 0)  # type: ignore[arg-type]


def test_decomposing_is_no_loss(tmp_path: Path) -> None:
    """NFKC, as XLM-R's tokenizer does, splits some composed Bangla letters and keeps all their parts."""
    texts = ["বাড়ি", "আষাঢ়", "যায়"]
    assert inspect_tokenizer(TOKENIZERS["unigram"](texts, tmp_path, 50), texts).lost_share == 0


def test_tokenizer_of_another_script_is_caught_with_unknown_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TOKENIZERS["wordpiece"](ENGLISH, tmp_path, 100)
    assert inspect_tokenizer(tokenizer, ["খুব ভালো"]).unknown_share == 1
    report_tokenizer("teacher", tokenizer, BANGLA)
    assert "of its tokens are unknown" in caplog.text


def test_tokenizer_that_cuts_words_into_bytes_is_caught(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TOKENIZERS["byte_bpe"](ENGLISH, tmp_path, 280)
    texts = ["খুবভালো তুমিকেমন"]
    assert inspect_tokenizer(tokenizer, texts).fertility > 10
    report_tokenizer("teacher", tokenizer, texts)
    assert "it cuts a word into" in caplog.text


@pytest.mark.parametrize(("share", "warned"), [(0.5, True), (0.899, True), (0.9, False), (1.0, False)])
def test_few_comparable_words_are_a_warning(share: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    report_alignment(share)
    assert any(record.levelno == logging.WARNING for record in caplog.records) == warned


@pytest.mark.parametrize(("teacher", "warned"), [(11, True), (12, True), (13, False)])
def test_student_that_is_not_smaller_is_a_warning(teacher: int, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    report_sizes(teacher, nn.Linear(3, 3))
    assert ("nothing is compressed" in caplog.text) == warned
