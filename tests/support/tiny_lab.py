"""A folder with a table and tiny models, in which runs are done in this process."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import research_main
from support.builders import QUICK_EXTRAS, build_model_folder, make_table, make_texts

QUICK = (
    "--teacher_path models/teacher --student_path models/student --lr 1e-3 --teacher_epochs 1 --epochs 2 --batch 16 "
    "--max_length 32 --student_hidden_size 8 --allow_weak_teacher --num_threads 1"
)
REPEATED = ("metrics.json", "history.csv", "predictions.csv", "validation_predictions.csv")
ROWS = 80


@dataclass
class TinyLab:
    """Runs QUICK commands below its folder; `capture` returns what was printed since the last time."""

    folder: Path
    capture: Callable[[], tuple[str, str]]

    def run(self, flags: str) -> tuple[int, str]:
        """Run one command; return its status and stderr."""
        self.capture()
        status = research_main.main(f"{QUICK} {flags}".split(), QUICK_EXTRAS)
        errors = self.capture()[1]
        assert "Traceback" not in errors
        return status, errors

    def done(self, name: str, flags: str = "") -> Path:
        """Run a command that has to succeed, in results/<name>."""
        status, errors = self.run(f"{flags} --output_dir results/{name}")
        assert status == 0, errors
        return self.folder / "results" / name

    def refused(self, flags: str) -> str:
        """Run a command that has to be refused before anything is written; return its one error line."""
        status, errors = self.run(f"{flags} --output_dir results/refused")
        lines = [line for line in errors.splitlines() if line.startswith("error:")]
        assert (status, len(lines)) == (2, 1), errors
        assert not (self.folder / "results" / "refused").exists()
        return lines[0]

    def entries(self, kind: str) -> set[str]:
        """Return the names of the cache's entries of a kind."""
        return {path.name for path in (self.folder / "cache" / kind).iterdir() if path.is_dir()}


def build_materials(folder: Path) -> Path:
    """Make a table, and a teacher and a student with two tokenizers."""
    make_table(folder / "data" / "comments.csv", rows=ROWS)
    texts = make_texts(ROWS)
    build_model_folder("electra", "wordpiece", folder / "models" / "teacher", texts, layers=3, width=24, seed=1)
    build_model_folder("distilbert", "unigram", folder / "models" / "student", texts, layers=2, width=16, seed=2)
    return folder


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: Iterable[Sequence[object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def columns_of(path: Path, prefix: str) -> np.ndarray:
    """Return the columns of a table of numbers whose name begins with a prefix, (N, C)."""
    return np.array([[float(cell) for name, cell in row.items() if name.startswith(prefix)] for row in read_table(path)])


def repeated_bytes(run_dir: Path) -> dict[str, bytes]:
    """Return the bytes of what has to repeat."""
    return {name: (run_dir / name).read_bytes() for name in REPEATED}


def read_metrics(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
