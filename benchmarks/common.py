"""What the benchmarks share: flags, the machine, tables and teachers to run on, interleaved timing, one JSON line.

Importing this room puts the project's root on the path, so a benchmark imports it before the suite. torch is
imported by the functions that need it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from research.logs import quiet_libraries  # noqa: E402
from research.text.labels import find_columns  # noqa: E402

DEFAULT_DATASET = ROOT.parent / "shared" / "data" / "bn_cyberbully5.csv"
DEFAULT_MODEL = ROOT.parent / "shared" / "models" / "me5-small-bn"
QUIET_LOAD = 0.7
SEED = 42
BATCH = 32
MAX_LENGTH = 128


# Flags


def build_parser(description: str | None, *, rows: int | None, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark has."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--dataset", type=Path, default=DEFAULT_DATASET, help="CSV table of comments (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="folder of a pretrained encoder (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=rows, help=f"rows of the table to use (default: {rows or 'all'})")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of a whole run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all cores)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the suite's precision")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=repeats, help="times each side is measured (default: %(default)s)")
    return parser


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, repeat_rows: bool = False) -> argparse.Namespace:
    """Parse, check that table and model are there, and hold the libraries' thread pools to --threads.

    Args:
        repeat_rows: Leave --rows as it is when it is more than the table has.
    """
    arguments = parser.parse_args(argv)
    if not arguments.dataset.is_file():
        fail(f"--dataset: no such file: {arguments.dataset}. Give a CSV table of comments.")
    if not (arguments.model / "config.json").is_file():
        fail(f"--model: no encoder in {arguments.model}. Give a folder with config.json, weights and tokenizer.")
    if not repeat_rows:
        present = sum(1 for _ in itertools.takewhile(lambda entry: entry[0] == 0, cycle_rows(arguments.dataset)))
        arguments.rows = min(arguments.rows or present, present)
    # Read when a library starts its pool, by this process and by those it starts.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)
    quiet_libraries()
    return arguments


def fail(message: str) -> NoReturn:
    """End with one line on stderr and the status of bad input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def precision_flags(dtype: str) -> list[str]:
    """Return the suite's flags for a precision."""
    return ["--no-amp"] if dtype == "float32" else ["--amp", "--amp_dtype", dtype]


# The machine and the result


def describe_machine(threads: int, device: str) -> dict[str, Any]:
    """Say what the figures were measured on; call it before anything runs, for the load is that of others."""
    import torch

    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    machine: dict[str, Any] = {
        "cpu": find_cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_at_start": round(load, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else "cpu",
    }
    if load > QUIET_LOAD:
        machine["warning"] = f"the machine was busy: load {load:.2f} at start, over {QUIET_LOAD}; the figures are rough"
    return machine


