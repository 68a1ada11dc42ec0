"""What the figures of a report draw, and in which fonts."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from research.report import figures


def test_thinning_keeps_the_ends_and_moves_no_curve_further_than_can_be_seen() -> None:
    recall = np.linspace(0, 1, 50_001)
    points = np.stack([recall, 1 - recall**2], axis=1)
    thinned = figures.thin_points(points)
    assert len(thinned) < 3_000
    assert (thinned[[0, -1]] == points[[0, -1]]).all()
    assert np.abs(np.interp(recall, thinned[:, 0], thinned[:, 1]) - points[:, 1]).max() < 2e-3
    assert len(figures.thin_points(points[:1])) == 1


def test_label_bars_carry_their_intervals_and_the_value_stands_past_them(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, target: drawn.append(figure))
    scores: dict[str, dict[str, float | None]] = {
        "teacher": {"bully": 0.8, "threat": None},
        "student": {"bully": 0.7, "threat": 0.4},
    }
    figures.plot_label_f1(scores, io.BytesIO(), {"student": {"bully": (0.6, 0.85), "threat": None}})
    axes = drawn[0].axes[0]
    ends = {tuple(segment[:, 0]) for lines in axes.collections for segment in lines.get_segments()}
    assert ends == {(0.6, 0.85)} and axes.get_xlabel() == "F1 on the test part and its 95 % interval"
    places = {text.get_text(): round(text.get_position()[0], 2) for text in axes.texts}
    assert places == {"0.80": 0.81, "undefined": 0.01, "0.70": 0.86, "0.40": 0.41}
    figures.plot_label_f1(scores, io.BytesIO())
    assert drawn[1].axes[0].get_xlabel() == "F1 on the test part (0 to 1)"


@pytest.mark.parametrize(("best_epoch", "name"), [(2, "best epoch: the last"), (1, "best epoch")])
def test_curves_say_when_the_best_epoch_is_the_last(monkeypatch: pytest.MonkeyPatch, best_epoch: int, name: str) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, target: drawn.append(figure))
    history = [{"epoch": epoch, "total_loss": 0.5, "val_f1_macro": 0.1 * epoch} for epoch in (1, 2)]
    figures.plot_training(history, io.BytesIO(), best_epoch)
    assert name in [text.get_text() for text in drawn[0].axes[1].get_legend().get_texts()]
