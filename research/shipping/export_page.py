"""export.md and export.html: what each shipped form of a model costs and keeps, made from export.json's content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.evaluation.gain import GAIN_METRICS
from research.names import METRIC_OF
from research.report.document import Block, Bullets, Code, Document, Heading, Paragraph, Table, render_html, render_markdown
from research.report.numbers import UNKNOWN, format_interval, format_number, show_number
from research.runs.formats import write_text_atomic

FORM_NAMES = {"torch": "torch, float32", "onnx": "ONNX, float32", "int8": "ONNX, int8"}
COSTS = {
    "size_mb": ("Size of the weights (MB)", 2),
    "latency_ms_batch1": ("Latency, batch 1 (ms)", 2),
    "latency_ms_batch32": ("Latency, batch 32 (ms)", 1),
    "throughput_per_s": ("Throughput (rows/s)", 0),
}


def write_pages(facts: Mapping[str, Any], folder: Path, run_path: Path) -> None:
    """Write both pages into the exported folder."""
    document = Document(f"{run_path.resolve().name}: {facts['model']} for shipping", build_blocks(facts, run_path))
    write_text_atomic(folder / "export.md", render_markdown(document))
    write_text_atomic(folder / "export.html", render_html(document, {}))


def build_blocks(facts: Mapping[str, Any], run_path: Path) -> list[Block]:
    """Return the sections: costs, agreement with torch, scores, use."""
    return [*_describe_costs(facts), *_describe_agreement(facts), *_describe_scores(facts), *_describe_use(facts, run_path)]


def _describe_costs(facts: Mapping[str, Any]) -> list[Block]:
    forms = facts["forms"]
    rows = []
    for entry, (name, decimals) in COSTS.items():
        cells = [_with_range(form, entry, decimals) for form in forms.values()]
        rows.append([name, *cells])
    device = facts["environment"]["device"]
    note = (
        f"Timed in turn on the same texts, on one thread of a {device}; medians, in brackets the fastest and the slowest round. "
        "Throughput is in batches of 32."
    )
    return [Heading("Size and speed"), Table("Size and speed", ["Cost", *_names(forms)], rows), Paragraph(note)]


def _with_range(form: Mapping[str, Any], entry: str, decimals: int) -> str:
    low, high = form.get(f"{entry}_range", (None, None))
    spread = "" if low is None else f" ({show_number(float(low), decimals)} to {show_number(float(high), decimals)})"
    return show_number(float(form[entry]), decimals) + spread


def _names(forms: Mapping[str, Any]) -> list[str]:
    return [FORM_NAMES[name] for name in forms]


def _describe_agreement(facts: Mapping[str, Any]) -> list[Block]:
    rows = [
        [
            FORM_NAMES[name],
            f"{found['largest_difference']:.2g}",
            f"{found['mean_difference']:.2g}",
            f"{100 * found['decisions_changed']:.2f} %",
        ]
        for name, found in facts["compared_with_torch"].items()
    ]
    texts = next(iter(facts["compared_with_torch"].values()))["texts"]
    header = ["Form", "Largest difference of a probability", "Mean", "Decisions changed"]
    blocks: list[Block] = [
        Heading("Against torch"),
        Table("Probabilities against those of torch", header, rows),
        Paragraph(f"On {format_number(texts)} texts; decisions at the model's own thresholds."),
    ]
    if calibration := facts.get("calibration"):
        blocks.append(Paragraph(f"Int8 scales were fixed on {calibration['texts']} texts {calibration['origin']}."))
    return blocks


def _describe_scores(facts: Mapping[str, Any]) -> list[Block]:
    scores = facts.get("scores")
    if not scores:
        return [Heading("Scores"), Paragraph("Not scored: the run's own table was not read.")]
    rows = []
    for metric in GAIN_METRICS:
        for name, found in scores[metric].items():
            gap = found.get("difference")
            rows.append(
                [
                    METRIC_OF[metric].full_label,
                    FORM_NAMES[name],
                    f"{show_number(found['value'])} ({format_interval(found['low'], found['high'])})",
                    UNKNOWN
                    if gap is None
                    else f"{show_number(gap['value'], sign='+')} ({format_interval(gap['low'], gap['high'], '+')})",
                ]
            )
    header = ["Metric", "Form", "Score", "Difference to torch"]
    note = (
        f"{format_number(scores['rows'])} test rows, {format_number(scores['texts'])} texts; 95 % bootstrap intervals over "
        "texts, those of differences paired. Tuned thresholds are the model's own, for every form: tuning them again would "
        "add its own noise to what quantising changes."
    )
    return [Heading("Scores on the test part"), Table("Scores of each form", header, rows, text_columns=2), Paragraph(note)]


def _describe_use(facts: Mapping[str, Any], run_path: Path) -> list[Block]:
    folder = run_path / f"{facts['model']}_onnx"
    int8 = " --int8" if "int8" in facts["forms"] else ""
    return [
        Heading("Use"),
        Code(f"python research_predict.py --model {folder}{int8} --dataset_path new.csv --output_path labelled.csv"),
        Bullets(
            [
                "classifier.json holds the labels in the order of the outputs, the thresholds, the longest text in tokens and "
                "the Unicode normalisation that a text needs first.",
                "tokenizer.json cuts texts by itself; the model takes input_ids and attention_mask and gives logits, whose "
                "sigmoid is the probability.",
            ]
        ),
    ]
