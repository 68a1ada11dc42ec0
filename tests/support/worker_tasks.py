"""What the tests of the worker processes let them do; each is found by its name in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from research.errors import StopRequest
from research.experiment.workers import Pool, Say


def answer(task: Any, worker: int, _stop: StopRequest, say: Say) -> Any:
    """Return what the task asks for, or end in the way that it asks for."""
    kind, value = task
    if kind == "say":
        say(value)
    elif kind == "exit":
        os._exit(value)
    elif kind == "kill self":
        os.kill(os.getpid(), value)
        time.sleep(30)
    elif kind == "kill self once":
        place = Path(value)
        if not place.exists():
            place.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "sleep":
        Path(value).write_text(str(os.getpid()), encoding="utf-8")
        time.sleep(60)
    return (kind, value, worker)


def train(task: Any, _worker: int, stop: StopRequest, _say: Say) -> Any:
    """Take steps, as a trainer does, until a stop is requested; then leave a checkpoint."""
    place = Path(task)
    stop.heeded = True
    place.write_text(str(os.getpid()), encoding="utf-8")
    for _ in range(600):
        time.sleep(0.1)
        if stop.requested:
            time.sleep(0.5)  # a second signal arrives meanwhile
            place.with_suffix(".checkpoint").touch()
            raise KeyboardInterrupt
    return task


def main() -> None:
    """Let two workers sleep until this process is killed."""
    tasks = [("sleep", name) for name in sys.argv[1:]]
    with closing(Pool(tasks, answer, len(tasks), StopRequest()).run()) as events:
        for _ in events:
            pass


if __name__ == "__main__":
    main()
