"""The files of a run: JSON and CSV, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from research.errors import InputError
from research.runs.formats import read_csv, write_json_atomic, write_text_atomic


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_text_atomic(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_plain_rounded_and_sorted(tmp_path: Path) -> None:
    value = {
        "b": float("nan"),
        "a": (np.float32(0.1), np.int64(3), np.array([1e-9, -1e-9])),
        "ক": np.bool_(True),
    }
    write_json_atomic(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [0.1, 3, [0.0, 0.0]], "b": None, "ক": True}
    assert text.index('"a"') < text.index('"b"') < text.index('"ক"') and "-0.0" not in text and text.endswith("}\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("history.csv", "epoch,total_loss\n1,0.5"),
        ("history.csv", "epoch,total_loss\n1\n"),
        ("history.csv", "epoch\nx\n"),
    ],
)
def test_half_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=name):
        read_csv(tmp_path / name)
