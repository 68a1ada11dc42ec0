"""A grid of runs from one command, shared out to worker processes, and with other commands of the same sweep.

Each worker imports the libraries once, keeps the tables and the tokenised text of its last run, and goes
from run to run. A run leaves the directory that the same command by itself would leave. Any number of commands, on any
machines that see the same folder, may work at one sweep: a run is done by whoever claims it first, and by another one
if that dies.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.compare.pages import write_comparison
from research.compare.scores import compare_runs
from research.compare.tables import FORMATS
from research.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, InputError, StopRequest, first_line, list_problems
from research.experiment.command import Outcome, attempt, catching_signals, find_finished
from research.experiment.grid import command_line, expand_sweep, parse_sweep, shell_lines
from research.experiment.overwriting import Overwriting
from research.experiment.sharing import Shard, find_shard, settle_jobs, shell_threads, threads_per_run
from research.experiment.slurm import submit_sweep
from research.experiment.sweep_progress import SweepProgress
from research.experiment.sweep_worker import Task, run_in_worker, settle_on_machine
from research.experiment.workers import Pool
from research.flags import fields_of_kind
from research.logs import log_to_file, print_result, report_interrupt
from research.runs.directory import RunDirectory
from research.runs.run import best_line, result_line, validation_score
from research.storage.claims import Claim
from research_config import ExperimentConfig, saved_settings

if TYPE_CHECKING:
    from research.experiment.runtime import Extras

log = logging.getLogger("research")
COMPARISON = "comparison"
# How often runs that other processes are at are looked at, once there are no others to do.
LOOK_S = 2.0
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
    config, shard, grid = settle_jobs(config), find_shard(config.sweep_shard), expand_sweep(config)
    part = shard.numbers(len(grid))
    if config.print_commands:
        return print_result("\n".join(shell_lines([grid[number] for number in part], shell_threads(config, len(grid)))))
    if config.launcher == "slurm" and not config.dry_run:
        return print_result("\n".join(submit_sweep(config, len(grid))))
    overwriting = Overwriting(config, grid)
    runs = [overwriting.settle(run) for run in grid]
    outcomes = {number: outcome for number in part if (outcome := look_up(runs[number])) is not None}
    if config.dry_run:
        return print_plan(folder, {number: runs[number] for number in part}, outcomes)
    if config.prepare_only:
        return prepare_grid(config, runs, outcomes, stop, extras)
    folder.mkdir(parents=True, exist_ok=True)
    with log_to_file(log_path(config)), alone_if_overwriting(config):
        if not config.overwrite:
            overwriting.end()
        run_missing(config, runs, part, outcomes, overwriting, stop, extras)
        if stop.requested:
            return report_interrupt()
        if all(outcome.metrics for outcome in outcomes.values()):
            overwriting.end()
        return report_part(config, runs, shard, outcomes)


def log_path(config: ExperimentConfig) -> Path:
    """Return the sweep's log; each part has its own, since a network file system mixes up what several append."""
    part = f"_{find_shard(config.sweep_shard)}".replace("/", "_of_") if config.sweep_shard else ""
    return config.run_dir / f"sweep{part}.log"


@contextmanager
def alone_if_overwriting(config: ExperimentConfig) -> Iterator[None]:
    """Refuse a second command that would overwrite what the first one makes afresh.

    Raises:
        InputError: there is one.
    """
    claim = Claim(config.run_dir / "overwriting.lock")
    if config.overwrite and not claim.acquire():
        raise InputError(f"--overwrite: another process is overwriting {config.run_dir}. Wait for it.")
    try:
        yield
    finally:
        claim.release()


def look_up(config: ExperimentConfig) -> Outcome | None:
    """Return the outcome of a run that is finished already or refused, None when there is something to do."""
    try:
        columns = fields_of_kind(config, "column")
        RunDirectory(config.run_dir).preview(saved_settings(config), config.overwrite, columns)
        metrics = find_finished(config)
    except InputError as error:
        return Outcome(BAD_INPUT, problems=list_problems(error))
    return None if metrics is None else Outcome(DONE, metrics)


