"""Texts that tokenizers find hard, and tokenizers for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.text.tokens import Tokens
from support.builders import TOKENIZERS

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

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def text_sha256(self) -> str:
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()

    def iter_texts(self) -> Iterator[str]:
        return iter(self.texts)


def build_tokenizer(kind: str, folder: Path, texts: list[str] = HARD_TEXTS, vocab_size: int = 120, **options: Any) -> Any:
    return TOKENIZERS[kind](texts * 3, folder, vocab_size, **options)


def words_of_rows(tokens: Tokens) -> list[list[int]]:
    assert tokens.words is not None
    return [tokens.words[start:stop].tolist() for start, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
