"""A teacher that was stopped while it labelled goes on where it was, to the bytes of one that was not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fault_injection import flip_byte
from support.labelling import CPU, ROWS, Counting, build_loader, label, label_together, use_small_parts
from support.processes import Ranks

from research.evaluation.predict import predict_logits
from research.kd import labelling
from research.kd.labelling import cut_parts


def expected_bytes() -> bytes:
    loader, buffer = build_loader(), io.BytesIO()
    np.save(buffer, predict_logits(Counting(), loader, CPU, num_rows=ROWS))
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PART_ROWS", "BLOCK_ROWS"):
        monkeypatch.setattr(labelling, name, getattr(labelling, name))  # put back after the test
    use_small_parts()


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


def test_several_processes_go_on_with_what_one_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        label(Counting(7), tmp_path)
    kept = sum(len(np.load(path)) for path in tmp_path.glob("logits/*.work/*.npy"))
    assert Ranks(2, label_together, tmp_path).wait() == [0, 0]
    asked = [int((tmp_path / f"asked_{rank}").read_text()) for rank in range(2)]
    assert sum(asked) == ROWS - kept and min(asked) > 0
    assert next(tmp_path.glob("logits/*/logits.npy")).read_bytes() == expected_bytes()


@given(rows=st.integers(1, 40), seed=st.integers(0, 99), part_rows=st.integers(1, 50))
def test_parts_hold_every_row_once_in_the_batches_of_the_whole(rows: int, seed: int, part_rows: int) -> None:
    loader = build_loader(rows, seed)
    parts = list(cut_parts(loader.plan(epoch=0), part_rows))
    assert all(len(part) >= part_rows for part in parts[:-1])
    assert len({part.stem for part in parts}) == len(parts)
    assert sorted(np.concatenate([part.positions for part in parts])) == list(range(rows))
    of_parts, whole = [batch for part in parts for batch in part.batches], loader.plan(epoch=0)
    assert all(np.array_equal(one, other) for one, other in zip(of_parts, whole, strict=True))