def print_plan(folder: Path, runs: Mapping[int, ExperimentConfig], outcomes: Outcomes) -> int:
    """Say of every run whether it is done; return the exit status that the sweep could have at best."""
    for number, run in runs.items():
        outcome = outcomes.get(number)
        state = "to do" if outcome is None else "done" if outcome.metrics else f"refused: {outcome.problem}"
        print(f"{run.run_dir}  {state}")
    done = sum(outcome.metrics is not None for outcome in outcomes.values())
    refused = len(outcomes) - done
    counts = f"{done} done, {len(runs) - len(outcomes)} to do" + (f", {refused} refused" if refused else "")
    print(f"{folder}  {len(runs)} runs: {counts}")
    return max((outcome.status for outcome in outcomes.values()), default=DONE)


def prepare_grid(
    config: ExperimentConfig, runs: Sequence[ExperimentConfig], outcomes: Outcomes, stop: StopRequest, extras: Extras | None
) -> int:
    """Put into the cache what the runs that are still to do will look for there; return the exit status."""
    settle_on_machine(Task(config, extras, threads_per_run(config, len(runs)), Path()), 0)
    for number, run in enumerate(runs):
        if number in outcomes:
            continue
        outcomes[number] = outcome = attempt(run, command_line(run), stop, extras)
        if outcome.status == INTERRUPTED:
            return report_interrupt()
    for number, outcome in sorted(outcomes.items()):
        if outcome.status != DONE:
            log.error("%s: failed: %s", runs[number].run_dir, outcome.problem)
    status = max(outcome.status for outcome in outcomes.values())
    prepared = sum(outcome.status == DONE for outcome in outcomes.values())
    return status or print_result(f"{config.cache_dir}  prepared for {prepared} of {len(runs)} runs of {config.run_dir}")


# Running


def run_missing(
    config: ExperimentConfig,
    runs: Sequence[ExperimentConfig],
    part: Sequence[int],
    outcomes: Outcomes,
    overwriting: Overwriting,
    stop: StopRequest,
    extras: Extras | None,
) -> None:
    """Do the runs of a part that have no outcome yet, saying what happens, and add theirs, until a stop is requested.

    Those that other processes are at are waited for, and done if nobody is at them any more.
    """
    left = [number for number in part if number not in outcomes]
    num_workers = min(config.jobs, len(left))
    log.info("sweep of %d runs in %s: %d are done, %d at a time", len(part), config.run_dir, len(outcomes), num_workers)
    progress = SweepProgress(runs, left, num_workers)
    waits = False
    while left and not stop.requested:
        free = [number for number in left if RunDirectory(runs[number].run_dir).holder() is None]
        with closing(do_runs(config, runs, free, progress, stop, extras)) as done:
            for number, outcome in done:
                outcomes[number] = outcome
                if outcome.metrics is not None:
                    overwriting.note(runs[number])
        left = [number for number in left if number not in outcomes]
        for number in left:
            if RunDirectory(runs[number].run_dir).status() == "finished" and (found := look_up(runs[number])) is not None:
                outcomes[number] = found
                progress.end_elsewhere(number, found)
        left = [number for number in left if number not in outcomes]
        if left and not stop.requested:
            if not waits:
                log.info("waiting for other processes, which are at %d of the runs", len(left))
            waits = True
            time.sleep(LOOK_S)


