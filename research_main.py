"""Distil a multi-label text classifier: one command is one run.

python research_main.py --demo
python research_main.py --pipeline kd_only --dataset_path data/comments.csv --kd_alpha 0.7
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.distributed import World, check_launch, join_world, launched_rank
from research.errors import BAD_INPUT, DONE, InputError
from research.experiment.demo import DEMO_SETTINGS, build_demo
from research.flags import HelpAsked
from research.logs import print_result, quiet_libraries, report_bad_input, report_interrupt, start_logging
from research.settings.search import smallest_batch
from research.storage.files import check_working_folder
from research_config import Arguments, ExperimentConfig, parse_arguments

if TYPE_CHECKING:
    from research.experiment.runtime import Extras


def main(argv: Sequence[str] | None = None, extras: Extras | None = None) -> int:
    """Run one command and return its exit status; the last line on stdout is the run and its headline.

    Args:
        extras: What to cut short because no result depends on it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    start_logging()
    try:
        check_working_folder()
        return run_arguments(parse_arguments(argv), argv, extras)
    except HelpAsked as asked:
        return print_result(str(asked))
    except InputError as error:
        # The flags are the same in every process of a run.
        return BAD_INPUT if launched_rank() else report_bad_input(error)
    except KeyboardInterrupt:
        return report_interrupt()


def run_arguments(arguments: Arguments, argv: list[str], extras: Extras | None) -> int:
    """Run the demo, a sweep or one run."""
    # With numpy, which --help and a bad flag do without.
    from research.experiment.command import RunFailed, run_one
    from research.runs.run import result_line

    check_launch(arguments.config, smallest_batch(arguments.config))
    world = join_world(arguments.config.device)
    try:
        config = apply_demo(arguments, world) if arguments.config.demo else arguments.config
    except RunFailed as error:
        return error.status
    if config.sweep:
        from research.experiment.sweep import run_sweep  # with what compares runs, for --sweep alone

        return run_sweep(config, extras)
    status, metrics = run_one(config, argv, extras, world)
    if status == DONE:
        world.leave()
    return status if metrics is None else print_result(result_line(config.run_dir, metrics))


def apply_demo(arguments: Arguments, world: World) -> ExperimentConfig:
    """Fill the flags the user did not give with the demo's, and build its corpus and models."""
    # With torch, which a bad flag does without.
    from research.experiment.command import explaining_failures
    from research.models.saved import raising_os_errors

    config = arguments.config
    quiet_libraries()
    folder = Path(config.cache_dir) / "demo"
    with explaining_failures(config), raising_os_errors(folder):
        files = world.lead(lambda: build_demo(folder, config.split_seed))
    settings = {name: value for name, value in DEMO_SETTINGS.items() if name not in arguments.explicit}
    paths = {field.name: str(getattr(files, field.name)) for field in dataclasses.fields(files)}
    return dataclasses.replace(config, **(settings | paths))  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
