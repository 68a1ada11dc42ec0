"""Folds times seeds of one or several recipes on a real table, as the table that docs/experiments.md shows.

    python benchmarks/evidence.py --output_dir results/evidence                    # days on two cores; goes on where it was
    python benchmarks/evidence.py --recipe wide "--student_layers 6" --recipe hidden "--kd_method hidden"
    python benchmarks/evidence.py --from results/evidence                          # the table of what is there, in seconds

Every recipe is one sweep over --seeds, its flags being those of --flags and its own after them, which win; tfidf, which
reads no seed, is one run. The first recipe is `distilled`, --flags alone: its control is the baseline of every row. Runs
are cross-validated, so scores are over all rows. A second call with the same arguments runs what is missing.

The table is what research_compare.py says of the same folders: scores ± standard deviation over seeds; the difference to
the control with its 95 % interval over seeds, rows and the folds' trainings, in bold where p stays under 0.05 after Holm's
correction for all of them; the share of the teacher's score that is kept with its lower one-sided 95 % bound, and the test
rows that would show 99 %. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from research.compare.scores import Comparison, Result, compare_runs, find_runs
from research.compare.tables import build_records
from research.errors import BAD_INPUT, InputError
from research.evaluation.bootstrap import RESAMPLES
from research.names import METRIC_OF
from research.report.numbers import format_number, format_p_value
from research.runs.run import load_run

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
KEEPS = 0.99
METRICS = ("f1_macro", "f1_macro_tuned", "average_precision_macro")
FLAGS = (
    "--lr 1e-4 --teacher_epochs 8 --epochs 12 --max_length 64 --pooling mean --student_layers 3 --amp_dtype bfloat16 "
    "--num_threads 1 --num_folds 5 --with_control"
)
TFIDF_FLAGS = "--pipeline tfidf --no-with_control --control_labels gold"
SEEDLESS = "tfidf"


def build_commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command of each recipe, by its name: a sweep over seeds, or one run of what reads none."""
    paths = ["--dataset_path", str(arguments.dataset), "--text_column", arguments.text_column]
    models = ["--teacher_path", str(arguments.teacher), "--student_path", str(arguments.student)]
    shared = [*paths, *models, *shlex.split(arguments.flags), "--cache_dir", str(arguments.cache_dir)]
    sweep = ["--sweep", f"seed={arguments.seeds}", "--jobs", str(arguments.jobs)]
    recipes = {"distilled": "", **dict(arguments.recipe)}
    flags = {name: [*shared, *shlex.split(own), *sweep] for name, own in recipes.items()}
    if not arguments.no_tfidf:
        flags = {SEEDLESS: [*shared, *shlex.split(TFIDF_FLAGS)], **flags}
    return {
        name: ["python", "research_main.py", *of_recipe, "--output_dir", str(arguments.output_dir / name)]
        for name, of_recipe in flags.items()
    }


def run_all(commands: dict[str, list[str]]) -> int:
    """Run the commands one after the other; returns the exit status of the first that fails, else 0."""
    for name, command in commands.items():
        print(f"{name}: {shlex.join(command)}", file=sys.stderr)
        if status := run_process(command):
            print(f"{name}: stopped with status {status}; the same call goes on from there", file=sys.stderr)
            return status
    return 0


def run_process(command: Sequence[str]) -> int:
    """Run a command of the suite in a process of its own, its output going to stderr; returns its exit status."""
    return subprocess.run([sys.executable, str(ROOT / command[1]), *command[2:]], check=False, stdout=sys.stderr).returncode


def compare(paths: Sequence[Path], baseline: str | None, resamples: int) -> tuple[Comparison, Comparison | None]:
    """Compare the finished runs below some folders, and the teachers of those that have one.

    Raises:
        InputError: there is none, or they cannot be compared.
    """
    finished, unfinished = find_runs(paths)
    if not finished:
        raise InputError(f"{unfinished[0]} is unfinished, and no run below {paths[0]} is finished yet.")
    for path in unfinished:
        print(f"unfinished, left out: {path}", file=sys.stderr)
    students = compare_runs(finished, baseline=baseline, metrics=METRICS, group_by="seed", resamples=resamples, keeps=KEEPS)
    taught = [path for path in finished if "teacher" in load_run(path).models]
    teachers = compare_runs(taught, model="teacher", metrics=METRICS, group_by="seed", resamples=resamples) if taught else None
    return students, teachers


