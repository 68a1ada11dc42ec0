"""One command: find a finished run, or run it, and turn whatever stops it into one line and an exit status."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from research.distributed import ALONE, World, launch_command
from research.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    WEAK_TEACHER,
    InputError,
    Interrupted,
    StoppedElsewhere,
    StopRequest,
    TrainingFault,
    WeakTeacher,
    describe_lack_of_memory,
    describe_lost_process,
    describe_os_error,
    escape_controls,
    is_out_of_memory,
    is_process_lost,
    list_problems,
)
from research.experiment.dataset import load_dataset
from research.experiment.sources import check_models
from research.flags import fields_of_kind
from research.logs import LINE_OF_ONE, log_to_file, quiet_libraries, remembering, report_interrupt, report_problems
from research.runs.directory import DirectoryInUse, RunDirectory
from research.runs.formats import read_json
from research.text.tables import hash_table
from research_config import ExperimentConfig, saved_settings, table_paths

if TYPE_CHECKING:
    from research.experiment.inputs import Inputs
    from research.experiment.runtime import Extras, Runtime

log = logging.getLogger("research")
# SIGUSR1 is what batch systems send some time before they end a job; Windows has none.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
# What --dry_run says of a run directory, by what is in it.
WOULD_BE = {"absent": "written", "unfinished": "resumed", "finished": "answered from"}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, its metrics when it is finished, and what was wrong, one line a problem.

    Attributes:
        in_use: Whether nothing was done, since another process is at the run.
    """

    status: int
    metrics: dict[str, Any] | None = None
    problems: tuple[str, ...] = ()
    in_use: bool = False

    @property
    def problem(self) -> str:
        """What was wrong, in one line."""
        return escape_controls("; ".join(self.problems))


def run_one(
    config: ExperimentConfig, argv: list[str], extras: Extras | None = None, world: World = ALONE
) -> tuple[int, dict[str, Any] | None]:
    """Do one run, unless it is finished already; return its exit status and its metrics."""
    # Processes of torchrun hear a Ctrl-C from the terminal and again from torchrun.
    stop = StopRequest(told_twice=world.size > 1)
    with catching_signals(stop):
        outcome = attempt(config, argv, stop, extras, world=world)
    if outcome.status == INTERRUPTED:
        report_interrupt()
    elif outcome.status == BAD_INPUT:
        report_problems(outcome.problems)
    return outcome.status, outcome.metrics


def attempt(
    config: ExperimentConfig,
    argv: list[str],
    stop: StopRequest,
    extras: Extras | None = None,
    hold_first: bool = False,
    world: World = ALONE,
) -> Outcome:
    """Do one run, unless it is finished already; whatever stops it, but for a bug of our own, becomes its outcome.

    Args:
        hold_first: Keep other processes from the run before its inputs are read, as for runs that many share.
        world: The processes that do the run together.
    """
    try:
        metrics = world.lead(lambda: find_finished(config))
        if metrics is not None:
            log.info("%s is finished already", config.run_dir)
            return Outcome(DONE, metrics)
        with RunDirectory(config.run_dir) as run_dir:
            if hold_first:
                run_dir.hold()
            return Outcome(DONE, run(config, argv, stop, run_dir, extras, world))
    except InputError as error:
        return Outcome(BAD_INPUT, problems=list_problems(error), in_use=isinstance(error, DirectoryInUse))
    except StoppedElsewhere:
        return Outcome(FAILED)
    except RuntimeError as error:
        if not is_process_lost(error):
            raise
        return Outcome(RunFailed(FAILED, describe_lost_process(), of_one=True).status)
    except RunFailed as error:
        return Outcome(error.status, problems=(str(error),))
    except KeyboardInterrupt:
        return Outcome(INTERRUPTED)


class RunFailed(Exception):
    """A run that began and cannot go on; why has been logged in one line.

    Args:
        of_one: Whether only this process of the run knows of it, which then speaks whatever its number.
    """

    def __init__(self, status: int, message: str, *, of_one: bool = False) -> None:
        super().__init__(message)
        self.status = status
        log.error("error: %s", message, extra=LINE_OF_ONE if of_one else None)


def find_finished(config: ExperimentConfig) -> dict[str, Any] | None:
    """Return the metrics of the finished run in the output directory, None when there is work to do.

    Answers without importing torch.

    Raises:
        InputError: the directory holds a run of another config, or of tables or models that have changed since.
    """
    run_dir = RunDirectory(config.run_dir)
    if config.overwrite or run_dir.status() != "finished":
        return None
    run_dir.claim(saved_settings(config), unresolved=fields_of_kind(config, "column"))
    paths = table_paths(config)
    file_sha256 = {rows: hash_table(path) for rows, path in paths.items() if path.exists()}
    folds = [RunDirectory(run_dir.path / f"fold_{fold + 1}") for fold in range(config.num_folds)]
    for part in folds if config.num_folds > 1 else [run_dir]:
        part.check_tables(file_sha256, paths)
        check_models(part, config)
        part.drop_leavings()
    return read_json(run_dir.path / "metrics.json")


