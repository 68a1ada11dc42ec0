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
from research.evaluation.inference import LEVEL, Keeping
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
    Strong,
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
    """Return one {column: value} per metric and row, for machines: numbers of six digits, None where there is none.

    The columns are the same in every record; those on seeds or folds are there only when a row has several, those on
    what is kept of the teacher only when that was asked for.
    """
    return [_build_record(metric, result, comparison) for metric, result in _all_results(comparison)]


def _all_results(comparison: Comparison) -> list[tuple[str, Result]]:
    return [(metric, result) for metric, results in comparison.by_metric.items() for result in results]


def _build_record(metric: str, result: Result, comparison: Comparison) -> dict[str, Any]:
    record: dict[str, Any] = {"metric": metric, "run": result.row.name}
    record |= {name: result.row.settings.get(name) for name in comparison.flags}
    if comparison.grouped:
        record["runs"] = len(result.values)
    record |= {"score": result.estimate.value, "score_low": result.estimate.low, "score_high": result.estimate.high}
    if comparison.grouped:
        record["score_std"] = result.std
    difference = result.difference
    record |= {
        "difference": difference and difference.value,
        "difference_low": difference and difference.low,
        "difference_high": difference and difference.high,
        "over": difference and (f"{comparison.unit}s and rows" if difference.over_seeds else "rows"),
        "p": difference and difference.p_value,
        "p_holm": result.p_holm,
    }
    if comparison.keeps is not None:
        keeping = result.keeping
        record |= {
            "kept": keeping and keeping.kept,
            "kept_bound": keeping and keeping.bound,
            "kept_share": keeping and keeping.kept_share,
            "kept_share_low": keeping and keeping.kept_share_low,
            "kept_rows_needed": keeping and keeping.rows_needed,
        }
    return {name: _round(value) for name, value in record.items()}


