"""Label a generated table twice, once left alone and once killed again and again; bytes, memory and rate.

    python benchmarks/predicting.py --model_dir results/first/student_onnx --int8 --rows 1000000 --kills 20

Texts are drawn words of --dataset, 3 to 25 of them. The first call of research_predict.py is left alone, and the most
memory of its process is noted after a tenth of the rows and at the end; the second is killed with SIGKILL --kills times at
random moments and started again each time. Both have to leave the same bytes. Prints one JSON line; exit status 1 when
they differ.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.05
EARLY_SHARE = 0.1


def draw_texts(rows: int, source: Path) -> Iterator[str]:
    """Yield texts of drawn words of a table."""
    with source.open(encoding="utf-8-sig", newline="") as file:
        words = [word for row in csv.reader(file) for cell in row for word in cell.split()]
    draw = random.Random(common.SEED)
    for _ in range(rows):
        yield " ".join(draw.choices(words, k=draw.randint(3, 25)))


def write_table(path: Path, rows: int, source: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(draw_texts(rows, source)))


def start(arguments: argparse.Namespace, table: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "research_predict.py"), "--model", str(arguments.model_dir)]
    command += ["--dataset_path", str(table), "--output_path", str(output), "--num_threads", str(arguments.threads)]
    return subprocess.Popen([*command, *(["--int8"] if arguments.int8 else [])], stderr=subprocess.PIPE)


class Memory(NamedTuple):
    """What a process has in memory, in MB.

    Attributes:
        peak: The most so far, with the pages of files that it maps, which the system can take back.
        anonymous: Now, without any pages of files.
    """

    peak: float
    anonymous: float


def read_memory(process: subprocess.Popen[bytes]) -> Memory | None:
    """Return what a process has in memory, None once it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in status.splitlines())
    if "VmHWM" not in lines:
        return None
    return Memory(*(float(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmHWM", "RssAnon")))


def find_progress(output: Path) -> int:
    """Return the bytes of answers and table that there are so far."""
    return sum(path.stat().st_size for path in output.parent.glob(f"*{output.stem}*") if path.is_file())


def run_alone(arguments: argparse.Namespace, table: Path, output: Path) -> dict[str, Any]:
    """Label the table in one go and note the time and the peak memory, early and at the end."""
    began = time.perf_counter()
    process = start(arguments, table, output)
    peaks: list[tuple[int, float]] = []
    while process.poll() is None:
        if (memory := read_memory(process)) is not None:
            peaks.append((find_progress(output), memory.peak))
        time.sleep(POLL_S)
    wall_s = time.perf_counter() - began
    check_ended(process)
    most = max(progress for progress, _ in peaks)
    early = max(peak for progress, peak in peaks if progress <= EARLY_SHARE * most)
    return {
        "wall_s": common.significant(wall_s),
        "rows_per_s": common.significant(arguments.rows / wall_s),
        "peak_mb_early": round(early, 1),
        "peak_mb": round(max(peak for _, peak in peaks), 1),
    }


def run_killed(arguments: argparse.Namespace, table: Path, output: Path, whole_s: float) -> int:
    """Label the table while its process is killed at random moments; return how often it was."""
    draw = random.Random(common.SEED)
    for number in range(arguments.kills):
        process = start(arguments, table, output)
        # Long enough for most calls to get further, short enough that the kills are spread over the whole of it.
        try:
            process.wait(draw.uniform(0.2, 2.0) * whole_s / max(arguments.kills, 1) + draw.uniform(0, arguments.startup_s))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            if output.exists():  # it was killed after its last write
                return number + 1
            continue
        check_ended(process)
        return number
    process = start(arguments, table, output)
    process.wait()
    check_ended(process)
    return int(arguments.kills)


def check_ended(process: subprocess.Popen[bytes]) -> None:
    errors = process.communicate()[1].decode()
    if process.returncode:
        common.fail(f"research_predict.py ended with status {process.returncode}: {errors[-500:]}")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.build_parser(__doc__, rows=1_000_000, repeats=1)
    parser.add_argument("--model_dir", type=Path, required=True, help="what research_predict.py --model takes")
    parser.add_argument("--int8", action="store_true", help="the int8 model of an exported folder")
    parser.add_argument("--kills", type=int, default=20, help="times that the second call is killed (default: %(default)s)")
    parser.add_argument("--startup_s", type=float, default=5.0, help="about the seconds it takes to start (default: %(default)s)")
    arguments = common.parse_flags(parser, argv, repeat_rows=True)
    machine = common.describe_machine(arguments.threads, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        table, alone, killed = (Path(folder) / name for name in ("table.csv", "alone.csv", "killed.csv"))
        write_table(table, arguments.rows, arguments.dataset)
        result = run_alone(arguments, table, alone)
        kills = run_killed(arguments, table, killed, result["wall_s"])
        same = digest(alone) == digest(killed)
        litter = sorted(path.name for path in Path(folder).iterdir() if path not in (table, alone, killed))
    common.print_result("predicting", arguments, machine, result | {"kills_met": kills, "same_bytes": same, "litter": litter})
    return 0 if same and not litter else 1


if __name__ == "__main__":
    sys.exit(main())
