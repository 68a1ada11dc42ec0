"""A grid of runs from one command, shared out to worker processes.

Each worker imports the libraries once, keeps the tables and the tokenised text of its last run, and goes
from run to run. A run leaves the directory that the same command by itself would leave.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.compare.pages import write_comparison
from research.compare.scores import compare_runs
from research.compare.tables import FORMATS
from research.errors import BAD_INPUT, DONE, FAILED, InputError, StopRequest, first_line, list_problems
from research.experiment.command import Outcome, attempt, catching_signals, find_finished
from research.experiment.grid import command_line, expand_sweep, parse_sweep
from research.experiment.overwriting import Overwriting
from research.experiment.sweep_progress import SweepProgress
from research.experiment.workers import Pool, Say
from research.flags import fields_of_kind
from research.logs import log_to_file, report_interrupt, start_logging
from research.runs.directory import RunDirectory
from research.runs.run import best_line, result_line, validation_score
from research_config import ExperimentConfig, saved_settings

if TYPE_CHECKING:
    from research.experiment.runtime import Extras

log = logging.getLogger("research")
LOG_FILE = "sweep.log"
COMPARISON = "comparison"
Outcomes = dict[int, Outcome]  # by the run's place in the grid


def run_sweep(config: ExperimentConfig, extras: Extras | None = None) -> int:
    """Run what is missing of the grid, print every run, their comparison and the best one; return the exit status.

    A run that fails is named as it fails and at the end; the others finish.

    Raises:
        InputError: the grid has a fault; nothing has been run.
    """
    stop = StopRequest()
    with catching_signals(stop):
        return run_grid(config, stop, extras)


def run_grid(config: ExperimentConfig, stop: StopRequest, extras: Extras | None) -> int:
    """Do what `run_sweep` says."""
    folder = config.run_dir
    if RunDirectory(folder).status() in ("unfinished", "finished"):
        raise InputError(f"--output_dir: {folder} holds a run; a sweep needs a folder that does not.")
    grid = expand_sweep(config)
    overwriting = Overwriting(config, grid)
    runs = [overwriting.settle(run) for run in grid]
    outcomes = {number: outcome for number, run in enumerate(runs) if (outcome := look_up(run)) is not None}
    if config.dry_run:
        return print_plan(folder, runs, outcomes)
    folder.mkdir(parents=True, exist_ok=True)
    with log_to_file(folder / LOG_FILE):
        if not config.overwrite:
            overwriting.end()
        run_missing(config, runs, outcomes, overwriting, stop, extras)
        if stop.requested:
            return report_interrupt()
        if all(outcome.metrics for outcome in outcomes.values()):
            overwriting.end()
        return report(config, runs, outcomes)


def look_up(config: ExperimentConfig) -> Outcome | None:
    """Return the outcome of a run that is finished already or refused, None when there is something to do."""
    try:
        columns = fields_of_kind(config, "column")
        RunDirectory(config.run_dir).preview(saved_settings(config), config.overwrite, columns)
        metrics = find_finished(config)
    except InputError as error:
        return Outcome(BAD_INPUT, problems=list_problems(error))
    return None if metrics is None else Outcome(DONE, metrics)


def print_plan(folder: Path, runs: Sequence[ExperimentConfig], outcomes: Outcomes) -> int:
    """Say of every run whether it is done; return the exit status that the sweep could have at best."""
    for number, run in enumerate(runs):
        outcome = outcomes.get(number)
        state = "to do" if outcome is None else "done" if outcome.metrics else f"refused: {outcome.problem}"
        print(f"{run.run_dir}  {state}")
    done = sum(outcome.metrics is not None for outcome in outcomes.values())
    refused = len(outcomes) - done
    counts = f"{done} done, {len(runs) - len(outcomes)} to do" + (f", {refused} refused" if refused else "")
    print(f"{folder}  {len(runs)} runs: {counts}")
    return max((outcome.status for outcome in outcomes.values()), default=DONE)


# Running


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


def run_missing(
    config: ExperimentConfig,
    runs: Sequence[ExperimentConfig],
    outcomes: Outcomes,
    overwriting: Overwriting,
    stop: StopRequest,
    extras: Extras | None,
) -> None:
    """Do the runs that have no outcome yet, saying what happens, and add theirs, until a stop is requested."""
    to_do = [number for number in range(len(runs)) if number not in outcomes]
    num_workers = min(config.jobs, len(to_do))
    threads = threads_per_run(config, len(runs))
    log.info("sweep of %d runs in %s: %d are done, %d at a time", len(runs), config.run_dir, len(outcomes), num_workers)
    progress = SweepProgress(runs, to_do, num_workers)
    tasks = [Task(runs[number], extras, threads, config.run_dir / LOG_FILE) for number in to_do]
    stop.heeded = True
    with closing(Pool(tasks, run_in_worker, num_workers, stop).run()) as events:
        for event in events:
            number = to_do[event.task]
            if event.kind == "started":
                progress.start(number)
            elif event.kind == "said":
                progress.warn(number, event.value)
            elif event.kind == "died":
                progress.die(number, event.value)
            else:
                outcome = event.value if event.kind == "ended" else lost(event.value)
                outcomes[number] = outcome
                if outcome.metrics is not None:
                    overwriting.note(runs[number])
                progress.end(number, outcome)
    stop.heeded = False


def lost(how: str) -> Outcome:
    """Return the outcome of a run whose process died time and again."""
    return Outcome(FAILED, problems=(f"its process {how}, twice. If memory ran out, lower --jobs or --batch.",))


def threads_per_run(config: ExperimentConfig, num_runs: int) -> int | None:
    """Return an equal share of the cores for the workers, None for one worker: several small runs beat one spread thin.

    It does not hang on how many runs are left, so a sweep that goes on uses what it used before.
    """
    workers = min(config.jobs, num_runs)
    if workers == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


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
    """Do one run in this process, whose output goes to the sweep's log."""
    redirect_output(task.log)
    start_logging()
    logging.getLogger().handlers[:] = [Saying(say)]
    try:
        settle_on_machine(task, worker)
        return attempt(task.config, command_line(task.config), stop, task.extras)
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
        torch.cuda.set_device(worker % cards)


