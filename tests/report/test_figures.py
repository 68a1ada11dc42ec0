"""What the figures of a report draw, and in which fonts."""

from __future__ import annotations

import numpy as np
import pytest

from research.report import figures, fonts


def test_thinning_keeps_the_ends_and_moves_no_curve_further_than_can_be_seen() -> None:
    recall = np.linspace(0, 1, 50_001)
    points = np.stack([recall, 1 - recall**2], axis=1)
    thinned = figures.thin_points(points)
    assert len(thinned) < 3_000
    assert (thinned[[0, -1]] == points[[0, -1]]).all()
    assert np.abs(np.interp(recall, thinned[:, 0], thinned[:, 1]) - points[:, 1]).max() < 2e-3
    assert len(figures.thin_points(points[:1])) == 1


def test_missing_font_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    fonts._warn_missing_font.cache_clear()
    for _ in range(2):
        families = fonts.find_fonts("\U00010400")  # Deseret, which no ordinary machine draws
    assert families == ["DejaVu Sans"] or len(families) == 2
    assert len(caplog.records) == (len(families) == 1)
