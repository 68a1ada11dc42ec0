"""The fonts of the figures: looked for, told of when missing, and shaped as the script asks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from research.report import figures, fonts

BANGLA = "ক্ষতি ও হুমকি।"  # ends in a danda, whose Unicode name is Devanagari's
OWN_FONT = fonts.OWN_FONTS[0]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The fonts of a machine where matplotlib's list was written before any other than its own was installed."""
    own = [entry for entry in font_manager.fontManager.ttflist if entry.name == fonts.BASE_FONT]
    files: list[str] = []
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    for cached in (fonts._find_font, fonts._warn_missing_font):
        cached.cache_clear()
    yield files
    fonts._find_font.cache_clear()


def list_files() -> set[str]:
    return {entry.fname for entry in font_manager.fontManager.ttflist}


def test_missing_font_is_named_once(installed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert fonts.find_fonts("\U00010400") == [fonts.BASE_FONT]  # Deseret, which neither of our fonts draws
    assert [record.getMessage() for record in caplog.records] == [
        "plots: no installed font draws Deseret letters; install one, such as 'Noto Sans Deseret'"
    ]


def test_bangla_is_drawn_where_no_font_for_it_is_installed(installed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert fonts.find_fonts(BANGLA) == [fonts.BASE_FONT, "Noto Sans Bengali"]
    assert not caplog.records and str(OWN_FONT) in list_files()
    assert OWN_FONT.with_name("NotoSansBengali-OFL.txt").is_file()


def test_a_font_installed_after_matplotlib_made_its_list_is_found(installed: list[str], tmp_path: Path) -> None:
    broken, font = tmp_path / "NotoSansBroken-Regular.ttf", tmp_path / "Bengali.ttf"
    broken.write_bytes(b"no font")
    shutil.copy(OWN_FONT, font)
    installed += [str(broken), str(font)]
    assert fonts.find_fonts(BANGLA) == [fonts.BASE_FONT, "Noto Sans Bengali"]
    assert str(font) in list_files() and str(OWN_FONT) not in list_files()


def test_latin_labels_look_for_no_font(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: pytest.fail("the machine's fonts were listed"))
    assert fonts.find_fonts("bully, größer") == [fonts.BASE_FONT]


def test_conjuncts_are_one_letter_and_a_short_i_stands_before_its_consonant(installed: list[str]) -> None:
    with figures.figure_style(BANGLA):
        outlines = {
            text: TextPath((0, 0), text, prop=FontProperties(family="Noto Sans Bengali")).vertices
            for text in ("ক", "ষ", "ক্ষ", "কি")
        }
    width = {text: np.ptp(points[:, 0]) for text, points in outlines.items()}
    assert width["ক্ষ"] < 0.8 * (width["ক"] + width["ষ"])  # matplotlib before 3.11 sets one beside the other
    consonant = outlines["ক"]
    shift = outlines["কি"][-len(consonant) :] - consonant  # what is drawn last is the consonant, moved right by the sign
    assert np.allclose(shift, shift[0]) and shift[0, 0] > 0.2 * width["ক"]
