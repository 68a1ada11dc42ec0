"""A comparison as text, CSV, Markdown, LaTeX and JSON, and as the page that holds its figures too."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from research.compare.scores import Comparison, Result
from research.evaluation.bootstrap import LEVEL
from research.flags import format_value
from research.names import METRIC_OF
from research.report.document import (
    Block,
    Bullets,
    Document,
    Figure,
    Figures,
    Heading,
    Paragraph,
    Table,
    render_markdown,
)
from research.report.numbers import format_interval, format_number, format_p_value
from research.runs.formats import to_plain

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
    return {name: _round(value) for name, value in record.items()}


def _round(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def build_table(comparison: Comparison) -> Table:
    """Return the table of a document; its columns past the flags hold numbers."""
    return Table("Every row against the baseline", *_build_cells(comparison), text_columns=1 + len(comparison.flags))


def _build_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
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
    cells += [format_value(settings[name]) if name in settings else "" for name in comparison.flags]
    cells += [str(len(result.values))] if grouped else []
    cells += [format_number(result.estimate.value), format_interval(result.estimate.low, result.estimate.high)]
    cells += [format_number(result.std)] if grouped else []
    if difference is None:
        cells += ["baseline", "", "", ""]
    else:
        cells += [format_number(difference.value, sign="+"), format_interval(difference.low, difference.high, sign="+")]
        cells += [format_p_value(difference.p_value), format_p_value(result.p_holm)]
    return cells + ([format_p_value(result.p_members), format_p_value(result.p_members_holm)] if grouped else [])


def explain_columns(comparison: Comparison) -> list[str]:
    """Return the sentences that belong under the table: what was measured, and what the columns mean."""
    metric = comparison.metric + (" (lower is better)" if METRIC_OF[comparison.metric].lower_is_better else "")
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


def build_page(comparison: Comparison, figures: Mapping[Path, str]) -> Document:
    """Return the page of a comparison: the baseline, the table with what its columns mean, and the figures."""
    table = build_table(comparison)
    note = comparison.baseline_note
    blocks: list[Block] = [Paragraph(f"{note[:1].upper()}{note[1:]}."), table, *map(Paragraph, explain_columns(comparison))]
    if comparison.unfinished:
        blocks += [Heading("Unfinished, left out"), Bullets([str(path) for path in comparison.unfinished])]
    if figures:
        blocks += [Heading("Figures"), Figures([Figure(path.name, caption) for path, caption in figures.items()])]
    metric = METRIC_OF[comparison.metric].full_label
    return Document(f"{len(table.rows)} rows compared by {metric} on the {comparison.part} part", blocks)


def render_text(comparison: Comparison) -> str:
    """Return the table in columns of equal width, for a terminal."""
    header, rows = _build_cells(comparison)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in [*lines, "", *explain_columns(comparison)]) + "\n"


def render_csv(comparison: Comparison) -> str:
    """Return RFC 4180 text with full numbers, lines ended by CRLF."""
    buffer = io.StringIO()
    records = build_records(comparison)
    writer = csv.writer(buffer)
    writer.writerow(records[0])
    for record in records:
        writer.writerow([format_value(value) if isinstance(value, (bool, list)) else value for value in record.values()])
    return buffer.getvalue()


def render_markdown_table(comparison: Comparison) -> str:
    """Return the table and its explanation without a title, to be pasted into another text."""
    return render_markdown(Document("", [build_table(comparison), *map(Paragraph, explain_columns(comparison))]))


def render_latex(comparison: Comparison) -> str:
    """Return a booktabs tabular; names are escaped, signs are set in mathematics."""
    header, rows = _build_cells(comparison)
    texts = 1 + len(comparison.flags)
    lines = [f"\\begin{{tabular}}{{{'l' * texts}{'r' * (len(header) - texts)}}}", "\\toprule"]
    lines += [" & ".join(map(_escape_latex, header)) + r" \\", "\\midrule"]
    for row in rows:
        numbers = [re.sub(r"[-+<]", r"$\g<0>$", cell) for cell in row[texts:]]
        lines.append(" & ".join([*map(_escape_latex, row[:texts]), *numbers]) + r" \\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join([*lines, *(f"% {line}" for line in explain_columns(comparison))]) + "\n"


def _escape_latex(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(character, character) for character in " ".join(text.split()))


def render_json(comparison: Comparison) -> str:
    """Return the comparison as JSON, with the values of every run behind a row."""
    records = build_records(comparison)
    for record, result in zip(records, comparison.results, strict=True):
        record["directories"] = [str(member.run.path) for member in result.row.members]
        record["values"] = [_round(value) for value in result.values]
        record["model"] = result.row.members[0].model
    document = {
        "metric": comparison.metric,
        "part": comparison.part,
        "level": LEVEL,
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
    "table": render_text,
    "csv": render_csv,
    "markdown": render_markdown_table,
    "latex": render_latex,
    "json": render_json,
}
