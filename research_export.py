"""Export a trained model of a run to ONNX, in float32 and int8.

    python research_export.py results/first --int8
    python research_predict.py --model results/first/student_onnx --int8 --dataset_path new.csv --output_path labelled.csv

Writes results/first/student_onnx/, which ONNX Runtime, optimum and transformers.js read, and checks it: the largest
difference to torch, the scores on the run's test part with intervals, size and speed side by side (export.html).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.errors import FAILED, InputError, describe_os_error
from research.flags import add_completion
from research.logs import accept_any_text, print_result, quiet_libraries, report_bad_input, report_interrupt, start_logging
from research.names import HEADLINE_METRIC
from research.storage.files import check_working_folder


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="research_export.py",
        description=__doc__,
        epilog="Exit status: 0 done, 1 failed while running, 2 bad flags or input, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_completion(parser)
    parser.add_argument("run", type=os.path.expanduser, metavar="RUN", help="a finished run, or a fold of one")
    parser.add_argument("--model", choices=("student", "teacher"), default="student", help="which model (default: student)")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="what to write (default: onnx)")
    parser.add_argument("--int8", action="store_true", help="also write an int8 model, its scales fixed on training texts")
    parser.add_argument(
        "--calibration_path",
        type=os.path.expanduser,
        metavar="TABLE",
        help="texts to fix int8 scales and to check on, where the run's own table is not at hand; nothing is scored then",
    )
    parser.add_argument("--text_column", help="column of --calibration_path holding the text (default: found by its name)")
    parser.add_argument("--overwrite", action="store_true", help="replace what was exported before")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export a model; returns the exit status, 2 for a user's mistake, which is named in one line."""
    accept_any_text()
    arguments = build_parser().parse_args(argv)
    start_logging()
    # With numpy, which --help and a bad flag do without.
    from research.shipping.export import export_model

    try:
        check_working_folder()
        quiet_libraries()
        folder, facts = export_model(
            arguments.run,
            arguments.model,
            int8=arguments.int8,
            calibration_path=arguments.calibration_path,
            text_column=arguments.text_column,
            overwrite=arguments.overwrite,
        )
    except InputError as error:
        return report_bad_input(error)
    except KeyboardInterrupt:
        return report_interrupt()
    except OSError as error:
        print(f"error: {describe_os_error(error, arguments.run)}", file=sys.stderr)
        return FAILED
    return print_result(result_line(folder, facts))


def result_line(folder: Path, facts: dict[str, Any]) -> str:
    """Return the last line: the folder and each form's score or, without one, its size."""
    scores = facts.get("scores")
    if scores is None:
        return f"{folder}  " + ", ".join(f"{name} {form['size_mb']:.1f} MB" for name, form in facts["forms"].items())
    found = ", ".join(f"{name} {score['value']:.4f}" for name, score in scores[HEADLINE_METRIC.name].items())
    return f"{folder}  test {HEADLINE_METRIC.name}: {found}"


if __name__ == "__main__":
    sys.exit(main())
