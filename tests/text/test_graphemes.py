"""Grapheme clusters are those of Unicode, but for conjuncts, which stay whole in every script."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import requires_shared, shared_path

from research.text.graphemes import split_graphemes


@pytest.mark.parametrize(
    ("text", "clusters"),
    [
        ("স্ত্রী বড়", ["স্ত্রী", " ", "ব", "ড়"]),
        ("ক্\u200dষ ক্\u200cষ", ["ক্\u200dষ", " ", "ক্\u200c", "ষ"]),
        ("e\u0301a", ["e\u0301", "a"]),
        ("👍🏽👩\u200d👧❤️", ["👍🏽", "👩\u200d👧", "❤️"]),
        ("🇧🇩🇮🇳", ["🇧🇩", "🇮🇳"]),
        ("a\r\nb", ["a", "\r\n", "b"]),
        ("\u1112\u1161\u11ab", ["\u1112\u1161\u11ab"]),
        ("", []),
    ],
)
def test_clusters_are_what_a_reader_sees(text: str, clusters: list[str]) -> None:
    assert split_graphemes(text) == clusters


@given(st.text(alphabet="কতষ্\u200c\u200d়ািbé 👍🏽🇧\n"))
def test_clusters_joined_are_the_text(text: str) -> None:
    assert "".join(split_graphemes(text)) == text


@requires_shared
def test_clusters_of_real_comments_are_those_of_another_implementation() -> None:
    regex = pytest.importorskip("regex")
    with shared_path("data", "bn_cyberbully5.csv").open(encoding="utf-8", newline="") as file:
        words = {word for row in csv.DictReader(file) for word in row["comment"].split()}
    other = [word for word in words if split_graphemes(word) != regex.findall(r"\X", word)]
    # A hasanta before a vowel, which nobody writes on purpose.
    assert len(words) > 15_000 and len(other) < 20
