"""Fonts that cover the scripts of the labels."""

from __future__ import annotations

import functools
import logging
import unicodedata

logger = logging.getLogger(__name__)
BASE_FONT = "DejaVu Sans"  # comes with matplotlib, so it is always there


def find_fonts(text: str) -> list[str]:
    """Return font families that together draw `text`, the base font first.

    Scripts which the base font lacks are looked for among the installed fonts. A script that none covers
    is named in one warning, with the font to install; its characters are then drawn as boxes.
    """
    from matplotlib import font_manager

    base = _covered_characters(font_manager.findfont(BASE_FONT))
    missing = {ord(char) for char in text if ord(char) not in base and not char.isspace()}
    families = [BASE_FONT]
    for script in sorted({_script_of(code) for code in missing}):
        characters = frozenset(code for code in missing if _script_of(code) == script)
        family = _find_font(characters)
        if family is None:
            _warn_missing_font(script)
        elif family not in families:
            families.append(family)
    return families


@functools.lru_cache(maxsize=64)
def _find_font(characters: frozenset[int]) -> str | None:
    """Return an installed family with a glyph for each code point; Noto first, since it has every script."""
    from matplotlib import font_manager

    # The "Last Resort" font has a box for every character, which is what we want to avoid.
    entries = [entry for entry in font_manager.fontManager.ttflist if "Last Resort" not in entry.name]
    entries.sort(
        key=lambda entry: (
            not entry.name.startswith("Noto Sans"),
            entry.name,
            entry.weight != 400,
            entry.fname,
        )
    )
    for entry in entries:
        if characters <= _covered_characters(entry.fname):
            return entry.name
    return None


@functools.lru_cache(maxsize=2048)
def _covered_characters(font_file: str) -> frozenset[int]:
    from matplotlib import font_manager

    try:
        return frozenset(font_manager.get_font(font_file).get_charmap())
    except (OSError, RuntimeError):  # matplotlib lists fonts that FreeType then cannot read
        return frozenset()


def _script_of(code: int) -> str:
    """Return the first word of the character's Unicode name, which is its script for letters."""
    return unicodedata.name(chr(code), "SYMBOLS").split()[0]


@functools.cache
def _warn_missing_font(script: str) -> None:
    east_asian = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
    family = "Noto Sans CJK" if script in east_asian else f"Noto Sans {script.title()}"
    logger.warning("plots: no installed font draws %s letters; install one, such as '%s'", script.title(), family)
