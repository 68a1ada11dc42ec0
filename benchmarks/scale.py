"""Measure how the time of a run grows with its rows, with the length of its texts and with the student's layers.

    python benchmarks/scale.py
    python benchmarks/scale.py --row_counts 200 400 --lengths 16 32 --layer_counts 1 2

Each series changes one of the three and keeps the others at --rows, --base_length and --base_layers. Every
point is a whole run in a process of its own with an empty cache. The exponent is the slope of log time over
log size, 1 for linear growth: of the whole run, start-up included, and of the student's training alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import Side, Timing


class Points:
    """Runs of the suite at one size each, and what their student phase took."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path, teacher: Path) -> None:
        self.arguments = arguments
        self.scratch = scratch
        self.teacher = teacher
        self.student_s: dict[str, list[float]] = {}

    def build(self, name: str, *, rows: int, length: int, layers: int) -> Side:
        """Return a call that runs the suite at this size; texts are stretched to `length` tokens and cut there."""
        arguments = self.arguments
        self.student_s[name] = []
        table = common.write_table(arguments.dataset, self.scratch / f"{name}.csv", rows, tokens_at_least=length)

        def run() -> Timing:
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                command = common.suite_command(
                    dataset_path=table,
                    teacher_checkpoint=self.teacher,
                    student_path=arguments.model,
                    student_layers=layers,
                    max_length=length,
                    kd_method=arguments.kd_method,
                    epochs=arguments.epochs,
                    early_stopping_patience=arguments.epochs,
                    allow_weak_teacher=True,
                    num_threads=arguments.threads,
                    device=arguments.device,
                    output_dir=f"{folder}/run",
                    cache_dir=f"{folder}/cache",
                )
                command += common.precision_flags(arguments.dtype)
                finished = common.run_process(command, Path(folder) / "log", arguments.threads)
                environment = json.loads(Path(folder, "run", "environment.json").read_text(encoding="utf-8"))
            self.student_s[name].append(environment["timing_s"]["student"])
            return finished.timing

        return run


def growth_exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float | None:
    """Return the slope of log seconds over log size; None from a single point."""
    if len(sizes) < 2:
        return None
    return round(float(np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 1e-3)), 1)[0]), 3)


def measure_series(points: Points, series: str, sizes: Sequence[int]) -> dict[str, Any]:
    arguments = points.arguments
    base = {"rows": arguments.rows, "length": arguments.base_length, "layers": arguments.base_layers}
    names = [f"{series}_{size}" for size in sizes]
    sides = {name: points.build(name, **(base | {series: size})) for name, size in zip(names, sizes, strict=True)}
    timings = common.interleave(sides, arguments.repeats)
    whole = [common.median_of(timings[name]).wall_s for name in names]
    student = [float(np.median(points.student_s[name])) for name in names]
    return {
        "sizes": list(sizes),
        "whole_run_s": [common.significant(seconds) for seconds in whole],
        "student_s": [common.significant(seconds) for seconds in student],
        "whole_run_exponent": growth_exponent(sizes, whole),
        "student_exponent": growth_exponent(sizes, student),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.build_parser(__doc__, rows=1000, repeats=1)
    parser.add_argument("--row_counts", type=int, nargs="*", default=[500, 1000, 2000, 4000], help="rows of the first series")
    parser.add_argument("--lengths", type=int, nargs="*", default=[16, 32, 64, 128], help="tokens a text of the second series")
    parser.add_argument("--layer_counts", type=int, nargs="*", default=[1, 3, 6, 12], help="student layers of the third series")
    parser.add_argument("--base_length", type=int, default=32, help="tokens a text in the other series (default: %(default)s)")
    parser.add_argument("--base_layers", type=int, default=6, help="student layers in the other series (default: %(default)s)")
    parser.add_argument("--kd_method", default="logit", help="logit, hidden, attention or multi_level (default: %(default)s)")
    arguments = common.parse_flags(parser, argv, repeat_rows=True)
    machine = common.describe_machine(arguments.threads, arguments.device)
    sizes = {"rows": arguments.row_counts, "length": arguments.lengths, "layers": arguments.layer_counts}
    with tempfile.TemporaryDirectory() as scratch:
        teacher = common.save_teacher(arguments.model, common.read_labels(arguments.dataset), Path(scratch) / "teacher")
        points = Points(arguments, Path(scratch), teacher)
        result = {name: measure_series(points, name, of_series) for name, of_series in sizes.items() if of_series}
    common.print_result("scale", arguments, machine, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
