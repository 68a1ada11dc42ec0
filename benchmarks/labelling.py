"""A teacher answers a large set of generated texts in shards: rows a second, memory, and what a kill costs.

    python benchmarks/labelling.py                                     # 5 million rows in 50 shards of Parquet
    python benchmarks/labelling.py --rows 50000 --shards 4 --kills 3 --format csv

Texts are drawn words of --dataset, 3 to 25 of them; beside the shards, which are --unlabelled_path, stands a labelled table
of its first 1,000 rows. The teacher is tiny and random with the real tokenizer, so that the figure is what the suite adds;
--teacher takes another. `research_main.py --prepare_only` reads, leaves out near-duplicates of held-out texts, tokenises and
has every row answered: once left alone, with its peak memory after a tenth of the time and at the end, and once killed with
SIGKILL at random moments and started again. The peak counts pages of files that are mapped, which cost nothing; beside it stands
the most that was seen of anonymous memory. Both caches have to hold the same bytes. Prints one JSON line; exit status 1 when
they differ.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
from predicting import Memory, draw_texts, read_memory

LABELLED_ROWS = 1000
POLL_S = 0.2
EARLY_SHARE = 0.1


def write_shards(folder: Path, arguments: Any) -> list[Path]:
    """Write the texts into files of about as many rows each."""
    folder.mkdir()
    texts = draw_texts(arguments.rows, arguments.dataset)
    each, over = divmod(arguments.rows, arguments.shards)
    return [
        write_shard(folder / f"shard_{number:03d}.{arguments.format}", texts, each + (number < over))
        for number in range(arguments.shards)
    ]


def write_shard(path: Path, texts: Iterator[str], rows: int) -> Path:
    drawn = [next(texts) for _ in range(rows)]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"comment": drawn}), path, row_group_size=10_000)
    else:
        path.write_text("comment\n" + "".join(f"{text}\n" for text in drawn), encoding="utf-8")
    return path


def start(folder: Path, cache: Path, shards: Sequence[Path], teacher: Path, arguments: Any) -> common.Started:
    command = common.suite_command(
        dataset_path=folder / "labelled.csv",
        teacher_checkpoint=teacher,
        student_path=folder / "tiny",
        allow_weak_teacher=True,
        prepare_only=True,
        num_threads=arguments.threads,
        cache_dir=cache,
        output_dir=folder / "run",
    )
    return common.start_process(
        [*command, "--unlabelled_path", *map(str, shards)], folder / f"{cache.name}.log", arguments.threads
    )


def run_alone(started: common.Started, rows: int) -> dict[str, Any]:
    """Wait for the end; return rows a second of all of it and the peak memory, early and at the end."""
    seen: list[tuple[float, Memory]] = []
    while started.process.poll() is None:
        if (memory := read_memory(started.process)) is not None:
            seen.append((time.perf_counter() - started.began, memory))
        time.sleep(POLL_S)
    wall_s = time.perf_counter() - started.began
    check_ended(started)
    early = [memory for at_s, memory in seen if at_s <= max(EARLY_SHARE * wall_s, seen[0][0])]
    return {
        "wall_s": common.significant(wall_s),
        "rows_per_s": common.significant(rows / wall_s),
        "peak_mb_early": round(max(memory.peak for memory in early), 1),
        "peak_mb": round(max(memory.peak for _, memory in seen), 1),
        "anonymous_mb_early": round(max(memory.anonymous for memory in early), 1),
        "anonymous_mb": round(max(memory.anonymous for _, memory in seen), 1),
    }


def check_ended(started: common.Started) -> None:
    if started.process.wait():
        lines = started.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        common.fail(f"research_main.py ended with status {started.process.returncode}: {' '.join(lines[-1:])}")


def kill_and_finish(start_again: Callable[[], common.Started], kills: int, whole_s: float) -> int:
    """Start, kill at a random moment, and again; return how many kills met a running process."""
    draw, met = random.Random(common.SEED), 0
    for _ in range(kills):
        started = start_again()
        try:
            started.process.wait(draw.uniform(0.1, 0.9) * whole_s)
            break
        except subprocess.TimeoutExpired:
            started.process.send_signal(signal.SIGKILL)
            started.process.wait()
            met += 1
    check_ended(start_again())
    return met


def read_entries(cache: Path) -> dict[str, bytes]:
    """Return the hashes of the files of every entry, by kind and name."""
    return {
        str(manifest.parent.relative_to(cache)): manifest.read_bytes() for manifest in sorted(cache.glob("*/*/manifest.json"))
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.build_parser(__doc__, rows=5_000_000, repeats=1)
    parser.add_argument("--shards", type=int, default=50, help="files that the texts are in (default: %(default)s)")
    parser.add_argument("--format", choices=("parquet", "csv"), default="parquet", help="of the shards (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=3, help="times that the second call is killed (default: %(default)s)")
    parser.add_argument("--teacher", type=Path, help="a fine-tuned teacher (default: a tiny random one)")
    arguments = common.parse_flags(parser, argv, repeat_rows=True)
    machine = common.describe_machine(arguments.threads, arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny = common.save_tiny_encoder(arguments.model, folder / "tiny")
        teacher = arguments.teacher or common.save_teacher(tiny, common.read_labels(arguments.dataset), folder / "teacher")
        common.write_table(arguments.dataset, folder / "labelled.csv", LABELLED_ROWS)
        shards = write_shards(folder / "shards", arguments)
        alone, killed = folder / "alone", folder / "killed"
        result = run_alone(start(folder, alone, shards, teacher, arguments), arguments.rows)
        again = partial(start, folder, killed, shards, teacher, arguments)
        result["kills_met"] = kill_and_finish(again, arguments.kills, result["wall_s"]) if arguments.kills else 0
        entries = read_entries(alone)
        result["same_bytes"] = not arguments.kills or entries == read_entries(killed)
        size = sum(path.stat().st_size for path in alone.rglob("*") if path.is_file())
        result["cache_bytes_per_row"] = round(size / arguments.rows, 1)
    common.print_result("labelling", arguments, machine, result)
    return 0 if result["same_bytes"] and entries else 1


if __name__ == "__main__":
    sys.exit(main())
