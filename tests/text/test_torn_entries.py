"""Token and word entries whose files do not fit each other are made again, and a full disk leaves none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import TOKENIZERS, make_texts
from support.fault_injection import file_size_limit, tear

from research.storage.cache import Cache
from research.text.tokens import Tokens, tokenize
from research.text.words import pair_words

TEXTS = make_texts(40)


class Source:
    """The texts, with the hash that names them."""

    text_sha256 = "of the texts"

    def __len__(self) -> int:
        return len(TEXTS)

    def iter_texts(self) -> Iterator[str]:
        return iter(TEXTS)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return [TOKENIZERS[kind](TEXTS, folder / kind, 120) for kind in ("wordpiece", "unigram")]


def build_tokens(tokenizer: Any, cache: Cache) -> Tokens:
    return tokenize(Source(), tokenizer, 24, cache, with_words=True)


def build_arrays(tokenizers: list[Any], cache: Cache) -> list[np.ndarray]:
    """Return copies of everything that is kept of the tokens of two tokenizers and the words they share."""
    left, right = (build_tokens(tokenizer, cache) for tokenizer in tokenizers)
    pairs = pair_words(left, right, cache)
    assert left.words is not None and right.words is not None
    arrays = [left.ids, left.offsets, left.words, right.ids, right.offsets, right.words, pairs.student, pairs.teacher]
    return [np.array(array) for array in [*arrays, np.array(pairs.aligned_share)]]


@pytest.mark.parametrize("name", ["ids.bin", "offsets.bin", "words.bin", "student.bin", "teacher.bin", "share.json"])
def test_torn_file_with_a_manifest_of_its_own_is_made_again(
    tmp_path: Path, tokenizers: list[Any], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    whole = build_arrays(tokenizers, Cache(tmp_path))
    tear(next(tmp_path.glob(f"*/*/{name}")))
    for left, right in zip(whole, build_arrays(tokenizers, Cache(tmp_path)), strict=True):
        np.testing.assert_array_equal(left, right)
    assert caplog.text.count("is damaged") == 1


def largest_file(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.glob("*/*.bin"))


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def test_last_bytes_of_tokens_that_do_not_fit_on_the_disk_are_an_error(tmp_path: Path, tokenizers: list[Any]) -> None:
    build_tokens(tokenizers[0], Cache(tmp_path / "cache"))
    room = largest_file(tmp_path / "cache" / "tokens") - 1
    with pytest.raises(OSError, match="File too large"), file_size_limit(room):
        build_tokens(tokenizers[0], Cache(tmp_path / "full"))
    assert entries(tmp_path / "full" / "tokens") == []


def test_last_bytes_of_words_that_do_not_fit_on_the_disk_are_an_error(tmp_path: Path, tokenizers: list[Any]) -> None:
    left, right = (build_tokens(tokenizer, Cache(tmp_path / "cache")) for tokenizer in tokenizers)
    pair_words(left, right, Cache(tmp_path / "cache"))
    room = largest_file(tmp_path / "cache" / "words") - 1
    with pytest.raises(OSError, match="File too large"), file_size_limit(room):
        pair_words(left, right, Cache(tmp_path / "full"))
    assert entries(tmp_path / "full" / "words") == []
