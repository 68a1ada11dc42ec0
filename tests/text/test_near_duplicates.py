"""Near-duplicates are found exactly: by brute force over sets of 5-grams, on generated and on real texts."""

from __future__ import annotations

import csv
import random

import numpy as np
import pytest
from support.builders import requires_shared, shared_path

from research.text import near_duplicates
from research.text.near_duplicates import NearDuplicates, reduce_to_letters


def grams_of(text: str) -> frozenset[str]:
    key = reduce_to_letters(text)
    return frozenset(key[place : place + 5] for place in range(max(len(key) - 4, 1))) if key else frozenset()


def find_by_brute_force(texts: list[str], others: list[str]) -> list[bool]:
    held = [grams for grams in map(grams_of, others) if grams]

    def is_near(grams: frozenset[str]) -> bool:
        return any(len(grams & other) / len(grams | other) >= 0.8 for other in held if grams)

    return [is_near(grams_of(text)) for text in texts]


def make_family(texts: int, seed: int) -> list[str]:
    """Return texts of few words of few letters, with so many changes that some are near others and some hardly not."""
    generator = random.Random(0)
    stock = ["".join(generator.choices("abcdefg", k=generator.randint(1, 9))) for _ in range(40)]
    bases = [generator.choices(stock, k=generator.randint(1, 30)) for _ in range(25)]
    family = []
    generator = random.Random(seed)
    for _ in range(texts):
        words = list(generator.choice(bases))
        for _ in range(generator.randint(0, 3)):
            words[generator.randrange(len(words))] = generator.choice(stock)
        family.append(" ".join(words))
    return family


@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_is_what_brute_force_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that texts and pairs of texts come in many pieces.
    monkeypatch.setattr(near_duplicates, "CHUNK_TEXTS", 64)
    monkeypatch.setattr(near_duplicates, "PAIRS_AT_ONCE", 500)
    others, texts = make_family(150, seed), make_family(300, seed + 100)
    wanted = find_by_brute_force(texts, others)
    assert 30 < sum(wanted) < 270
    assert NearDuplicates(others).find(texts).tolist() == wanted


@requires_shared
def test_on_real_comments_too() -> None:
    with shared_path("data", "bn_cyberbully5.csv").open(encoding="utf-8", newline="") as file:
        comments = [row["comment"] for row in csv.DictReader(file)]
    chosen = np.random.default_rng(1).permutation(len(comments))[:2500].tolist()
    others, texts = [[comments[row] for row in rows] for rows in (chosen[:1000], chosen[1000:])]
    wanted = find_by_brute_force(texts, others)
    assert sum(wanted) > 50
    assert NearDuplicates(others).find(texts).tolist() == wanted


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("So   COOOOL!!! 100% 😂👍🏽❤️", "socol"),
        ("ভা\u200cলো   লাগলো।। ১২৩", "ভালোলাগলো"),
        ("Straße ＡＢＣ", "strasseabc".replace("ss", "s")),
        ("1️⃣ 😂 ...", ""),
    ],
)
def test_only_letters_count_and_repeated_ones_once(text: str, key: str) -> None:
    assert reduce_to_letters(text) == key


def test_short_texts_are_near_when_their_letters_are_the_same_and_texts_without_letters_never() -> None:
    held = NearDuplicates(["ok", "😂", "না"])
    assert held.find(["OK!!", "o k 1", "oh", "😂", "🙏", "না...", ""]).tolist() == [True, True, False, False, False, True, False]
    assert NearDuplicates([]).find(["any text"]).tolist() == [False]
    assert NearDuplicates(["😂"]).find(["any text"]).tolist() == [False]
    assert held.find([]).tolist() == []
