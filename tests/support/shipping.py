"""A small run, tables of texts, and a classifier without weights that counts what it is asked and may be stopped."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import research_main
from research.shipping.scorers import Scorer
from research.text.tables import read_rows
from support.builders import QUICK_EXTRAS, build_model_folder, make_table, make_texts

Exported = Callable[[Path, str, bool], Path]  # builds a classifier of an architecture, with its own head or ours


def train_student(root: Path) -> Path:
    """Do a run of a student on 120 rows, whose text vector is the mean of its tokens, below a folder; return its directory."""
    table = make_table(root / "table.csv", rows=120)
    build_model_folder("bert", "wordpiece", root / "encoder", make_texts(120), layers=2, width=32)
    flags = ["--pipeline", "student_only", "--dataset_path", str(table), "--student_path", str(root / "encoder")]
    flags += ["--pooling", "mean", "--max_length", "16", "--epochs", "3", "--lr", "5e-3", "--num_threads", "1"]
    flags += ["--output_dir", str(root / "run"), "--cache_dir", str(root / "cache")]
    assert research_main.main(flags, QUICK_EXTRAS) == 0
    return root / "run"


def write_texts(path: Path, texts: Sequence[str], **columns: Sequence[object]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *columns])
        writer.writerows(zip(texts, *columns.values(), strict=True))
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    return [row for _, row in read_rows(path)]


def counting_scorer(calls: list[int], fail_after: int | None = None) -> Scorer:
    """A classifier without weights: logits are sums over a text's characters; it counts its rows and may be stopped."""

    def classify(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if fail_after is not None and sum(calls) >= fail_after:
            raise KeyboardInterrupt
        calls.append(len(ids))
        values = (ids * mask).sum(axis=1)
        return np.stack([values % 7 - 3, values % 5 - 2], axis=1).astype(np.float32)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [[ord(char) for char in text[:16]] for text in texts]
        return np.array(sum(rows, []), dtype=np.int32), np.array([len(row) for row in rows])

    return Scorer(classify, encode, ("a", "b"), np.array([0.5, 0.4]), 16, "nfc", 0, 8, {"name": "counting"})
