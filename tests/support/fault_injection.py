"""Runs of the real command in processes of their own, killed at a chosen write or moment.

A fork server imports torch once and is forked for each attempt, before any thread pool has started.
"""

from __future__ import annotations

import ctypes
import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.context import ForkServerContext
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

from research.runs.directory import RunDirectory
from research.storage.cache import MANIFEST
from research.storage.files import hash_tree
from support.builders import QUICK_EXTRAS, ROOT, build_model_folder, make_table, make_texts

PHASES = ("start", "views", "tokenize", "teacher", "teacher_outputs", "student", "control", "save")
RESULTS = (
    "metrics.json", "history.csv", "history_control.csv", "predictions.csv", "validation_predictions.csv",
    "student/config.json", "student/model.safetensors", "teacher/config.json", "teacher/model.safetensors",
)  # fmt: skip
# A checkpoint follows every batch, and both models have tokenizers and widths of their own, so every
# kind of cache entry is made and the student has projections to lose.
FLAGS = [
    "--dataset_path", "data/comments.csv", "--teacher_path", "models/teacher", "--student_path", "models/student",
    "--output_dir", "run", "--lr", "1e-3", "--teacher_epochs", "1", "--epochs", "2", "--batch", "16", "--max_length", "32",
    "--student_hidden_size", "8", "--num_threads", "1", "--kd_method", "multi_level", "--layer_mapping", "1:1,2:2",
    "--with_control", "--allow_weak_teacher", "--checkpoint_minutes", "0",
]  # fmt: skip
PRELOADED = [
    "pytest", "research.experiment.run", "research.experiment.demo", "sklearn.metrics", "iterstrat.ml_stratifiers",
    "transformers.models.electra.modeling_electra", "transformers.models.distilbert.modeling_distilbert",
]  # fmt: skip
TIMEOUT_S = 120
KILLS_PER_RUN = 3
# What the command says has to fit into a file of the least size, or its error line could not be read.
SMALLEST_LIMIT = 3000
GOLDEN_RATIO = 0.6180339887


@dataclass(frozen=True)
class Attempt:
    """How one process ended: its exit status (minus the signal that killed it) and how far it had come."""

    status: int
    writes: int
    phase: str
    seconds: float
    errors: str


def build_inputs(folder: Path) -> Path:
    """Write a table and two tiny models whose run takes about a second."""
    make_table(folder / "data" / "comments.csv", rows=60)
    texts = make_texts(60)
    build_model_folder("electra", "wordpiece", folder / "models" / "teacher", texts, layers=2, width=24, seed=1)
    build_model_folder("distilbert", "unigram", folder / "models" / "student", texts, layers=2, width=16, seed=2)
    return folder


def copy_inputs(source: Path, folder: Path) -> Path:
    """Make a folder with the same table and models, and nothing else."""
    for name in ("data", "models"):
        shutil.copytree(source / name, folder / name)
    return folder


