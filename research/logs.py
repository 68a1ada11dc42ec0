"""Messages to stderr and to a run's log file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def start_logging(level: int = logging.INFO) -> None:
    """Send one-line messages to stderr, so stdout holds nothing but the result."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].setLevel(level)
    # These libraries log what is not the user's business at info level.
    for name in ("filelock", "httpx", "matplotlib", "fontTools", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)


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


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Write every message to the run's log too."""
    handler = LogFile(path)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def quiet_libraries() -> None:
    """Silence reports and progress bars of transformers: what matters of them is checked and said in one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
