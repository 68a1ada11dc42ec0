"""Fonts that cover the scripts of the labels.

Beside this file stands a Bengali font (NotoSansBengali-OFL.txt says where it is from and how it may be used), so that
figures of Bangla labels need no installed one.
"""

from __future__ import annotations

import functools
import logging
import unicodedata
from pathlib import Path

logger = logging.getLogger(__name__)
BASE_FONT = "DejaVu Sans"  # comes with matplotlib, so it is always there
OWN_FONTS = (Path(__file__).with_name("NotoSansBengali-Regular.ttf"),)
# Fonts with something for every character: boxes, and letters that never join.
STOPGAPS = ("LastResort", "Last Resort", "Unifont")


def find_fonts(text: str) -> list[str]:
    """Return font families that together draw `text`, the base font first.

    Scripts which the base font lacks are looked for among the installed fonts, then among our own. A script that
    none covers is named in one warning, with the font to install; its characters are then drawn as boxes.
    """
    from matplotlib import font_manager

    covered = _covered_characters(font_manager.findfont(BASE_FONT))
    families = [BASE_FONT]
    missing = {ord(char) for char in text if not char.isspace()} - covered
    for script in sorted({_script_of(code) for code in missing}):
        # Bangla ends its sentences with a danda whose name is Devanagari and which its own fonts hold.
        characters = frozenset(code for code in missing - covered if _script_of(code) == script)
        if not characters:
            continue
        font = _find_font(characters)
        if font is None:
            _warn_missing_font(script)
            continue
        family, file = font
        covered |= _covered_characters(file)
        if family not in families:
            families.append(family)
    return families


@functools.lru_cache(maxsize=64)
def _find_font(characters: frozenset[int]) -> tuple[str, str] | None:
    """Return family and file of a font with a glyph for each code point; Noto first, since it has every script."""
    from matplotlib import font_manager

    known = [entry for entry in font_manager.fontManager.ttflist if not _is_stopgap(entry.name)]
    known.sort(key=lambda entry: (not entry.name.startswith("Noto Sans"), entry.name, entry.weight != 400, entry.fname))
    for entry in known:
        if characters <= _covered_characters(entry.fname):
            return entry.name, entry.fname
    return _add_font(characters)


def _add_font(characters: frozenset[int]) -> tuple[str, str] | None:
    """Make a font known to matplotlib that its list lacks: one installed since the list was cached, else our own."""
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    # Regular faces of Noto first: a machine may have thousands of files, and each is opened to see what it covers.
    installed = sorted(
        set(font_manager.findSystemFonts()) - known,
        key=lambda file: (not Path(file).name.startswith("NotoSans"), "Regular" not in file, file),
    )
    for file in (*installed, *map(str, OWN_FONTS)):
        if not characters <= _covered_characters(file):
            continue
        family = font_manager.get_font(file).family_name
        if not _is_stopgap(family):
            font_manager.fontManager.addfont(file)
            return family, file
    return None


def _is_stopgap(family: str) -> bool:
    return any(name in family for name in STOPGAPS)


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
