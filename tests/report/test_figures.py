"""What the figures of a report draw, and in which fonts."""

from __future__ import annotations

import numpy as np

from research.report import figures


def test_thinning_keeps_the_ends_and_moves_no_curve_further_than_can_be_seen() -> None:
    recall = np.linspace(0, 1, 50_001)
    points = np.stack([recall, 1 - recall**2], axis=1)
    thinned = figures.thin_points(points)
    assert len(thinned) < 3_000
    assert (thinned[[0, -1]] == points[[0, -1]]).all()
    assert np.abs(np.interp(recall, thinned[:, 0], thinned[:, 1]) - points[:, 1]).max() < 2e-3
    assert len(figures.thin_points(points[:1])) == 1
