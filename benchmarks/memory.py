"""Measure how the peak memory of a run grows with the rows of its table.

    python benchmarks/memory.py                                  # 10 thousand, 100 thousand and 1 million rows
    python benchmarks/memory.py --rows 100000                    # a thousand, 10 thousand and 100 thousand

The rows of the real table are repeated, each round with its number at the end of the text, so that all texts
differ. Teacher and student are tiny and random, with the real tokenizer, so that models are left out of the
figure; the teacher still scores every row and the student trains on --train_rows of them. The peak is the
resident set of the run's own process, from the operating system.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

SHARES = (100, 10, 1)
TRAIN_SHARE = 0.8


def measure_run(table: Path, rows: int, models: tuple[Path, Path], folder: Path, arguments: Any) -> dict[str, Any]:
    """Run the suite on a table with an empty cache and return its peak memory and its phases."""
    teacher, student = models
    command = common.suite_command(
        dataset_path=table,
        teacher_checkpoint=teacher,
        student_path=student,
        kd_method=arguments.kd_method,
        epochs=arguments.epochs,
        data_fraction=min(1.0, arguments.train_rows / (TRAIN_SHARE * rows)),
        allow_weak_teacher=True,
        num_threads=arguments.threads,
        device=arguments.device,
        output_dir=folder / "run",
        cache_dir=folder / "cache",
    )
    finished = common.run_process([*command, *common.precision_flags(arguments.dtype)], folder / "log", arguments.threads)
    environment = json.loads((folder / "run" / "environment.json").read_text(encoding="utf-8"))
    return {
        "rows": rows,
        "peak_rss_mb": round(finished.peak_rss_mb, 1),
        "table_mb": round(table.stat().st_size / 1e6, 1),
        "wall_s": common.significant(finished.timing.wall_s),
        "timing_s": environment["timing_s"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.build_parser(__doc__, rows=1_000_000, repeats=1)
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="rows of each table (default: a hundredth, a tenth and all of --rows)"
    )
    parser.add_argument("--train_rows", type=int, default=2000, help="rows trained on, about (default: %(default)s)")
    parser.add_argument("--kd_method", default="logit", help="logit, hidden, attention or multi_level (default: %(default)s)")
    arguments = common.parse_flags(parser, argv, repeat_rows=True)
    arguments.sizes = sorted(arguments.sizes or [arguments.rows // share for share in SHARES])
    machine = common.describe_machine(arguments.threads, arguments.device)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        student = common.save_tiny_encoder(arguments.model, Path(scratch) / "tiny")
        teacher = common.save_teacher(student, common.read_labels(arguments.dataset), Path(scratch) / "teacher")
        for size in arguments.sizes:
            for _ in range(arguments.repeats):
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    table = common.write_table(arguments.dataset, Path(folder) / "comments.csv", size)
                    runs.append(measure_run(table, size, (teacher, student), Path(folder), arguments))
                print(f"{size} rows: {runs[-1]['peak_rss_mb']} MB", file=sys.stderr)
    peaks = {size: max(run["peak_rss_mb"] for run in runs if run["rows"] == size) for size in arguments.sizes}
    smallest, largest = min(peaks), max(peaks)
    result = {
        "runs": runs,
        "peak_ratio": round(peaks[largest] / peaks[smallest], 3),
        "bytes_per_further_row": round(1e6 * (peaks[largest] - peaks[smallest]) / max(1, largest - smallest), 1),
    }
    common.print_result("memory", arguments, machine, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
