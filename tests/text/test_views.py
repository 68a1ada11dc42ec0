"""Views are changed forms of a text, drawn from a generator, without broken clusters."""

from __future__ import annotations

import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import make_texts

from research.text.graphemes import split_graphemes
from research.text.views import CHANGES, choose_masked, drop_words, is_letter, mistype, swap_span, vary

BANGLA = "আমি বড় যুক্তি দিয়ে স্ত্রীকে বললাম"


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def orphans(text: str) -> int:
    """Return how many marks and joiners stand on nothing."""
    return sum(
        unicodedata.category(character)[0] == "M" and (place == 0 or unicodedata.category(text[place - 1])[0] not in "LMC")
        for place, character in enumerate(text)
    )


@given(st.lists(st.sampled_from(["ক্ষ", "ড়", "য়ে", "স্ত্রী", "শি", "ka", "é", "ক্\u200dষ", "ন্"]), min_size=1), st.integers(0, 1000))
def test_mistyping_breaks_no_cluster(parts: list[str], seed: int) -> None:
    text = unicodedata.normalize("NFC", " ".join(parts) + "".join(parts))
    view = mistype(text, generator(seed))
    assert view is not None and orphans(text) == 0
    assert orphans(view) == 0
    assert view.count(" ") == text.count(" ")


def test_mistyping_changes_few_letters_in_every_way() -> None:
    views = {mistype(BANGLA, generator(seed)) for seed in range(200)}
    assert len(views) > 50 and mistype(BANGLA, generator(3)) == mistype(BANGLA, generator(3))
    before = Counter(split_graphemes(BANGLA))
    kinds = Counter[str]()
    for view in views:
        assert view is not None
        after = Counter(split_graphemes(view))
        fewer, more = (before - after).total(), (after - before).total()
        assert fewer <= 2 * 2 and more <= 4 + 2
        order = "transposed" if fewer == more == 0 else "other"
        kinds["shorter" if fewer > more else "longer" if more > fewer else order] += 1
    assert set(kinds) == {"transposed", "shorter", "longer", "other"}


@pytest.mark.parametrize(
    ("cluster", "variants"),
    [
        ("ড়", {"ড"}),
        ("যে", {"য়ে"}),
        ("নি", {"ণি", "নী"}),
        ("ক্ত", {"ক্\u200cত"}),
        ("ক্\u200dষ", {"ক্\u200dশ", "ক্ষ"}),
        ("s", {"a", "d"}),
        ("Q", {"W"}),
        ("মা", set()),
    ],
)
def test_variants_are_how_people_write_a_letter(cluster: str, variants: set[str]) -> None:
    cluster, wanted = unicodedata.normalize("NFC", cluster), {unicodedata.normalize("NFC", variant) for variant in variants}
    found = vary([cluster], 0) or []
    assert {"".join(after) for _, after in found} == wanted
    assert all(len(list(filter(is_letter, split_graphemes("".join(after))))) >= 1 for _, after in found)


def test_every_letter_can_be_changed_and_nothing_else_is() -> None:
    assert mistype("১২ 😂 !!", generator(0)) is None
    assert mistype("", generator(0)) is None
    clusters = split_graphemes("ক")
    assert [change(clusters, 0) is not None for change in CHANGES] == [False, True, False, False]


def test_dropped_words_leave_the_others_in_their_order() -> None:
    words = [str(number) for number in range(20)]
    for seed in range(20):
        view = drop_words(" ".join(words), generator(seed))
        assert view is not None
        left = view.split()
        assert left == sorted(left, key=int) and len(left) == 17
    assert drop_words("a b", generator(0)) is None


def test_a_span_is_swapped_with_one_of_the_other_text() -> None:
    words, others = [f"a{number}" for number in range(10)], [f"b{number}" for number in range(6)]
    for seed in range(20):
        view = swap_span(" ".join(words), " ".join(others), generator(seed))
        assert view is not None
        made = view.split()
        start = next(place for place, word in enumerate(made) if word in others)
        first = others.index(made[start])
        assert made[start : start + 3] == others[first : first + 3]
        assert made[:start] + made[start + 3 :] == words[:start] + words[start + 3 :]
    assert swap_span("a b c", "", generator(0)) is swap_span("a b", "c d", generator(0)) is None
    assert len((swap_span(" ".join(words), "b0", generator(0)) or "").split()) == 8


def test_masked_words_are_words() -> None:
    for text in make_texts(30):
        words = text.split()
        places = choose_masked(words, generator(1))
        if places is not None:
            assert places == sorted(set(places)) and all(not words[place].isdigit() for place in places)
    assert choose_masked(["কেন", "১", "২", "😂"], generator(0)) is None
