"""Distil a multi-label text classifier: one command is one run.

python research_main.py --demo
python research_main.py --pipeline kd_only --dataset_path data/comments.csv --kd_alpha 0.7
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_config import Arguments, ExperimentConfig, FlagErrors, InputError, parse_arguments, saved_settings
from research_files import hash_file
from research_results import TABLE_FLAGS, RunDirectory, read_json, result_line

if TYPE_CHECKING:
    from research_faults import StopRequest

DONE, FAILED, BAD_INPUT, WEAK_TEACHER, INTERRUPTED = 0, 1, 2, 3, 130

log = logging.getLogger("research")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; the last line on stdout is the run and its headline."""
    argv = list(sys.argv[1:] if argv is None else argv)
    start_logging()
    try:
        arguments = parse_arguments(argv)
        config = apply_demo(arguments) if arguments.config.demo else arguments.config
        if config.sweep:
            from research_sweep import run_sweep

            return run_sweep(config)
    except InputError as error:
        return report_bad_input(error)
    except KeyboardInterrupt:
        return report_interrupt()
    status, metrics = run_one(config, argv)
    if metrics is not None:
        print(result_line(config.run_dir, metrics))
    return status


def run_one(config: ExperimentConfig, argv: list[str]) -> tuple[int, dict[str, Any] | None]:
    """Do one run, unless it is finished already; return its exit status and its metrics."""
    try:
        metrics = find_finished(config)
        return DONE, run(config, argv) if metrics is None else metrics
    except InputError as error:
        return report_bad_input(error), None
    except RunFailed as error:
        return error.status, None
    except KeyboardInterrupt:
        return report_interrupt(), None


def report_bad_input(error: InputError) -> int:
    """Say what is wrong, one line a fault."""
    for fault in error.faults if isinstance(error, FlagErrors) else (error,):
        print(f"error: {fault}", file=sys.stderr)
    return BAD_INPUT


def report_interrupt() -> int:
    print("interrupted: the same command goes on from here", file=sys.stderr)
    return INTERRUPTED


class RunFailed(Exception):
    """A run that began and cannot go on; why has been logged in one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        log.error("error: %s", message)


def apply_demo(arguments: Arguments) -> ExperimentConfig:
    """Fill the flags the user did not give with the demo's, and build its corpus and models."""
    from research_demo import DEMO_SETTINGS, build_demo

    config = arguments.config
    quiet_libraries()
    files = build_demo(Path(config.cache_dir) / "demo", config.split_seed)
    settings = {name: value for name, value in DEMO_SETTINGS.items() if name not in arguments.explicit}
    paths = {field.name: str(getattr(files, field.name)) for field in dataclasses.fields(files)}
    return dataclasses.replace(config, **(settings | paths))  # type: ignore[arg-type]


def find_finished(config: ExperimentConfig) -> dict[str, Any] | None:
    """Return the metrics of the finished run in the output directory, None when there is work to do.

    Answers without importing torch.

    Raises:
        InputError: the directory holds a run of another config or of another table.
    """
    run_dir = RunDirectory(config.run_dir)
    if config.overwrite or run_dir.status() != "finished":
        return None
    run_dir.claim(saved_settings(config))
    paths = {name: getattr(config, flag) for name, flag in TABLE_FLAGS.items()}
    file_sha256 = {name: hash_file(Path(path)) for name, path in paths.items() if path is not None and Path(path).is_file()}
    folds = [RunDirectory(run_dir.path / f"fold_{fold + 1}") for fold in range(config.num_folds)]
    for part in folds if config.num_folds > 1 else [run_dir]:
        part.check_tables(file_sha256, config)
        part.drop_checkpoints()
    log.info("%s is finished already", run_dir.path)
    return read_json(run_dir.path / "metrics.json")


def run(config: ExperimentConfig, argv: list[str]) -> dict[str, Any]:
    """Check the inputs, claim the run directory and run.

    Raises:
        InputError: a fault in what the user supplied; nothing has been written.
        RunFailed: the run began and cannot go on.
    """
    from research_inputs import load_inputs
    from research_run import Experiment, run_folds, start_runtime

    quiet_libraries()
    runtime = start_runtime(config, ["python", "research_main.py", *argv])
    inputs = load_inputs(config, fold=0 if config.num_folds > 1 else None)
    with RunDirectory(config.run_dir) as run_dir:
        with explaining_failures(config):
            status = run_dir.claim(saved_settings(inputs.config), overwrite=config.overwrite)
        if status == "finished":
            return read_json(run_dir.path / "metrics.json")
        with log_to_file(run_dir.path / "run.log"), catching_signals(runtime.stop), explaining_failures(config):
            log.info("%s %s", "resuming" if status == "unfinished" else "writing", run_dir.path)
            if config.num_folds > 1:
                return run_folds(inputs.config, runtime, run_dir, inputs)
            return Experiment(inputs, runtime, run_dir).run()


@contextmanager
def explaining_failures(config: ExperimentConfig) -> Iterator[None]:
    """Turn what can stop a run into one logged line and an exit status; a fault of our own keeps its traceback."""
    from research_faults import Interrupted, TrainingFault, describe_lack_of_memory, describe_os_error, is_out_of_memory
    from research_run import WeakTeacher

    try:
        yield
    except Interrupted:
        raise KeyboardInterrupt from None
    except WeakTeacher as error:
        raise RunFailed(WEAK_TEACHER, str(error)) from error
    except (TrainingFault, FloatingPointError) as error:
        raise RunFailed(FAILED, str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(FAILED, describe_lack_of_memory(config.max_length)) from error
    except OSError as error:
        raise RunFailed(FAILED, describe_os_error(error, str(config.run_dir))) from error


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
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
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


@contextmanager
def catching_signals(stop: StopRequest) -> Iterator[None]:
    """Turn the first SIGTERM or SIGINT into a request to stop after the step; a second one stops at once."""

    def handle(_number: int, _frame: Any) -> None:
        if stop.requested or not stop.heeded:
            raise KeyboardInterrupt
        stop.requested = True
        log.warning("stopping after this step, with a checkpoint")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