def run(
    config: ExperimentConfig,
    argv: list[str],
    stop: StopRequest,
    run_dir: RunDirectory,
    extras: Extras | None = None,
    world: World = ALONE,
) -> dict[str, Any] | None:
    """Check the inputs, claim the run directory and run; None after --dry_run and --prepare_only, which stop before that.

    Raises:
        InputError: a problem in what the user supplied; nothing has been written.
        RunFailed: the run began and cannot go on.
    """
    with remembering() as said:
        inputs, runtime = world.together(lambda: prepare(config, argv, stop, extras, world))
        # With torch and transformers: see `prepare`.
        from research.experiment.plan import describe_plan, describe_process
        from research.experiment.run import prepare_experiment, run_experiment, run_folds

        world.check_equal(describe_process(inputs, runtime))
        for line in describe_plan(inputs, runtime):
            log.info("%s", line)

    settings = saved_settings(inputs.config)
    if config.dry_run:
        status = world.lead(lambda: run_dir.preview(settings, overwrite=config.overwrite))
        log.info("dry run: %s would be %s; nothing was written", run_dir.path, WOULD_BE[status])
        return None
    if config.prepare_only:
        with explaining_failures(config):
            prepare_experiment(inputs, runtime, run_dir)
        log.info("prepared: %s finds in %s what it shares with other runs", run_dir.path, config.cache_dir)
        return None
    with explaining_failures(config):
        status = world.lead(lambda: run_dir.claim(settings, overwrite=config.overwrite))
    if status == "finished":
        return world.lead(lambda: read_json(run_dir.path / "metrics.json"))
    to_file = nullcontext() if world.rank else log_to_file(run_dir.path / "run.log", said)
    with to_file, explaining_failures(config):
        log.info("%s %s", "resuming" if status == "unfinished" else "writing", run_dir.path)
        if config.num_folds > 1:
            return run_folds(inputs.config, settings, runtime, run_dir, inputs)
        return run_experiment(inputs, runtime, run_dir)


def prepare(
    config: ExperimentConfig, argv: list[str], stop: StopRequest, extras: Extras | None, world: World
) -> tuple[Inputs, Runtime]:
    """Load and check the inputs, and choose where to compute.

    Raises:
        InputError: a problem in what the user supplied; nothing has been written.
    """
    dataset = load_dataset(config, fold=0 if config.num_folds > 1 else None)
    # With torch and transformers, which take seconds: a bad flag or table, --help and a finished run do without.
    from research.experiment.inputs import load_inputs
    from research.experiment.runtime import Extras, start_runtime

    quiet_libraries()
    runtime = start_runtime(config, [*launch_command(), *argv], stop, extras or Extras(), world)
    return load_inputs(dataset), runtime


@contextmanager
def explaining_failures(config: ExperimentConfig) -> Iterator[None]:
    """Turn what can stop a run into one logged line and an exit status; a bug of our own keeps its traceback."""
    try:
        yield
    except Interrupted:
        raise KeyboardInterrupt from None
    except WeakTeacher as error:
        raise RunFailed(WEAK_TEACHER, str(error)) from error
    except (TrainingFault, FloatingPointError) as error:
        # Processes see the same losses and logits; what has a cause is a lack of memory.
        raise RunFailed(FAILED, str(error), of_one=error.__cause__ is not None) from error
    except (RuntimeError, MemoryError) as error:
        if is_process_lost(error):
            raise RunFailed(FAILED, describe_lost_process(), of_one=True) from error
        if not is_out_of_memory(error):
            raise
        raise RunFailed(FAILED, describe_lack_of_memory(config.max_length), of_one=True) from error
    except OSError as error:
        raise RunFailed(FAILED, describe_os_error(error, str(config.run_dir)), of_one=True) from error


@contextmanager
def catching_signals(stop: StopRequest) -> Iterator[None]:
    """Let signals ask for a stop inside, as `answer_signals` does."""
    previous = answer_signals(stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def answer_signals(stop: StopRequest) -> dict[signal.Signals, Any]:
    """Turn the first of STOP_SIGNALS into a request to stop after the step; return the handlers before.

    A second one stops at once, as does the first one while no step is being taken.
    """

    def handle(_number: int, _frame: Any) -> None:
        again, stop.requested = stop.requested, True
        if again and stop.told_twice:
            return
        if again or not stop.heeded:
            raise KeyboardInterrupt
        if not stop.told_twice:  # whoever tells a worker twice says so itself
            log.warning("stopping after this step, with a checkpoint")

    return {number: signal.signal(number, handle) for number in STOP_SIGNALS}