def find_cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_result(benchmark: str, arguments: argparse.Namespace, machine: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Print the one JSON line."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    print(json.dumps({"benchmark": benchmark, "machine": machine, "settings": settings, **result}))


# Timing


@dataclass(frozen=True)
class Timing:
    """Seconds of one measurement: on the clock, and of all processors, the fairer figure on a busy machine."""

    wall_s: float
    cpu_s: float

    def __mul__(self, factor: float) -> Timing:
        return Timing(self.wall_s * factor, self.cpu_s * factor)

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


Side = Callable[[], Timing]


def timed(work: Callable[[], object]) -> Timing:
    """Time a call in this process."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - processor)


def time_last_steps(train: Callable[[], object], steps: int, device: str = "cpu") -> Timing:
    """Time the last `steps` optimizer steps of a training, whoever's loop it is.

    The clock runs from the end of the step before them, so they are timed with all that a loop does between
    two steps, and without its start. The training must take at least one step more.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[tuple[float, float]] = []

    def note_step(*_: Any) -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        ends.append((time.perf_counter(), time.process_time()))

    hook = register_optimizer_step_post_hook(note_step)
    try:
        train()
    finally:
        hook.remove()
    assert len(ends) > steps, f"{len(ends)} steps were taken, more than {steps} are needed"
    (wall, processor), (wall_end, processor_end) = ends[-steps - 1], ends[-1]
    return Timing(wall_end - wall, processor_end - processor)


def interleave(sides: Mapping[str, Side], repeats: int) -> dict[str, list[Timing]]:
    """Measure every side in turn, again and again, so that a change of the machine's mood meets them all."""
    timings: dict[str, list[Timing]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, measure in sides.items():
            timings[name].append(measure())
            print(f"repeat {repeat + 1}/{repeats} {name}: {timings[name][-1].wall_s:.2f} s", file=sys.stderr)
    return timings


def median_of(timings: Sequence[Timing]) -> Timing:
    return Timing(*(statistics.median(getattr(timing, name) for timing in timings) for name in ("wall_s", "cpu_s")))


def summarize(timings: Sequence[Timing], rows: int | None = None) -> dict[str, Any]:
    """Return a side's medians, every measurement, and rows per second when it is known how many rows they took."""
    median = median_of(timings)
    summary = {
        "median_wall_s": significant(median.wall_s),
        "median_cpu_s": significant(median.cpu_s),
        "wall_s": [significant(timing.wall_s) for timing in timings],
    }
    return summary if rows is None else summary | {"rows_per_s": significant(rows / median.wall_s)}


def compare(numerator: Sequence[Timing], denominator: Sequence[Timing]) -> dict[str, Any]:
    """Return the ratio of two sides' medians, and the lowest and highest ratio of a repeat."""
    above, below = median_of(numerator), median_of(denominator)
    paired = [one.wall_s / other.wall_s for one, other in zip(numerator, denominator, strict=True)]
    return {
        "wall": round(above.wall_s / below.wall_s, 3),
        "cpu": round(above.cpu_s / max(below.cpu_s, 1e-9), 3),
        "wall_range": [round(min(paired), 3), round(max(paired), 3)],
    }


def significant(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


# Processes


@dataclass(frozen=True)
class Finished:
    """What a process took, and what it wrote on stdout."""

    timing: Timing
    peak_rss_mb: float
    stdout: str


def run_process(command: Sequence[str], log: Path, threads: int) -> Finished:
    """Run a command to its end, its stderr going to `log`.

    Raises:
        SystemExit: it failed; the message ends with its last line.
    """
    return wait_for(start_process(command, log, threads))


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen[bytes]
    log: Path
    began: float


def start_process(command: Sequence[str], log: Path, threads: int) -> Started:
    """Start a command with a number of threads, so that several can run side by side."""
    environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    with open(log, "wb") as errors, open(log.with_suffix(".out"), "wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors, env=environment)
    return Started(process, log, time.perf_counter())


def wait_for(started: Started) -> Finished:
    """Wait for a process and read what it used; wait4 gives the peak of this child alone, and its children's time."""
    _, status, used = os.wait4(started.process.pid, 0)
    wall = time.perf_counter() - started.began
    started.process.returncode = os.waitstatus_to_exitcode(status)
    if started.process.returncode:
        lines = started.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise SystemExit(f"error: {started.process.args!r} ended with status {started.process.returncode}: {lines[-1:]}")
    # ru_maxrss is in KiB on Linux.
    rss_mb = used.ru_maxrss * 1024 / 1e6
    stdout = started.log.with_suffix(".out").read_text(encoding="utf-8")
    return Finished(Timing(wall, used.ru_utime + used.ru_stime), rss_mb, stdout)


def suite_command(**flags: Any) -> list[str]:
    """Return the command of one run of the suite."""
    return script_command(ROOT / "research_main.py", **flags)


def script_command(script: Path, *words: str, **flags: Any) -> list[str]:
    """Return the command of a script, words first; True is a bare flag, a list repeats its flag."""
    command = [sys.executable, str(script), *words]
    for name, value in flags.items():
        for item in value if isinstance(value, list) else [value]:
            command += [f"--{name}"] if item is True else [f"--{name}", str(item)]
    return command


# Tables and models


def read_labels(table: Path) -> tuple[str, ...]:
    """Return the names of a table's label columns."""
    return find_columns(table).labels


def write_table(dataset: Path, target: Path, rows: int, *, tokens_at_least: int = 0) -> Path:
    """Write a table of `rows` rows: those of `dataset`, over again when it has fewer.

    A repeated text gets the number of its round at the end, so that no two rounds hold the same texts. With
    `tokens_at_least` every text is repeated until it has as many words, and so at least as many tokens.
    """
    text_column = find_columns(dataset).text
    with open(dataset, encoding="utf-8-sig", newline="") as source, open(target, "w", encoding="utf-8", newline="") as file:
        names = next(csv.reader(source))
        place = names.index(text_column)
        writer = csv.writer(file)
        writer.writerow(names)
        for number, row in itertools.islice(cycle_rows(dataset), rows):
            text = f"{row[place]} {number}" if number else row[place]
            words = max(1, len(text.split()))
            row[place] = " ".join([text] * max(1, -(-tokens_at_least // words)))
            writer.writerow(row)
    return target


def cycle_rows(dataset: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (round, cells) of the table's data rows without end."""
    for number in itertools.count():
        with open(dataset, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            next(reader)
            yield from ((number, row) for row in reader)


def build_teacher(model: Path, labels: int) -> Any:
    """Return a pretrained encoder with a seeded head: as costly as a fine-tuned teacher, and made at once."""
    import torch

    from research.models.classifiers import TeacherModel
    from research.models.encoders import load_encoder

    encoder = load_encoder(str(model))
    torch.manual_seed(SEED)
    return TeacherModel(num_labels=labels, encoder=encoder)


def build_student(model: Path, labels: int, layers: int, pooling: str = "cls", seed: int = SEED) -> Any:
    """Return a student with the first weights of a run with these layers."""
    import torch

    from research.models.classifiers import StudentModel
    from research.models.cutting import cut_layers
    from research.models.encoders import load_encoder

    encoder = cut_layers(load_encoder(str(model)), layers)
    torch.manual_seed(seed)
    return StudentModel(num_labels=labels, pooling=pooling, encoder=encoder)


def make_stock(model: Any, attention: str) -> Any:
    """Give a classifier's encoder back transformers' own attention, "eager" or "sdpa", and torch's own dropout."""
    from torch import nn

    from research.models.dropout import replace_dropout

    model.encoder.set_attn_implementation(attention)
    replace_dropout(model.encoder, nn.Dropout)
    return model


def save_teacher(model: Path, labels: Sequence[str], folder: Path) -> Path:
    """Save `build_teacher`'s model as a --teacher_checkpoint."""
    from transformers import AutoTokenizer

    from research.models.saved import save_classifier

    save_classifier(build_teacher(model, len(labels)), AutoTokenizer.from_pretrained(model), folder, {"labels": list(labels)})
    return folder


def save_tiny_encoder(model: Path, folder: Path) -> Path:
    """Save an encoder of the same kind and vocabulary, small enough not to matter, with its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from research.experiment.demo import save_random_encoder

    config = AutoConfig.from_pretrained(model)
    for name, value in {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}.items():
        setattr(config, name, value)
    config.dtype = None
    save_random_encoder(config, folder, SEED)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder
