"""One run of a sweep in a worker process."""

from __future__ import annotations

import logging
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from research.errors import FAILED, StopRequest, first_line
from research.experiment.command import Outcome, attempt
from research.experiment.grid import command_line
from research.experiment.sharing import choose_card
from research.experiment.workers import Say
from research.logs import log_to_file, start_logging
from research.runs.directory import RunDirectory
from research_config import ExperimentConfig

if TYPE_CHECKING:
    from research.experiment.runtime import Extras

log = logging.getLogger("research")


@dataclass(frozen=True)
class Task:
    """What a worker is told of a run.

    Attributes:
        threads: How many it may have at most when --num_threads does not say; None leaves it to torch.
        log: The sweep's log, for what libraries print.
    """

    config: ExperimentConfig
    extras: Extras | None
    threads: int | None
    log: Path


class Saying(logging.Handler):
    """Passes warnings on to the sweep; what ends a run comes with its outcome, and its log has everything."""

    def __init__(self, say: Say) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on."""
        if record.levelno < logging.ERROR:
            self.say(record.getMessage())


def run_in_worker(task: Task, worker: int, stop: StopRequest, say: Say) -> Outcome:
    """Do one run in this process, whose output goes to the sweep's log, unless another process is at it."""
    redirect_output(task.log)
    start_logging()
    logging.getLogger().handlers[:] = [Saying(say)]
    try:
        settle_on_machine(task, worker)
        return attempt(task.config, command_line(task.config), stop, task.extras, hold_first=True)
    except Exception as error:  # a bug costs the run it is in, and no other
        what = f"{type(error).__name__}: {first_line(error)}"
        return Outcome(FAILED, problems=(f"{what}. {save_traceback(task)}",))


def redirect_output(path: Path) -> None:
    """Append what anything in this process prints to a file."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError:  # a full disk is told by the run
        file = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)


def settle_on_machine(task: Task, worker: int) -> None:
    """Take the worker's share of the cores and, where there are several cards, one of them.

    Neither stands in the run's config: which worker did it makes it no other run.
    """
    import torch  # slow, and not needed by the process that starts the workers

    if task.config.num_threads is None and task.threads is not None:
        torch.set_num_threads(min(task.threads, torch.get_num_threads()))
    cards = torch.cuda.device_count()
    if task.config.device in ("auto", "cuda") and cards > 1:
        torch.cuda.set_device(choose_card(worker, cards))


def save_traceback(task: Task) -> str:
    """Write the traceback of the error being handled to the run's log, or to the sweep's; say where it stands."""
    began = RunDirectory(task.config.run_dir).status() in ("unfinished", "finished")
    path = task.config.run_dir / "run.log" if began else task.log
    with log_to_file(path):
        log.critical("%s", traceback.format_exc())
    return f"Its traceback stands in {path}."
