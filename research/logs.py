"""Messages to stderr and to a run's log file, and how far a phase is."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from research.distributed import launched_rank
from research.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, InputError, escape_controls, list_problems

log = logging.getLogger(__name__)
Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30.0
# Marks the lines that a terminal does not show, since a bar does.
PROGRESS_LINE = {"is_progress": True}
# Marks the lines that a process of a run says though it is not the first, which speaks for all.
LINE_OF_ONE = {"is_of_one": True}


def start_logging(level: int = logging.INFO) -> None:
    """Send one-line messages to stderr, so stdout holds nothing but the result.

    Of several processes of a run the first speaks; another only of what it alone knows, with its number.
    """
    accept_any_text()
    rank = launched_rank()
    logging.basicConfig(format=f"{_speaker()}%(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    handler = logging.getLogger().handlers[0]
    handler.setLevel(level)
    if rank:
        handler.addFilter(lambda record: hasattr(record, "is_of_one"))
    handler.addFilter(lambda record: not (hasattr(record, "is_progress") and sys.stderr.isatty()))
    # These libraries log what is not the user's business at info level.
    for name in ("httpx", "matplotlib", "fontTools", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _speaker() -> str:
    """Return what the lines of this process begin with."""
    return f"process {launched_rank()}: " if launched_rank() else ""


def accept_any_text() -> None:
    """Let stdout take any text, as stderr does by itself.

    A path's bytes leave as they came where stdout is UTF-8; an ASCII stdout shows what it cannot hold as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding.lower() == "utf-8" else "backslashreplace")


class LogFile(logging.FileHandler):
    """A run's log: a full disk costs its last lines, not the run, and nothing is said of it on stderr."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message; a disk that is full loses it."""
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Report a fault of our own; one of the disk is not worth a traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file, full disk or not."""
        with suppress(OSError):
            super().close()


class Remembering(logging.Handler):
    """Keeps messages that come before there is a log file."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.records.append(record)


@contextmanager
def remembering() -> Iterator[list[logging.LogRecord]]:
    """Collect what is logged inside, besides logging it."""
    handler = Remembering()
    logging.getLogger().addHandler(handler)
    try:
        yield handler.records
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def log_to_file(path: Path, earlier: Iterable[logging.LogRecord] = ()) -> Iterator[None]:
    """Write every message to the run's log too, after those that came before the run had a folder."""
    handler = LogFile(path)
    for record in earlier:
        handler.handle(record)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def print_result(text: str) -> int:
    """Print what a command found to stdout, and return the exit status.

    A reader that has gone, as `head` does, wants no more; a full disk is an error. Of several processes of a run
    the first prints.
    """
    if launched_rank():
        return DONE
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop_stdout()
    except OSError as error:
        _drop_stdout()
        print(f"error: stdout cannot be written: {error.strerror}", file=sys.stderr)
        return FAILED
    return DONE


def _drop_stdout() -> None:
    """Point stdout at nothing: what is left in its buffer would fail again when Python ends."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_bad_input(error: InputError) -> int:
    """Say what is wrong, one line a problem, and return the exit status."""
    report_problems(list_problems(error))
    return BAD_INPUT


def report_problems(problems: Iterable[str]) -> None:
    """Write problems to stderr as the command's errors."""
    for problem in problems:
        print(f"{_speaker()}error: {escape_controls(problem)}", file=sys.stderr)


def report_interrupt() -> int:
    """Say how to go on after Ctrl-C, and return the exit status."""
    if launched_rank() == 0:
        print("interrupted: the same command goes on from here", file=sys.stderr)
    return INTERRUPTED


def quiet_libraries() -> None:
    """Silence reports and progress bars of transformers: what matters of them is checked and said in one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class PhaseProgress:
    """How far a phase is: a bar on a terminal, elsewhere and in the log file a line every 30 seconds.

    Args:
        name: The phase, as in "teacher evaluation".
        total: How many units it has, at most.
        unit: What is counted, in the plural.
        done: Units that an earlier process did; they say nothing of how long the others take.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.done_before = done
        self.started_s = self.last_line_s = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty() and launched_rank() == 0:
            from tqdm import tqdm  # for a terminal only, so that a log in a file costs nothing

            self.bar = tqdm(desc=name, total=total, unit=unit.removesuffix("s"), initial=done, leave=False)

    def __enter__(self) -> PhaseProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, count: int = 1) -> None:
        """Count units that have been done, and say so when it is time."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        now_s = time.monotonic()
        if now_s - self.last_line_s >= SECONDS_BETWEEN_LINES:
            self.last_line_s = now_s
            left_s = (now_s - self.started_s) * (self.total - self.done) / (self.done - self.done_before)
            share = 100 * self.done // self.total
            line = f"{self.name}: {share} % ({self.done:,} of {self.total:,} {self.unit}), {format_duration(left_s)} left"
            log.info(line, extra=PROGRESS_LINE)


def with_progress(items: Iterable[Item], name: str, total: int, unit: str = "batches") -> Iterator[Item]:
    """Pass items on, and say how far they are as `PhaseProgress` does."""
    with PhaseProgress(name, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def format_duration(seconds: float) -> str:
    """Return a time as exact as it is long: "0.8 s", "42 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
