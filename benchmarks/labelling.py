"""Measure how a large set of unlabelled texts is read, tokenised and labelled by a teacher, and whether that survives a kill.

    python benchmarks/labelling.py                                    # 5 million texts, a tiny random teacher
    python benchmarks/labelling.py --rows 50000                       # a check in a minute
    python benchmarks/labelling.py --teacher runs/best/teacher --rows 1000000 --device cuda

The texts are those of the real table, over again, each with its number at the end, in Parquet files of --rows_per_file.
`--prepare_only` fills an empty cache with their tokens and the teacher's logits. A second run of the same is killed
(SIGKILL) when about half of the logits are on the disk, and started again: its logits must have the bytes of the first.

Prints one JSON line: rows a second of the whole and of the teacher alone, the peak resident set, the bytes a row that the
cache takes. Exit status 1 when the bytes differ or a finished part was computed again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from research.kd.labelling import PART_ROWS
from research.text.tables import find_columns

LABELLED_ROWS = 1000
POLL_S = 0.05


def write_texts(dataset: Path, folder: Path, rows: int, rows_per_file: int) -> Path:
    """Write `rows` different texts as Parquet files."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir()
    text_column = find_columns(dataset).text
    with open(dataset, encoding="utf-8-sig") as file:
        place = file.readline().strip().split(",").index(text_column)
    texts = (f"{cells[place]} {number}" for number, (_, cells) in enumerate(common.cycle_rows(dataset)))
    for number, start in enumerate(range(0, rows, rows_per_file)):
        of_file = list(itertools.islice(texts, min(rows_per_file, rows - start)))
        parquet.write_table(pa.table({text_column: of_file}), folder / f"part-{number:05d}.parquet", row_group_size=10_000)
    return folder


@dataclass
class Labelling:
    """A run with a cache of its own, as it is seen from outside."""

    command: list[str]
    cache: Path
    log: Path
    threads: int
    first_part_s: float = 0.0

    def run(self, kill_at: int | None = None) -> common.Finished | None:
        """Run to the end; or until so many parts are on the disk, and kill it then."""
        started = common.start_process(self.command, self.log, self.threads)
        while os.waitid(os.P_PID, started.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            parts = self.count_parts()
            if parts and not self.first_part_s:
                self.first_part_s = time.time()
            if kill_at is not None and parts >= kill_at:
                started.process.send_signal(signal.SIGKILL)
                started.process.wait()
                return None
            time.sleep(POLL_S)
        return common.wait_for(started)

    def count_parts(self) -> int:
        """Return how many parts the largest set of logits has that is being made."""
        return max((len(list(work.glob("part-*.npy"))) for work in self.cache.glob("logits/*.work")), default=0)

    @property
    def logits(self) -> Path:
        """The finished logits of all texts."""
        return max(self.cache.glob("logits/*/logits.npy"), key=lambda path: path.stat().st_size)


def measure_cache(cache: Path, rows: int) -> dict[str, float]:
    """Return the bytes a row of each kind of entry."""
    return {
        kind.name: common.significant(sum(file.stat().st_size for file in kind.rglob("*") if file.is_file()) / rows)
        for kind in sorted(cache.iterdir())
        if not kind.name.startswith(".")
    }


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Label the texts undisturbed, then killed and started again."""
    table = common.write_table(arguments.dataset, scratch / "comments.csv", LABELLED_ROWS)
    tiny = common.save_tiny_encoder(arguments.model, scratch / "tiny")
    teacher = arguments.teacher or common.save_teacher(tiny, common.read_labels(arguments.dataset), scratch / "teacher")
    texts = write_texts(arguments.dataset, scratch / "texts", arguments.rows, arguments.rows_per_file)

    def build(name: str) -> Labelling:
        command = common.suite_command(
            dataset_path=table,
            unlabelled_path=texts,
            teacher_checkpoint=teacher,
            student_path=tiny,
            max_length=arguments.max_length,
            prepare_only=True,
            drop_seen_rows=True,
            allow_weak_teacher=True,
            num_threads=arguments.threads,
            device=arguments.device,
            output_dir=scratch / "run",
            cache_dir=scratch / name,
        )
        return Labelling(
            [*command, *common.precision_flags(arguments.dtype)], scratch / name, scratch / f"{name}.log", arguments.threads
        )

    whole, killed = build("whole"), build("killed")
    finished = whole.run()
    assert finished is not None
    labelling_s = whole.logits.stat().st_mtime - whole.first_part_s
    print(f"undisturbed: {finished.timing.wall_s:.0f} s, {finished.peak_rss_mb:.0f} MB", file=sys.stderr)
    num_parts = -(-arguments.rows // PART_ROWS)
    assert killed.run(kill_at=max(1, num_parts // 2)) is None, "it ended before it could be killed: give more --rows"
    kept = killed.count_parts()
    again = killed.run()
    assert again is not None
    told = (scratch / "killed.log").read_text(encoding="utf-8")
    same = killed.logits.read_bytes() == whole.logits.read_bytes()
    return {
        "rows_per_s": common.significant(arguments.rows / finished.timing.wall_s),
        "teacher_rows_per_s": common.significant(max(0, arguments.rows - PART_ROWS) / max(labelling_s, 1e-3)),
        "wall_s": common.significant(finished.timing.wall_s),
        "cpu_s": common.significant(finished.timing.cpu_s),
        "peak_rss_mb": round(finished.peak_rss_mb, 1),
        "table_mb": round(sum(file.stat().st_size for file in texts.iterdir()) / 1e6, 1),
        "cache_bytes_per_row": measure_cache(whole.cache, arguments.rows),
        "parts_kept_by_the_kill": kept,
        "went_on_from_them": "rows are there already" in told,
        "wall_s_after_the_kill": common.significant(again.timing.wall_s),
        "same_bytes": same,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.build_parser(__doc__, rows=5_000_000, repeats=1)
    parser.add_argument("--teacher", type=Path, help="a --teacher_checkpoint of the same labels (default: tiny and random)")
    parser.add_argument("--max_length", type=int, default=64, help="longest text in tokens (default: %(default)s)")
    parser.add_argument("--rows_per_file", type=int, default=100_000, help="texts of a Parquet file (default: %(default)s)")
    arguments = common.parse_flags(parser, argv, repeat_rows=True)
    machine = common.describe_machine(arguments.threads, arguments.device)
    scratch = Path(tempfile.mkdtemp())
    try:
        result = measure(arguments, scratch)
    finally:
        shutil.rmtree(scratch)
    common.print_result("labelling", arguments, machine, result)
    return 0 if result["same_bytes"] and result["went_on_from_them"] else 1


if __name__ == "__main__":
    sys.exit(main())