def _round(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def build_tables(comparison: Comparison) -> list[Table]:
    """Return a table per metric; columns past the flags hold numbers."""
    texts = 1 + len(comparison.flags)
    return [
        Table(f"Every row against the baseline, {METRIC_OF[metric].axis_label}", *_build_cells(comparison, metric), texts)
        for metric in comparison.metrics
    ]


def _build_cells(comparison: Comparison, metric: str) -> tuple[list[str], list[list[str | Strong]]]:
    """Return the header and the rows of a metric's table; a difference that may be claimed is strong."""
    grouped = comparison.grouped
    header = ["run", *comparison.flags, *(["runs"] if grouped else []), METRIC_OF[metric].short, "95 % interval"]
    header += ["difference", "95 % interval", "p (Holm)"]
    header += [] if comparison.keeps is None else [f"keeps {_percent(comparison.keeps)}", "rows needed"]
    return header, [_build_row(result, comparison) for result in comparison.by_metric[metric]]


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _build_row(result: Result, comparison: Comparison) -> list[str | Strong]:
    grouped, settings, difference = comparison.grouped, result.row.settings, result.difference
    cells: list[str | Strong] = [result.row.name]
    cells += [format_value(settings[name]) if name in settings else "" for name in comparison.flags]
    cells += [str(len(result.values))] if grouped else []
    deviation = format_number(result.std)
    cells += [
        format_number(result.estimate.value) + (f" ± {deviation}" if deviation else ""),
        _interval(result.estimate.low, result.estimate.high, rows_only=grouped and len(result.values) == 1),
    ]
    if difference is None:
        cells += ["baseline", "", ""]
    else:
        value = format_number(difference.value, sign="+")
        rows_only = grouped and not difference.over_seeds
        cells += [
            Strong(value) if result.is_claim else value,
            _interval(difference.low, difference.high, sign="+", rows_only=rows_only),
            format_p_value(result.p_holm),
        ]
    return cells + ([] if comparison.keeps is None else _build_keeping(result.keeping))


def _interval(low: float, high: float, sign: str = "", *, rows_only: bool) -> str:
    text = format_interval(low, high, sign)
    return f"{text} (rows)" if rows_only and text else text


def _build_keeping(keeping: Keeping | None) -> list[str | Strong]:
    if keeping is None:
        return ["", ""]
    verdict = f"{'yes' if keeping.kept else 'no'}, {format_number(keeping.bound, sign='+')}"
    return [verdict, format_number(int(keeping.rows_needed)) if math.isfinite(keeping.rows_needed) else "no number"]


def explain_columns(comparison: Comparison) -> list[str]:
    """Return the sentences that belong under the tables: what was measured, and what the columns mean."""
    lines = [_explain_intervals(comparison)]
    number = sum(result.difference is not None for _, result in _all_results(comparison))
    marked = f"Marked: p (Holm) under 0.05 over {comparison.unit}s and rows; a" if comparison.grouped else "A"
    lines.append(
        f"Holm: corrected for the {number} differences shown. {marked} difference over rows alone is not marked: another "
        "seed might undo it."
    )
    if comparison.keeps is not None:
        share = _percent(comparison.keeps)
        lines.append(
            f"keeps {share}: whether the score is above {share} of the teacher's, by the lower one-sided 95 % bound of "
            f"score - {comparison.keeps:g} teacher, which is given; each is a test of its own. rows needed: test rows that "
            "would show it with 80 % power for a student as good as its teacher, with as many runs."
        )
    falling = [metric for metric in comparison.metrics if METRIC_OF[metric].lower_is_better]
    return [*lines, f"{', '.join(falling)}: lower is better."] if falling else lines


def _explain_intervals(comparison: Comparison) -> str:
    folds, unit = comparison.num_folds, comparison.unit
    start = f"Scores on the {comparison.part} part" + (f" of {folds} folds, all rows together" if folds > 1 else "")
    start += ". Intervals and p: "
    end = f"({comparison.resamples} bootstrap resamples of its texts, shared by all runs; differences are paired)."
    if not comparison.grouped:
        return f"{start}over its rows alone, each run being one seed {end}"
    if unit == "fold":
        spread = "over rows and the folds' trainings"
        scores = f"Each row is decided by the model that did not learn from it; ± is the standard deviation over {unit}s."
    else:
        spread = f"over {unit}s and rows, by two-way random effects" + (", and the folds' trainings" if folds > 1 else "")
        scores = f"Scores are means over {unit}s ± their standard deviation."
    note = f" (rows): one {unit} only, so the interval says what other rows would give, not other {unit}s."
    return f"{start}{spread} {end} {scores}{note}"


def build_page(comparison: Comparison, figures: Mapping[Path, str]) -> Document:
    """Return the page of a comparison: the baseline, a table a metric with what its columns mean, and the figures."""
    tables, note = build_tables(comparison), comparison.baseline_note
    blocks: list[Block] = [Paragraph(f"{note[:1].upper()}{note[1:]}.")]
    for metric, table in zip(comparison.metrics, tables, strict=True):
        blocks += [Heading(_title(metric)), table]
    blocks += map(Paragraph, explain_columns(comparison))
    if comparison.unfinished:
        blocks += [Heading("Unfinished, left out"), Bullets([str(path) for path in comparison.unfinished])]
    if figures:
        blocks += [Heading("Figures"), Figures([Figure(path.name, caption) for path, caption in figures.items()])]
    names = ", ".join(METRIC_OF[metric].full_label for metric in comparison.metrics)
    return Document(f"{len(comparison.results)} rows compared by {names} on the {comparison.part} part", blocks)


def _title(metric: str) -> str:
    label = METRIC_OF[metric].axis_label
    return f"{label[:1].upper()}{label[1:]}"


def render_text(comparison: Comparison) -> str:
    """Return a table a metric in columns of equal width, for a terminal; a star marks what may be claimed."""
    lines = []
    for metric in comparison.metrics:
        header, rows = _build_cells(comparison, metric)
        texts = [[f"{cell.text}*" if isinstance(cell, Strong) else cell for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *texts)]
        lines += [table[0], "  ".join("-" * width for width in widths), *table[1:], ""]
    return "\n".join(line.rstrip() for line in [*lines, *explain_columns(comparison)]) + "\n"


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
    """Return the tables and their explanation without a title, to be pasted into another text."""
    return render_markdown(Document("", [*build_tables(comparison), *map(Paragraph, explain_columns(comparison))]))


def render_latex(comparison: Comparison) -> str:
    """Return a booktabs tabular a metric; names are escaped, signs are set in mathematics, claims in bold."""
    tables = "\n".join(_render_tabular(comparison, metric) for metric in comparison.metrics)
    return tables + "".join(f"% {line}\n" for line in explain_columns(comparison))


def _render_tabular(comparison: Comparison, metric: str) -> str:
    header, rows = _build_cells(comparison, metric)
    texts = 1 + len(comparison.flags)
    lines = [f"\\begin{{tabular}}{{{'l' * texts}{'r' * (len(header) - texts)}}}", "\\toprule"]
    lines += [" & ".join(map(_escape_latex, header)) + r" \\", "\\midrule"]
    for row in rows:
        names = [_escape_latex(str(cell)) for cell in row[:texts]]
        lines.append(" & ".join([*names, *map(_set_number, row[texts:])]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _set_number(cell: str | Strong) -> str:
    if isinstance(cell, Strong):
        return rf"\textbf{{\boldmath {_set_number(cell.text)}}}"
    return re.sub(r"[-+<]", r"$\g<0>$", cell).replace("%", r"\%")


def _escape_latex(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(character, character) for character in " ".join(text.split()))


def render_json(comparison: Comparison) -> str:
    """Return every record with its runs and their scores, and how the comparison was made."""
    records = build_records(comparison)
    for record, (_, result) in zip(records, _all_results(comparison), strict=True):
        record["directories"] = [str(member.run.path) for member in result.row.members]
        record["values"] = [_round(value) for value in result.values]
        record["model"] = result.row.members[0].model
    document = {
        "metrics": comparison.metrics,
        "part": comparison.part,
        "level": LEVEL,
        "resamples": comparison.resamples,
        "group_by": comparison.group_by,
        "keeps": comparison.keeps,
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
