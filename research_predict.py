"""Label a table of texts with a trained model.

    python research_predict.py --model results/first/student --dataset_path new.csv --output_path labelled.csv

Writes the same table with a column p_<label> (probability) and <label> (0 or 1, by the thresholds tuned on validation)
for each label. Normalisation and longest text are the model's own. A text's answer depends on the text alone, to the
last bit, whatever stands around it in the table. Killed and started again, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from research.errors import DONE, FAILED, InputError, describe_os_error
from research.flags import add_completion
from research.logs import accept_any_text, print_result, report_bad_input, report_interrupt, start_logging
from research.shipping.predict import predict_table
from research.shipping.scorers import open_scorer
from research.shipping.tables import STANDARD_STREAM
from research.storage.files import check_working_folder


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="research_predict.py",
        description=__doc__,
        epilog="Exit status: 0 done, 1 failed while running, 2 bad flags or input, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_completion(parser)
    parser.add_argument(
        "--model",
        required=True,
        type=os.path.expanduser,
        metavar="DIR",
        help="a run's student/ or teacher/, what research_export.py wrote, or a fine-tuned AutoModelForSequenceClassification",
    )
    parser.add_argument(
        "--dataset_path",
        required=True,
        type=os.path.expanduser,
        metavar="TABLE",
        help="table of texts: .csv, .tsv, .jsonl, .parquet (needs pyarrow), .xlsx (needs openpyxl), or - for CSV from "
        "standard input",
    )
    parser.add_argument(
        "--output_path",
        required=True,
        type=os.path.expanduser,
        metavar="TABLE",
        help="where to: .csv, .tsv, .jsonl, .parquet, or - for CSV to standard output",
    )
    parser.add_argument("--text_column", help="column holding the text (default: found by its name)")
    parser.add_argument("--prefix", default="", help="goes before the names of the new columns (default: nothing)")
    parser.add_argument("--int8", action="store_true", help="use the int8 model of an exported folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where torch computes (default: auto)")
    parser.add_argument("--num_threads", type=thread_count, metavar="N", help="CPU threads (default: the library's)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file at --output_path")
    return parser


def thread_count(text: str) -> int:
    """Read a number of threads, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Label a table; returns the exit status, 2 for a user's mistake, which is named in one line."""
    accept_any_text()
    arguments = build_parser().parse_args(argv)
    start_logging()
    try:
        check_working_folder()
        scorer = open_scorer(arguments.model, int8=arguments.int8, device=arguments.device, num_threads=arguments.num_threads)
        summary = predict_table(
            scorer,
            arguments.dataset_path,
            arguments.output_path,
            text_column=arguments.text_column,
            prefix=arguments.prefix,
            overwrite=arguments.overwrite,
        )
    except InputError as error:
        return report_bad_input(error)
    except KeyboardInterrupt:
        return report_interrupt()
    except BrokenPipeError:  # whoever read standard output, as head does, has enough
        return DONE
    except OSError as error:
        print(f"error: {describe_os_error(error, arguments.output_path)}", file=sys.stderr)
        return FAILED
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if arguments.output_path == STANDARD_STREAM:
        print(summary, file=sys.stderr)
        return DONE
    return print_result(f"{arguments.output_path}  {summary}")


if __name__ == "__main__":
    sys.exit(main())
