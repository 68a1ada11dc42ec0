"""A teacher that was stopped while it labelled goes on where it was, to the bytes of one that was not."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fault_injection import flip_byte
from torch import Tensor, nn

from research.distributed import ALONE
from research.evaluation.predict import predict_logits
from research.kd import labelling
from research.kd.labelling import cut_parts
from research.kd.teacher import Teacher, fetch_logits
from research.models.classifiers import NO_LAYERS
from research.storage.cache import Cache
from research.text.batches import BatchLoader
from research.text.tokens import Tokens

ROWS, CPU = 60, torch.device("cpu")


def build_loader(rows: int = ROWS, seed: int = 0) -> BatchLoader:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 9, 2 * rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Tokens(generator.integers(1, 50, lengths.sum()).astype(np.int32), offsets, None, pad_id=0, key=f"{rows} {seed}")
    asked = generator.permutation(2 * rows)[:rows]
    return BatchLoader(asked, tokens, np.zeros((2 * rows, 1), np.float32), 1024, token_budget=24)


class Counting(nn.Module):
    """Logits that differ with the batch a row is in, so that other batches would show; stops after so many calls."""

    def __init__(self, calls_left: int = 1000) -> None:
        super().__init__()
        self.calls_left, self.rows = calls_left, 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        if not self.calls_left:
            raise KeyboardInterrupt
        self.calls_left -= 1
        self.rows += len(input_ids)
        total = (input_ids * attention_mask).sum(dim=1).float()
        return {"logits": torch.stack([total, total + total.mean(), total.cumsum(0)], dim=1)}


def label(model: nn.Module, cache: Path) -> Path:
    """Return the file that the cache has of the logits."""
    teacher = Teacher({"name": "counting"}, NO_LAYERS, lambda: model, lambda _: None, {}, 0)  # type: ignore[arg-type, return-value]
    fetch_logits(teacher, build_loader(), CPU, Cache(cache))
    return next(cache.glob("logits/*/logits.npy"))


def expected_bytes() -> bytes:
    loader, buffer = build_loader(), io.BytesIO()
    np.save(buffer, predict_logits(Counting(), loader, CPU, num_rows=ROWS))
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "PART_ROWS", 10)
    monkeypatch.setattr(labelling, "BLOCK_ROWS", 16)


def test_logits_in_parts_are_the_bytes_of_all_at_once(tmp_path: Path) -> None:
    model = Counting()
    assert label(model, tmp_path).read_bytes() == expected_bytes()
    assert model.rows == ROWS
    assert not list(tmp_path.glob("logits/*.work"))


@pytest.mark.parametrize("calls", [0, 1, 7, 11])
def test_stopped_labelling_goes_on_to_the_same_bytes_and_asks_no_row_of_a_finished_part_again(calls: int, tmp_path: Path) -> None:
    first, second = Counting(calls), Counting()
    with pytest.raises(KeyboardInterrupt):
        label(first, tmp_path)
    kept = sum(len(np.load(path)) for path in tmp_path.glob("logits/*.work/*.npy"))
    assert kept <= first.rows
    if calls >= 7:
        assert kept >= 10
    assert label(second, tmp_path).read_bytes() == expected_bytes()
    assert second.rows == ROWS - kept


def test_part_that_was_damaged_is_computed_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        label(Counting(11), tmp_path)
    parts = sorted(tmp_path.glob("logits/*.work/*.npy"))
    damaged = len(np.load(parts[0]))
    left = ROWS - sum(len(np.load(path)) for path in parts)
    flip_byte(parts[0])
    model = Counting()
    assert label(model, tmp_path).read_bytes() == expected_bytes()
    assert model.rows == left + damaged


@given(rows=st.integers(1, 40), seed=st.integers(0, 99), part_rows=st.integers(1, 50))
def test_parts_hold_every_row_once_in_the_batches_of_the_whole(rows: int, seed: int, part_rows: int) -> None:
    loader = build_loader(rows, seed)
    parts = list(cut_parts(loader.plan(epoch=0), part_rows))
    assert all(len(part.positions) >= part_rows for part in parts[:-1])
    assert sorted(np.concatenate([part.positions for part in parts])) == list(range(rows))
    of_parts: list[Any] = [part.positions[batch] for part in parts for batch in loader.take(part.positions).plan(epoch=0)]
    whole = loader.plan(epoch=0)
    assert len(of_parts) == len(whole)
    assert all(np.array_equal(one, other) for one, other in zip(of_parts, whole, strict=True))
    assert loader.take(parts[0].positions).world is ALONE
