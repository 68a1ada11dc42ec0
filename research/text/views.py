"""Views of a text: changed forms of it that a reader would mostly take for the same comment.

Each function draws from a generator and returns None when a text is too short for it. Letters and their marks, and
conjuncts, are changed as wholes, so no view holds a broken cluster that its text does not.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from research.text.graphemes import ZERO_WIDTH_JOINER, ZERO_WIDTH_NON_JOINER, is_virama, split_graphemes

MISTYPED_SHARE = 0.08  # of the letters
DROPPED_SHARE = 0.15  # of the words
SWAPPED_SHARE = 0.3  # of the words
MASKED_SHARE = 0.15  # of the words
FEWEST_WORDS = 3
NUKTA = "\u09bc"
NUKTA_BASES = "\u09a1\u09a2\u09af"  # dda, ddha and ya, which with a dot below are other letters
# Bangla letters and vowel signs that sound alike, so that people write one for the other.
SOUNDS = {"\u09bf": "\u09c0", "\u09c1": "\u09c2", "\u09a8": "\u09a3", "\u09b6": "\u09b8", "\u09b7": "\u09b6"}
SOUNDS |= {other: one for one, other in SOUNDS.items() if other not in SOUNDS}
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
KEYS_BESIDE = {
    key: row[max(place - 1, 0) : place] + row[place + 1 : place + 2] for row in KEYBOARD for place, key in enumerate(row)
}


def share_of(share: float, number: int) -> int:
    """Return a share of a number of things, at least one."""
    return max(1, round(share * number))


def mistype(text: str, generator: np.random.Generator) -> str | None:
    """Change some letters as they are mistyped: left out, repeated, changed with the next one, or a variant in their place."""
    clusters = split_graphemes(text)
    letters = [place for place, cluster in enumerate(clusters) if is_letter(cluster)]
    if not letters:
        return None
    chosen = generator.choice(letters, size=share_of(MISTYPED_SHARE, len(letters)), replace=False)
    # From the end, so that the places before stay what they are.
    for place in sorted(chosen.tolist(), reverse=True):
        changes = [change for change in CHANGES if change(clusters, place) is not None]
        change = changes[int(generator.integers(len(changes)))]
        variants = change(clusters, place)
        assert variants is not None
        before, after = variants[int(generator.integers(len(variants)))]
        clusters[place : place + before] = after
    return "".join(clusters)


def is_letter(cluster: str) -> bool:
    """Whether a cluster is a letter with what stands on it."""
    return unicodedata.category(cluster[0])[0] == "L"


# How many clusters go, and what stands in their place.
Change = tuple[int, list[str]]


def leave_out(clusters: Sequence[str], place: int) -> list[Change] | None:
    """Return the change that leaves a letter out, None for the only one of its word."""
    beside = [*clusters[max(place - 1, 0) : place], *clusters[place + 1 : place + 2]]
    return [(1, [])] if any(map(is_letter, beside)) else None


def repeat(clusters: Sequence[str], place: int) -> list[Change]:
    """Return the changes that write a letter twice or three times."""
    return [(1, [clusters[place]] * times) for times in (2, 3)]


def transpose(clusters: Sequence[str], place: int) -> list[Change] | None:
    """Return the change that writes a letter and the next one in the other order."""
    after = clusters[place + 1 : place + 2]
    if not after or not is_letter(after[0]) or after[0] == clusters[place]:
        return None
    return [(2, [after[0], clusters[place]])]


def vary(clusters: Sequence[str], place: int) -> list[Change] | None:
    """Return the changes that write a letter in another way: with the key beside it, with or without nukta or joiners."""
    cluster = clusters[place]
    found = [key.upper() if cluster.isupper() else key for key in KEYS_BESIDE.get(cluster.lower(), "")]
    if cluster[0] in NUKTA_BASES:
        found.append(cluster.replace(NUKTA, "", 1) if NUKTA in cluster else f"{cluster[0]}{NUKTA}{cluster[1:]}")
    found += [cluster.replace(letter, other) for letter, other in SOUNDS.items() if letter in cluster]
    without = cluster.replace(ZERO_WIDTH_JOINER, "").replace(ZERO_WIDTH_NON_JOINER, "")
    if without != cluster:
        found.append(without)
    elif len(joined := [index for index, character in enumerate(cluster[:-1]) if is_virama(character)]):
        found.append(f"{cluster[: joined[0] + 1]}{ZERO_WIDTH_NON_JOINER}{cluster[joined[0] + 1 :]}")
    return [(1, [variant]) for variant in found] or None


CHANGES: tuple[Callable[[Sequence[str], int], list[Change] | None], ...] = (leave_out, repeat, transpose, vary)


def drop_words(text: str, generator: np.random.Generator) -> str | None:
    """Leave some words out."""
    words = text.split()
    if len(words) < FEWEST_WORDS:
        return None
    left_out = generator.choice(len(words), size=share_of(DROPPED_SHARE, len(words)), replace=False)
    return " ".join(word for place, word in enumerate(words) if place not in left_out)


def swap_span(text: str, other: str, generator: np.random.Generator) -> str | None:
    """Put a span of another text's words in the place of a span of this one's, as long where the other has as many."""
    words, others = text.split(), other.split()
    if len(words) < FEWEST_WORDS or not others:
        return None
    length = share_of(SWAPPED_SHARE, len(words))
    start = int(generator.integers(len(words) - length + 1))
    taken = min(length, len(others))
    first = int(generator.integers(len(others) - taken + 1))
    return " ".join([*words[:start], *others[first : first + taken], *words[start + length :]])


def choose_masked(words: Sequence[str], generator: np.random.Generator) -> list[int] | None:
    """Return the places of the words to be filled in, ascending; None for a text of few words."""
    places = [place for place, word in enumerate(words) if any(map(str.isalpha, word))]
    if len(places) < FEWEST_WORDS:
        return None
    chosen: list[int] = generator.choice(places, size=share_of(MASKED_SHARE, len(places)), replace=False).tolist()
    return sorted(chosen)