def format_scores(students: Comparison, teachers: Comparison | None) -> str:
    """Return a Markdown table: each teacher, then the baseline and every other row with its differences."""
    columns = [f"{METRIC_OF[metric].full_label} | difference" for metric in METRICS]
    lines = [f"| | seeds | {' | '.join(columns)} |", "| --- | ---: |" + " ---: |" * (2 * len(METRICS))]
    seen: set[tuple[str, ...]] = set()
    for place, result in enumerate(teachers.results if teachers is not None else ()):
        assert teachers is not None
        scores = tuple(_format_score(teachers.by_metric[metric][place]) for metric in METRICS)
        if scores not in seen:  # recipes that share a teacher
            lines.append(f"| teacher of {result.row.name} | | {' | | '.join(scores)} | |")
            seen.add(scores)
    for place, result in enumerate(students.results):
        cells = [cell for metric in METRICS for cell in _format_result(students.by_metric[metric][place])]
        lines.append(f"| {result.row.name} | {len(result.row.seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _format_score(result: Result) -> str:
    """Return the score with its deviation over seeds where there are several that may differ."""
    return format_number(result.estimate.value) + (f" ± {format_number(result.std)}" if result.std > 0 else "")


def _format_result(result: Result) -> tuple[str, str]:
    found = result.difference
    if found is None:
        return _format_score(result), "baseline"
    low, high = format_number(found.low, sign="+"), format_number(found.high, sign="+")
    text = f"{format_number(found.value, sign='+')} [{low}, {high}]"
    text = f"**{text}**" if result.is_claim else text
    return _format_score(result), f"{text}, p {format_p_value(result.p_holm)}" + ("" if found.over_seeds else " (rows)")


def format_keeping(students: Comparison) -> str:
    """Return a Markdown table of what each row keeps of its teacher's score."""
    lines = [f"| | measure | share kept | at least | rows to show {100 * KEEPS:g} % |", "| --- | --- | ---: | ---: | ---: |"]
    for metric in METRICS:
        for result in students.by_metric[metric]:
            if found := result.keeping:
                needed = format_number(int(found.rows_needed)) if math.isfinite(found.rows_needed) else "no number"
                shares = f"{100 * found.kept_share:.2f} % | {100 * found.kept_share_low:.2f} %"
                lines.append(f"| {result.row.name} | {METRIC_OF[metric].full_label} | {shares} | {needed} |")
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results" / "evidence", help="a folder for each recipe")
    parser.add_argument(
        "--from", dest="existing", type=Path, nargs="+", metavar="DIR", help="run nothing, print the table of these"
    )
    parser.add_argument(
        "--recipe", nargs=2, action="append", default=[], metavar=("NAME", "FLAGS"), help="a further recipe; may be repeated"
    )
    parser.add_argument("--flags", default=FLAGS, help=f"what all recipes have in common (default: {FLAGS})")
    parser.add_argument("--seeds", default="1,2,3", help="seeds of each recipe (default: 1,2,3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--no_tfidf", action="store_true", help="leave out the row without a pretrained model")
    parser.add_argument("--dataset", type=Path, default=SHARED / "data" / "bn_cyberbully5.csv", help="the table")
    parser.add_argument("--text_column", default="comment", help="its text column (default: comment)")
    parser.add_argument("--teacher", type=Path, default=SHARED / "models" / "me5-small-bn", help="encoder of the teacher")
    parser.add_argument("--student", type=Path, default=SHARED / "models" / "me5-small-bn", help="encoder of the students")
    parser.add_argument("--cache_dir", type=Path, default=ROOT / "cache", help="shared by all runs")
    parser.add_argument("--baseline", help="run or folder that the others are compared with (default: the control)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"bootstrap resamples (default: {RESAMPLES})")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    start, commands = time.perf_counter(), build_commands(arguments)
    if arguments.existing is None and (status := run_all(commands)):
        return status
    try:
        students, teachers = compare(arguments.existing or [arguments.output_dir], arguments.baseline, arguments.resamples)
    except InputError as error:
        print(f"evidence.py: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{students.baseline_note}\n", file=sys.stderr)
    print(f"{format_scores(students, teachers)}\n\n{format_keeping(students)}\n")
    result = {
        "benchmark": "evidence",
        "commands": {} if arguments.existing else {name: shlex.join(command) for name, command in commands.items()},
        "rows": build_records(students),
        "wall_s": round(time.perf_counter() - start, 1),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
