"""Time research_compare.py on 15 runs of 10,000 test rows, from the start of Python to the printed table.

    python benchmarks/compare_speed.py [--runs 15] [--rows 10000]

The last line is JSON: medians of five calls for each choice of metrics (the default is three), and the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.comparison_runs import make_truth, write_run  # noqa: E402

REPEATS = 5
METRICS = ("f1_macro", "average_precision_macro,f1_macro,f1_macro_tuned")


def time_call(folder: Path, metric: str) -> tuple[float, float]:
    """Return wall and processor seconds of one call; the latter is the fair figure on a busy machine."""
    command = [sys.executable, str(ROOT / "research_compare.py"), str(folder), "--metric", metric, "--group_by", "seed"]
    start, processor = time.perf_counter(), _processor_s()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start, _processor_s() - processor


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="run directories (default: 15)")
    parser.add_argument("--rows", type=int, default=10_000, help="test rows of each (default: 10000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        truth = make_truth(arguments.rows)
        for number in range(arguments.runs):
            write_run(
                Path(folder) / f"run_{number}",
                truth=truth,
                noise_seed=number,
                models=("teacher", "student"),
                kd_alpha=0.1 * (number // 3),
                seed=number % 3,
            )
        times: dict[str, list[tuple[float, float]]] = {metric: [] for metric in METRICS}
        for _ in range(REPEATS):
            for metric in METRICS:
                times[metric].append(time_call(Path(folder), metric))
    result = {
        "benchmark": "compare_speed",
        "runs": arguments.runs,
        "rows": arguments.rows,
        **{
            name: {metric: round(statistics.median(pair[place] for pair in pairs), 2) for metric, pairs in times.items()}
            for place, name in enumerate(("median_wall_s", "median_processor_s"))
        },
        "load": round(os.getloadavg()[0], 1),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