def save_traceback(task: Task) -> str:
    """Write the traceback of the error being handled to the run's log, or to the sweep's; say where it stands."""
    began = RunDirectory(task.config.run_dir).status() in ("unfinished", "finished")
    path = task.config.run_dir / "run.log" if began else task.log
    with log_to_file(path):
        log.critical("%s", traceback.format_exc())
    return f"Its traceback stands in {path}."


# The end


def report(config: ExperimentConfig, runs: Sequence[ExperimentConfig], outcomes: Mapping[int, Outcome]) -> int:
    """Print the finished runs in the order of the grid, their comparison and the best one; name the failed ones."""
    ends = [(run, outcomes[number]) for number, run in enumerate(runs)]
    finished = [(run.run_dir, outcome.metrics) for run, outcome in ends if outcome.metrics is not None]
    for path, metrics in finished:
        print(result_line(path, metrics))
    if len(finished) > 1:
        compare_finished(config, [path for path, _ in finished])
    for run, outcome in ends:
        if outcome.metrics is None:
            log.error("%s: failed: %s", run.run_dir, outcome.problem)
    best = ""
    if finished:
        path, metrics = max(finished, key=lambda entry: choice_score(entry[1], config.select_by))
        best = f"; best on validation: {best_line(path, metrics, config.select_by)}"
    print(f"{config.run_dir}  {len(finished)} of {len(runs)} runs{best}")
    return max(outcome.status for _, outcome in ends)


def choice_score(metrics: Mapping[str, Any], metric: str) -> float:
    """Return what the best run has most of: its score on validation, so that its test score is no choice of the best."""
    score = validation_score(metrics, metric)
    return -1.0 if score is None else score


def compare_finished(config: ExperimentConfig, paths: Sequence[Path]) -> None:
    """Print the table of research_compare.py and write its page; the runs stand without it."""
    folder = config.run_dir / COMPARISON
    swept = parse_sweep(config.sweep)
    try:
        comparison = compare_runs(paths, group_by="seed" if len(swept) > 1 and "seed" in swept else None)
        write_comparison(comparison, folder)
    except Exception as error:  # a bug in it must not make finished runs look failed
        log.warning("the runs were not compared: %s", first_line(error))
        return
    log.info("%s", comparison.baseline_note)
    sys.stdout.write(FORMATS["table"](comparison))
    log.info("the same with figures: %s", folder / "report.html")
