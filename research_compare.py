"""Put run directories side by side and say which differences are real.

    python research_compare.py results/alpha_* --group_by seed --format markdown

A row per run, or per group of runs that differ only by seed; a column for each flag that differs; the
score and the difference to a baseline with intervals and p value: over seeds and test rows of a group, over test
rows alone of a single run.
Works from the files of the run directories alone and never imports torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from research.compare.pages import write_comparison
from research.compare.scores import DEFAULT_METRICS, compare_runs
from research.compare.tables import FORMATS
from research.errors import BAD_INPUT, InputError, escape_controls
from research.evaluation.bootstrap import COMPARED_METRICS, RESAMPLES
from research.flags import add_completion
from research.logs import accept_any_text, print_result
from research.names import MODELS, PARTS
from research.runs.directory import RunDirectory
from research.storage.files import check_working_folder


def check_output(folder: Path) -> None:
    """Refuse to write a comparison over a run's own report.

    Raises:
        InputError: the folder holds a run.
    """
    if RunDirectory(folder).status() in ("finished", "unfinished"):
        raise InputError(f"--output {folder} holds a run, whose report.html would be overwritten. Give another folder.")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="research_compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_completion(parser)
    parser.add_argument(
        "runs", nargs="+", type=os.path.expanduser, metavar="DIR", help="run directories, or folders that hold some"
    )
    parser.add_argument(
        "--baseline",
        type=os.path.expanduser,
        metavar="DIR",
        help="what the others are compared with (default: a student_only run with the same data, seed and student "
        "flags, given or beside the runs; else the first run)",
    )
    parser.add_argument(
        "--group_by",
        choices=("seed", "fold"),
        help="one row for runs that differ only by seed, or for DIR/fold_1 ... DIR/fold_K (a cross-validated DIR is "
        "always one row)",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), default="table", help="what is printed (default: table)")
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="DIR",
        help="also write report.html, table.csv, table.md, table.tex, comparison.json and figures there",
    )
    parser.add_argument("--part", choices=PARTS[::-1], default="test", help="rows to score on (default: test)")
    parser.add_argument(
        "--model", choices=MODELS[::-1], help="whose predictions (default: the student's, the teacher's in a run without)"
    )
    add_statistics(parser)
    return parser


def add_statistics(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is measured and tested."""
    parser.add_argument(
        "--metric",
        type=metric_names,
        default=DEFAULT_METRICS,
        metavar="NAME,...",
        help="one or several, with commas between, corrected for together; figures show the first "
        f"(default: {','.join(DEFAULT_METRICS)}; possible: {', '.join(COMPARED_METRICS)})",
    )
    parser.add_argument(
        "--keeps",
        type=kept_share,
        metavar="SHARE",
        help="also test whether each student keeps this share of its teacher's score, as in 0.99",
    )
    parser.add_argument(
        "--resamples",
        type=resample_count,
        default=RESAMPLES,
        metavar="N",
        help=f"bootstrap resamples of the texts, 100 or more (default: {RESAMPLES})",
    )


def resample_count(text: str) -> int:
    """Read a number of resamples, 100 or more."""
    value = int(text)
    if value < 100:
        raise argparse.ArgumentTypeError(f"must be 100 or more, got {value}")
    return value


def metric_names(text: str) -> tuple[str, ...]:
    """Read the value of --metric."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in COMPARED_METRICS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no metric '{unknown[0]}'; choose from {', '.join(COMPARED_METRICS)}")
    return names


def kept_share(text: str) -> float:
    """Read the value of --keeps."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Print a comparison; returns the exit status, 2 for a user's mistake, which is named in one line."""
    accept_any_text()
    arguments = build_parser().parse_args(argv)
    try:
        check_working_folder()
        if arguments.output is not None:
            check_output(Path(arguments.output))
        comparison = compare_runs(
            arguments.runs,
            baseline=arguments.baseline,
            metrics=arguments.metric,
            part=arguments.part,
            model=arguments.model,
            group_by=arguments.group_by,
            resamples=arguments.resamples,
            keeps=arguments.keeps,
        )
        if arguments.output is not None:
            write_comparison(comparison, Path(arguments.output))
    except InputError as error:
        print(f"research_compare.py: {escape_controls(str(error))}", file=sys.stderr)
        return BAD_INPUT
    print(comparison.baseline_note, file=sys.stderr)
    for path in comparison.unfinished:
        print(f"unfinished, left out: {path}", file=sys.stderr)
    return print_result(FORMATS[arguments.format](comparison).removesuffix("\n"))


if __name__ == "__main__":
    sys.exit(main())