def do_runs(
    config: ExperimentConfig,
    runs: Sequence[ExperimentConfig],
    numbers: Sequence[int],
    progress: SweepProgress,
    stop: StopRequest,
    extras: Extras | None,
) -> Generator[tuple[int, Outcome], None, None]:
    """Share runs out to workers and yield the outcome of each that no other process was at."""
    threads = threads_per_run(config, len(runs))
    tasks = [Task(runs[number], extras, threads, log_path(config)) for number in numbers]
    stop.heeded = True
    with closing(Pool(tasks, run_in_worker, min(config.jobs, len(tasks)), stop).run()) as events:
        for event in events:
            number = numbers[event.task]
            if event.kind == "started":
                progress.start(number)
            elif event.kind == "said":
                progress.warn(number, event.value)
            elif event.kind == "died":
                progress.die(number, event.value)
            else:
                outcome = event.value if event.kind == "ended" else lost(event.value)
                if outcome.in_use:
                    progress.leave(number)
                    continue
                progress.end(number, outcome)
                yield number, outcome
    stop.heeded = False


def lost(how: str) -> Outcome:
    """Return the outcome of a run whose process died time and again."""
    return Outcome(FAILED, problems=(f"its process {how}, twice. If memory ran out, lower --jobs or --batch.",))


# The end


def report_part(config: ExperimentConfig, runs: Sequence[ExperimentConfig], shard: Shard, outcomes: Outcomes) -> int:
    """Report the whole grid when all of it is finished, else the part; return the exit status.

    Whoever finishes the last run finds the others finished, so that the comparison is made however they are shared out.
    """
    if shard.count == 1:
        return report(config, runs, outcomes)
    others = [number for number in range(len(runs)) if number not in outcomes]
    found = {number: look_up(runs[number]) for number in others if RunDirectory(runs[number].run_dir).status() == "finished"}
    everything = outcomes | {number: outcome for number, outcome in found.items() if outcome is not None}
    if len(everything) == len(runs) and all(outcome.metrics for outcome in everything.values()):
        return report(config, runs, everything)
    finished = {number: outcome.metrics for number, outcome in sorted(outcomes.items()) if outcome.metrics is not None}
    for number, metrics in finished.items():
        print(result_line(runs[number].run_dir, metrics))
    report_failed(runs, outcomes)
    done = sum(outcome.metrics is not None for outcome in everything.values())
    log.info("the comparison is made by whoever finishes the last run, or by the same command without --sweep_shard")
    print(f"{config.run_dir}  part {shard}: {len(finished)} of {len(outcomes)} runs; {done} of {len(runs)} of the sweep")
    return max((outcome.status for outcome in outcomes.values()), default=DONE)


def report_failed(runs: Sequence[ExperimentConfig], outcomes: Outcomes) -> None:
    """Name the runs that have failed."""
    for number, outcome in sorted(outcomes.items()):
        if outcome.metrics is None:
            log.error("%s: failed: %s", runs[number].run_dir, outcome.problem)


def report(config: ExperimentConfig, runs: Sequence[ExperimentConfig], outcomes: Mapping[int, Outcome]) -> int:
    """Print the finished runs in the order of the grid, their comparison and the best one; name the failed ones."""
    ends = [(run, outcomes[number]) for number, run in enumerate(runs)]
    finished = [(run.run_dir, outcome.metrics) for run, outcome in ends if outcome.metrics is not None]
    for path, metrics in finished:
        print(result_line(path, metrics))
    if len(finished) > 1:
        compare_finished(config, [path for path, _ in finished])
    report_failed(runs, dict(outcomes))
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
    claim = Claim(config.run_dir / f"{COMPARISON}.lock")
    try:
        comparison = compare_runs(paths, group_by="seed" if len(swept) > 1 and "seed" in swept else None)
        if claim.acquire():  # else another process is writing the same
            write_comparison(comparison, folder)
    except Exception as error:  # a bug in it must not make finished runs look failed
        log.warning("the runs were not compared: %s", first_line(error))
        return
    finally:
        claim.release()
    log.info("%s", comparison.baseline_note)
    sys.stdout.write(FORMATS["table"](comparison))
    log.info("the same with figures: %s", folder / "report.html")
