"""The characters that a reader sees: letters with their marks, conjuncts, emoji sequences."""

from __future__ import annotations

import unicodedata

ZERO_WIDTH_NON_JOINER, ZERO_WIDTH_JOINER = "\u200c", "\u200d"
VIRAMA_CLASS = 9  # canonical combining class of the signs that join consonants, as hasanta (U+09CD) does


def is_virama(character: str) -> bool:
    """Whether a character joins the consonants around it."""
    return unicodedata.combining(character) == VIRAMA_CLASS


def split_graphemes(text: str) -> list[str]:
    """Split a text into extended grapheme clusters; joined, they are the text.

    By the rules of Unicode Standard Annex 29 that occur in normalised text, but that a virama joins the letter after it in
    every script, where the annex names six.
    """
    clusters: list[str] = []
    for character in text:
        if clusters and _goes_on(clusters[-1], character):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _goes_on(cluster: str, character: str) -> bool:
    """Whether a character belongs to the cluster before it."""
    last, category = cluster[-1], unicodedata.category(character)
    if unicodedata.category(last) in ("Cc", "Zl", "Zp"):
        return cluster == "\r" and character == "\n"
    if category[0] == "M" or character in (ZERO_WIDTH_NON_JOINER, ZERO_WIDTH_JOINER) or "\U0001f3fb" <= character <= "\U0001f3ff":
        return True
    if category == "Lo" and (is_virama(last) or (last == ZERO_WIDTH_JOINER and len(cluster) > 1 and is_virama(cluster[-2]))):
        return True
    if last == ZERO_WIDTH_JOINER and category == "So":
        return unicodedata.category(cluster[0]) == "So"
    if _is_flag_letter(character):
        return all(map(_is_flag_letter, cluster)) and len(cluster) == 1
    return _is_jamo(last) and _is_jamo(character)


def _is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _is_jamo(character: str) -> bool:
    return "\u1100" <= character <= "\u11ff"
