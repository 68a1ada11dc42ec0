"""Put run directories side by side and say which differences are real.

    python research_compare.py results/alpha_* --group_by seed --format markdown

A row per run, or per group of runs that differ only by seed; a column for each flag that differs; the
score with a bootstrap interval over the test rows; the difference to a baseline with interval and p value.
Works from the files of the run directories alone and never imports torch.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import research_statistics as statistics
from research_comparison import Comparison, Result, compare_runs
from research_config import InputError
from research_results import MODELS, PARTS, format_flag, to_plain, write_text_atomic

LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # a bare one at the start of a line would be an argument of the \\ before it
    "]": "{]}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~$#])")


# What the table holds


def build_records(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one {column: value} per row, for machines: numbers of six digits, None where there is none.

    The columns are the same in every row; those on seeds or folds are there only when a row has several.
    """
    return [_build_record(result, comparison) for result in comparison.results]


def _build_record(result: Result, comparison: Comparison) -> dict[str, Any]:
    metric, estimate = comparison.metric, result.estimate
    record: dict[str, Any] = {"run": result.row.name}
    record |= {f"{name}": result.row.settings.get(name) for name in comparison.flags}
    if comparison.grouped:
        record["runs"] = len(result.values)
    record |= {metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
    if comparison.grouped:
        record[f"{metric}_std"] = result.std
    difference = result.difference
    record |= {
        "difference": difference and difference.value,
        "difference_low": difference and difference.low,
        "difference_high": difference and difference.high,
        "p": difference and difference.p_value,
        "p_holm": result.p_holm,
    }
    if comparison.grouped:
        unit = comparison.unit
        record |= {f"p_{unit}s": result.p_members, f"p_{unit}s_holm": result.p_members_holm}
        record[f"p_{unit}s_sign_flip"] = result.p_sign_flip
    return {name: _round(value) for name, value in record.items()}


def _round(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def build_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table for readers, as plain text."""
    grouped, unit = comparison.grouped, comparison.unit
    header = ["run", *comparison.flags, *(["runs"] if grouped else []), comparison.metric, "95 % interval"]
    header += ["sd"] if grouped else []
    header += ["difference", "95 % interval", "p", "p (Holm)"]
    header += [f"p over {unit}s", f"p over {unit}s (Holm)"] if grouped else []
    return header, [_build_row(result, comparison) for result in comparison.results]


def _build_row(result: Result, comparison: Comparison) -> list[str]:
    grouped, settings, difference = comparison.grouped, result.row.settings, result.difference
    cells = [result.row.name]
    cells += [format_flag(settings[name]) if name in settings else "" for name in comparison.flags]
    cells += [str(len(result.values))] if grouped else []
    cells += [_number(result.estimate.value), _interval(result.estimate.low, result.estimate.high)]
    cells += [_number(result.std)] if grouped else []
    if difference is None:
        cells += ["baseline", "", "", ""]
    else:
        cells += [_number(difference.value, "+"), _interval(difference.low, difference.high, "+")]
        cells += [_p_value(difference.p_value), _p_value(result.p_holm)]
    return cells + ([_p_value(result.p_members), _p_value(result.p_members_holm)] if grouped else [])


def _number(value: float, sign: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{sign}.4f}"


def _interval(low: float, high: float, sign: str = "") -> str:
    return "" if math.isnan(low) else f"[{low:{sign}.4f}, {high:{sign}.4f}]"


def _p_value(value: float) -> str:
    if math.isnan(value):
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def describe(comparison: Comparison) -> list[str]:
    """Return the sentences that belong under the table: what was measured, and what the columns mean."""
    metric = comparison.metric + (" (lower is better)" if comparison.metric == "hamming_loss" else "")
    lines = [
        f"{metric} on the {comparison.part} part. Intervals and p: bootstrap over its rows, {comparison.resamples} "
        "resamples shared by all runs; differences are paired; Holm: corrected for the number of rows.",
    ]
    if comparison.grouped:
        unit = comparison.unit
        lines.append(
            f"Scores are means over {unit}s, sd their standard deviation. p over {unit}s: paired t test over the "
            f"{unit}s shared with the baseline; it asks whether other {unit}s would agree, the bootstrap whether "
            "other test rows would."
        )
    return lines


# Formats


def render_table(comparison: Comparison) -> str:
    header, rows = build_cells(comparison)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in [*lines, "", *describe(comparison)]) + "\n"


def render_csv(comparison: Comparison) -> str:
    """Return RFC 4180 text with full numbers, lines ended by CRLF."""
    buffer = io.StringIO()
    records = build_records(comparison)
    writer = csv.writer(buffer)
    writer.writerow(records[0])
    for record in records:
        writer.writerow([format_flag(value) if isinstance(value, (bool, list)) else value for value in record.values()])
    return buffer.getvalue()


def render_markdown(comparison: Comparison) -> str:
    header, rows = build_cells(comparison)
    texts = 1 + len(comparison.flags)  # the columns of names; numbers hold nothing to escape but brackets
    lines = [[_escape_markdown(cell) for cell in header]]
    lines.append(["---"] * texts + ["---:"] * (len(header) - texts))
    lines += [[*map(_escape_markdown, row[:texts]), *(cell.replace("<", "&lt;") for cell in row[texts:])] for row in rows]
    table = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([*table, "", *map(_escape_markdown, describe(comparison))]) + "\n"


def _escape_markdown(text: str) -> str:
    return MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split()))


def render_latex(comparison: Comparison) -> str:
    """Return a booktabs tabular; names are escaped, signs are set in mathematics."""
    header, rows = build_cells(comparison)
    texts = 1 + len(comparison.flags)
    lines = [f"\\begin{{tabular}}{{{'l' * texts}{'r' * (len(header) - texts)}}}", "\\toprule"]
    lines += [" & ".join(map(_escape_latex, header)) + r" \\", "\\midrule"]
    for row in rows:
        numbers = [re.sub(r"[-+<]", r"$\g<0>$", cell) for cell in row[texts:]]
        lines.append(" & ".join([*map(_escape_latex, row[:texts]), *numbers]) + r" \\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join([*lines, *(f"% {line}" for line in describe(comparison))]) + "\n"


def _escape_latex(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(character, character) for character in " ".join(text.split()))


def render_json(comparison: Comparison) -> str:
    records = build_records(comparison)
    for record, result in zip(records, comparison.results, strict=True):
        record["directories"] = [str(member.run.path) for member in result.row.members]
        record["values"] = [_round(value) for value in result.values]
        record["model"] = result.row.members[0].model
    document = {
        "metric": comparison.metric,
        "part": comparison.part,
        "level": statistics.LEVEL,
        "resamples": comparison.resamples,
        "group_by": comparison.group_by,
        "flags": comparison.flags,
        "baseline": comparison.baseline.row.name,
        "baseline_note": comparison.baseline_note,
        "rows": records,
        "unfinished": [str(path) for path in comparison.unfinished],
    }
    return json.dumps(to_plain(document, decimals=None), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "table": render_table,
    "csv": render_csv,
    "markdown": render_markdown,
    "latex": render_latex,
    "json": render_json,
}
OUTPUT_FILES = {"table.csv": "csv", "table.md": "markdown", "table.tex": "latex", "comparison.json": "json"}


def render_page(comparison: Comparison, figures: Mapping[Path, str]) -> str:
    """Return report.html: the sortable table, what its columns mean, and the figures, in one file."""
    from research_compare_plots import METRIC_NAMES
    from research_document import Block, Bullets, Document, Figure, Heading, Paragraph, Table
    from research_html import render_html

    header, rows = build_cells(comparison)
    note = comparison.baseline_note
    blocks: list[Block] = [Paragraph(f"{note[:1].upper()}{note[1:]}.")]
    blocks.append(Table("Every row against the baseline", header, rows, text_columns=1 + len(comparison.flags)))
    blocks += map(Paragraph, describe(comparison))
    if comparison.unfinished:
        blocks += [Heading("Unfinished, left out"), Bullets([str(path) for path in comparison.unfinished])]
    if figures:
        blocks += [Heading("Figures"), *(Figure(path.name, caption) for path, caption in figures.items())]
    title = f"{len(rows)} rows compared by {METRIC_NAMES[comparison.metric]} on the {comparison.part} part"
    return render_html(Document(title, blocks), {path.name: path.read_bytes() for path in figures})


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the tables, the figures that the swept flags allow, and report.html with all of it into `folder`.

    Raises:
        InputError: the folder cannot be written.
    """
    from research_compare_plots import plot_comparison

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, style in OUTPUT_FILES.items():
            write_text_atomic(folder / name, FORMATS[style](comparison))
        figures = plot_comparison(comparison, folder)
        write_text_atomic(folder / "report.html", render_page(comparison, figures))
    except OSError as error:
        raise InputError(f"--output {folder} cannot be written: {error.strerror}.") from None


# Command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="research_compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="DIR", help="run directories, or folders that hold some")
    parser.add_argument(
        "--baseline",
        metavar="DIR",
        help="what the others are compared with (default: a student_only run with the same data, seed and student "
        "flags, given or beside the runs; else the first run)",
    )
    parser.add_argument("--metric", choices=tuple(statistics.METRICS), default="f1_macro", help="default: f1_macro")
    parser.add_argument(
        "--group_by",
        choices=("seed", "fold"),
        help="one row for runs that differ only by seed, or for DIR/fold_1 ... DIR/fold_K (a cross-validated DIR is "
        "always one row)",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), default="table", help="what is printed (default: table)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="also write report.html, table.csv, table.md, table.tex, comparison.json and figures there",
    )
    parser.add_argument(
        "--resamples",
        type=resample_count,
        default=statistics.RESAMPLES,
        metavar="N",
        help=f"bootstrap resamples of the rows, 100 or more (default: {statistics.RESAMPLES})",
    )
    parser.add_argument("--part", choices=PARTS[::-1], default="test", help="rows to score on (default: test)")
    parser.add_argument(
        "--model", choices=MODELS[::-1], help="whose predictions (default: the student's, the teacher's in a run without)"
    )
    return parser


def resample_count(text: str) -> int:
    value = int(text)
    if value < 100:
        raise argparse.ArgumentTypeError(f"must be 100 or more, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Print a comparison; returns the exit status, 0 or 2 (a user's mistake, named in one line)."""
    arguments = build_parser().parse_args(argv)
    try:
        comparison = compare_runs(
            arguments.runs,
            baseline=arguments.baseline,
            metric=arguments.metric,
            part=arguments.part,
            model=arguments.model,
            group_by=arguments.group_by,
            resamples=arguments.resamples,
        )
        if arguments.output is not None:
            write_comparison(comparison, Path(arguments.output))
    except InputError as error:
        print(f"research_compare.py: {error}", file=sys.stderr)
        return 2
    print(comparison.baseline_note, file=sys.stderr)
    for path in comparison.unfinished:
        print(f"unfinished, left out: {path}", file=sys.stderr)
    sys.stdout.write(FORMATS[arguments.format](comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main())