def read_results(run_dir: Path) -> dict[str, bytes]:
    """Return the bytes of everything in a finished run that has to repeat."""
    return {name: (run_dir / name).read_bytes() for name in RESULTS if (run_dir / name).exists()}


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1] = bytes([content[len(content) // 2] ^ 1]) if content else b"?"
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {"flip one byte": flip_byte, "truncate to half": truncate, "delete": Path.unlink}


@contextmanager
def file_size_limit(room: int) -> Iterator[None]:
    """Make every file of this process end after `room` bytes: a write past it fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tear(path: Path) -> None:
    """Lose the last bytes of a cache entry's file, in its manifest too, as numpy once did on a full disk."""
    size = path.stat().st_size
    os.truncate(path, size - min(8, size // 2))
    manifest = path.parent / MANIFEST
    key = json.loads(manifest.read_text(encoding="ascii"))["key"]
    manifest.unlink()
    manifest.write_text(json.dumps({"files": hash_tree(path.parent), "key": key}, sort_keys=True), encoding="ascii")


def find_litter(folder: Path) -> list[Path]:
    """Return what a finished run has no use for: half-written files, checkpoints, scratch folders."""
    patterns = (
        "run/**/.*.tmp",
        "run/**/checkpoint*",
        "run/**/.overwriting",
        "run/**/.lock",
        "cache/**/.*.tmp",
        "cache/**/*.new",
        "cache/**/*.work",
    )
    return [path for pattern in patterns for path in folder.glob(pattern)]


@functools.cache
def fork_server() -> ForkServerContext:
    """Start the server with the suite and the tests on its path, and the slow imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.copy()
    paths = (str(ROOT), str(ROOT / "tests"), before.get("PYTHONPATH", ""))
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TORCH_CPP_LOG_LEVEL="ERROR")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # Of the semaphores that killed processes leave; the tracker removes them and complains.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    try:
        warm_up = context.Process(target=os.getpid)
        warm_up.start()
        warm_up.join()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def attempt(
    folder: Path,
    flags: Sequence[str] = FLAGS,
    *,
    kill_at_write: int | None = None,
    kill_after_s: float | None = None,
    limit: tuple[int, int] | None = None,
) -> Attempt:
    """Run the command once in `folder`; SIGKILL it just before a write (counted from 1), or after some seconds.

    Args:
        limit: A write, and the bytes after which every file ends from then on.
    """
    shared = RawArray(ctypes.c_int, 2)
    started = time.monotonic()
    process = fork_server().Process(target=_run, args=(folder, list(flags), kill_at_write, limit, shared))
    process.start()
    process.join(TIMEOUT_S if kill_after_s is None else kill_after_s)
    if process.is_alive():
        process.kill()
        process.join()
        assert kill_after_s is not None, f"still running after {TIMEOUT_S} s"
    assert process.exitcode is not None
    errors = folder / "stderr.txt"
    return Attempt(
        process.exitcode,
        shared[0],
        PHASES[shared[1]],
        time.monotonic() - started,
        errors.read_text(encoding="utf-8") if errors.exists() else "",
    )


def _run(folder: Path, flags: list[str], kill_at_write: int | None, limit: tuple[int, int] | None, shared: Any) -> None:
    """The child: the real command, with its output in files."""
    import research_main
    from research.experiment.runtime import Runtime

    os.chdir(folder)
    for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    _watch_phases(Runtime, shared)
    _count_writes(folder, kill_at_write, limit, shared)
    sys.exit(research_main.main(flags, QUICK_EXTRAS))


def _watch_phases(runtime: Any, shared: Any) -> None:
    """Keep the phase that is running where the parent sees it."""
    timed = runtime.timed

    @contextmanager
    def watched(self: Any, phase: str) -> Iterator[None]:
        before, shared[1] = shared[1], PHASES.index(phase)
        with timed(self, phase):
            yield
        shared[1] = before

    runtime.timed = watched


def _count_writes(folder: Path, kill_at_write: int | None, limit: tuple[int, int] | None, shared: Any) -> None:
    """Count what changes files below `folder`, and die, or let files end early, just before the chosen change."""
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
    prefix = f"{folder}{os.sep}"
    fsync = os.fsync

    def is_chosen() -> bool:
        shared[0] += 1
        if limit is not None and shared[0] == limit[0]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], resource.RLIM_INFINITY))
        return shared[0] == kill_at_write

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not writes or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if (not os.path.isabs(path) or path.startswith(prefix)) and is_chosen():
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(fd: Any) -> None:
        if is_chosen():
            # What is not flushed yet may be lost with the power: half of it is.
            with suppress(OSError):
                os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = counted_fsync
    sys.addaudithook(hook)


def kill_and_finish(folder: Path, flags: Sequence[str], generator: random.Random, first: int | float, more: int) -> list[Attempt]:
    """Kill a run at its write `first`, or after so many seconds, then up to `more` times again, then let it end."""
    kills: list[Attempt] = []
    at: int | float = first
    for _ in range(more + 1):
        where: dict[str, Any] = {"kill_at_write" if isinstance(at, int) else "kill_after_s": at}
        tried = attempt(folder, flags, **where)
        if tried.status == 0:
            return kills
        assert tried.status == -signal.SIGKILL, tried.errors
        kills.append(tried)
        at = generator.randint(1, 80) if isinstance(first, int) else generator.uniform(0.1, 1.2)
    last = attempt(folder, flags)
    assert last.status == 0, last.errors
    return kills


def kill_runs(
    folder: Path, inputs: Path, reference: Attempt, expected: dict[str, bytes], wanted: int, seed: int
) -> dict[str, Any]:
    """Kill at least `wanted` times and return the counts; a run that ended otherwise stays in `folder`."""
    started = time.monotonic()
    generator = random.Random(seed)
    kills: list[Attempt] = []
    kinds: Counter[str] = Counter()
    differ: list[str] = []
    runs = 0
    for moment in choose_moments(reference, generator):
        if len(kills) >= wanted:
            break
        runs += 1
        place = copy_inputs(inputs, folder / f"run_{runs}")
        done = kill_and_finish(place, FLAGS, generator, moment, more=KILLS_PER_RUN - 1)
        kills += done
        kinds["at a write" if isinstance(moment, int) else "at a random moment"] += len(done)
        if read_results(place / "run") == expected and not find_litter(place):
            shutil.rmtree(place)
        else:
            differ.append(f"{place.name}: killed at {moment}, {[kill.phase for kill in done]}")
    return {
        "kills": len(kills),
        "kills_by_phase": dict(Counter(kill.phase for kill in kills)),
        "kills_by_kind": dict(kinds),
        "runs": runs,
        "writes_of_a_run": reference.writes,
        "runs_that_differ": differ,
        "files_compared": sorted(expected),
        "seconds": round(time.monotonic() - started, 1),
    }


def damage_files(folder: Path, inputs: Path, reference: Attempt, expected: dict[str, bytes]) -> dict[str, Any]:
    """Damage every file of a half-finished run, each in every way and alone, and count how the runs end."""
    half = stop_half_way(folder, inputs, reference)
    roots = (half / "cache", half / "run" / "checkpoint")
    files = sorted(path for root in roots for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    ends: Counter[str] = Counter()
    differ = []
    for path in files:
        for name, damage in DAMAGES.items():
            place = folder / "damaged"
            shutil.copytree(half, place)
            damage(place / path.relative_to(half))
            last = attempt(place)
            if last.status == 0 and read_results(place / "run") == expected and not find_litter(place):
                ends["the same bytes"] += 1
            elif last.status and "\nerror: " in f"\n{last.errors}" and "Traceback" not in last.errors:
                ends["an error line"] += 1
            else:
                differ.append(f"{path.relative_to(half)}: {name}")
            shutil.rmtree(place)
    return {
        "damaged_files": len(files),
        "damages": len(files) * len(DAMAGES),
        "damages_end_in": dict(ends),
        "damages_that_differ": differ,
    }


def limit_runs(
    folder: Path, inputs: Path, untouched: Path, reference: Attempt, expected: dict[str, bytes], wanted: int
) -> dict[str, Any]:
    """Let files end early from a write on, `wanted` times, and count how the runs end and go on without the limit.

    The writes are spread evenly over those of a run. A limit is a byte less than the size of one of its files, so
    that this one lacks its last byte and all larger ones are cut.
    """
    sizes = {path.stat().st_size for path in untouched.rglob("*") if path.is_file()}
    rooms = [size - 1 for size in sorted(sizes) if size > SMALLEST_LIMIT]
    ends: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    differ = []
    for number in range(wanted):
        write = 1 + int(((number + 0.5) * GOLDEN_RATIO) % 1.0 * reference.writes)
        room = rooms[number % len(rooms)]
        place = copy_inputs(inputs, folder / f"limit_{number}")
        limited = attempt(place, limit=(write, room))
        stopped = limited.status == 1 and limited.errors.count("error:") == 1 and "Traceback" not in limited.errors
        last = attempt(place) if stopped else limited
        whole = last.status == 0 and read_results(place / "run") == expected and not find_litter(place)
        if whole and "is damaged" not in last.errors and "cannot be used" not in last.errors:
            ends["an error line, then the same bytes" if stopped else "the same bytes"] += 1
            phases[limited.phase] += stopped
            shutil.rmtree(place)
        else:
            differ.append(f"{place.name}: files end after {room} bytes from write {write} on, {limited.phase}")
    return {"limits": wanted, "limits_by_phase": dict(phases), "limits_end_in": dict(ends), "limits_that_differ": differ}


def stop_half_way(folder: Path, inputs: Path, reference: Attempt) -> Path:
    """Return a run that was killed while its student was trained: every cache entry is there, and two checkpoints."""
    for percent in range(50, 100, 2):
        half = copy_inputs(inputs, folder / f"half_{percent}")
        killed = attempt(half, kill_at_write=reference.writes * percent // 100)
        if killed.phase == "student" and len(list((half / "run" / "checkpoint").glob("*.ckpt"))) == 2:
            return half
        shutil.rmtree(half)
    raise AssertionError("no kill left two checkpoints")


def choose_moments(reference: Attempt, generator: random.Random) -> Iterator[int | float]:
    """Yield, by turns, a write (an int) and a time in seconds at which to kill a run first.

    Multiples of the golden ratio spread any number of writes evenly over those of the run.
    """
    for number in count():
        yield 1 + int(((number + 0.5) * GOLDEN_RATIO) % 1.0 * reference.writes)
        yield generator.uniform(0.1, reference.seconds)


def hold_run_directory(folder: Path, holding: Any) -> None:
    """Claim a run directory and keep it; the target of a process that gets killed."""
    directory = RunDirectory(folder)
    directory._acquire()
    holding.set()
    signal.pause()
