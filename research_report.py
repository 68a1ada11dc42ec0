"""report.md and its plots: a run directory retold for a reader, from the directory's files alone.

Sections whose file is absent (a teacher without a student has no efficiency ratios) are left out. The texts
that were classified are in none of the files, so they cannot appear here.
"""

from __future__ import annotations

import html
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research_files import write_atomic
from research_results import (
    HEADLINE_THRESHOLDS,
    PARTS,
    PLOTS,
    PREDICTION_FILES,
    Run,
    dig,
    teacher_headline,
    write_text_atomic,
)

UNKNOWN = "–"
METRIC_NAMES = {
    "f1_macro": "Macro-F1",
    "f1_micro": "Micro-F1",
    "f1_weighted": "Weighted F1",
    "average_precision_macro": "mAP",
    "subset_accuracy": "Subset accuracy",
    "hamming_loss": "Hamming loss",
    "lrap": "LRAP",
    "ece": "ECE",
}
LABEL_METRIC_NAMES = {
    "threshold": "Threshold",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "average_precision": "AP",
    "roc_auc": "ROC AUC",
    "support": "Positives",
    "predicted": "Predicted",
}
AGREEMENT_NAMES = {
    "decisions_equal": "Equal decisions at 0.5 (share of label cells)",
    "rows_equal": "Rows with every decision equal (share)",
    "probability_mae": "Mean absolute difference of probabilities",
    "probability_correlation": "Correlation of probabilities (mean over labels)",
}
# {entry: (name, the ratio that compares it)}
EFFICIENCY_NAMES = {
    "parameters_total": ("Parameters", "compression"),
    "parameters_embeddings": ("of which embeddings", None),
    "parameters_encoder": ("of which encoder", "encoder_compression"),
    "parameters_head": ("of which classifier", None),
    "size_mb": ("Size of the weights (MB)", "size"),
    "latency_ms_batch1": ("Latency, batch 1 (ms)", "latency_batch1"),
    "latency_ms_batch32": ("Latency, batch 32 (ms)", "latency_batch32"),
    "throughput_per_s": ("Throughput (rows/s)", "throughput"),
}
THRESHOLD_NAMES = {"at_0.5": "0.5", "tuned": "tuned"}

Show = Callable[..., str]


def write_report(run: Run) -> None:
    """Write the plots and report.md into a run's directory, of one split or of several folds.

    Raises:
        InputError: one of its files is missing or cut short.
    """
    show = _build_show(run)
    plots = _draw_plots(run)
    sections = [
        [f"# {escape_markdown(run.path.resolve().name)}", "", _describe_headline(run)],
        *(_describe_scores(run, part, show) for part in reversed(PARTS)),
        _describe_labels(run, show),
        _describe_agreement(run, show),
        _describe_efficiency(run),
        _describe_training(run),
        _describe_folds(run),
        _describe_plots(plots),
        _describe_reproduction(run),
    ]
    text = "\n\n".join("\n".join(section) for section in sections if section)
    write_text_atomic(run.path / "report.md", text + "\n")


# Markdown


def escape_markdown(text: str) -> str:
    """Make a name safe in running text and table cells: no markup, no HTML, one line."""
    one_line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(one_line, quote=False))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Return the lines of a table of escaped cells; columns past the first `text_columns` align right."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def fence(text: str) -> list[str]:
    """Return a code block that `text` cannot close."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return [f"{marks}bash", text, marks]


def format_number(value: Any, decimals: int = 4) -> str:
    """Return counts with thousands separators, other numbers with `decimals`, a dash for None."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{decimals}f}" if isinstance(value, float) else escape_markdown(str(value))


def _build_show(run: Run) -> Show:
    """Return a function from the keys of a metric to its text; of several folds, mean and deviation."""

    def show(*keys: str) -> str:
        text = format_number(dig(run.scores, *keys))
        deviation = dig(run.metrics, "std", *keys)
        return text if deviation is None else f"{text} ± {format_number(deviation)}"

    return show


# Sections: each returns its lines, none when the run has nothing to say there


def _describe_headline(run: Run) -> str:
    entry = run.metrics["headline"]
    name = METRIC_NAMES.get(entry["metric"], entry["metric"])
    value, teacher = entry["value"], teacher_headline(run.metrics)
    spread = "" if entry.get("std") is None else f" ± {format_number(entry['std'])} over {run.num_folds} folds"
    rows = dig(run.scores, "rows", entry["part"])
    size = "" if rows is None else f" ({rows:,.0f} rows)"
    text = (
        f"{name} of the {entry['model']} on the {entry['part']} part{size} is "
        f"**{format_number(value)}**{spread} at a threshold of {THRESHOLD_NAMES[HEADLINE_THRESHOLDS]}"
    )
    if value is not None and teacher:
        side = "below" if value < teacher else "above"
        text += (
            f", which keeps {100 * value / teacher:.1f} % of its teacher's {format_number(teacher)} "
            f"({format_number(abs(teacher - value))} {side})"
        )
    majority = dig(run.scores, "majority_baseline", entry["part"], entry["metric"])
    return text + "." + ("" if majority is None else f" Guessing each label's majority scores {format_number(majority)}.")


def _describe_scores(run: Run, part: str, show: Show) -> list[str]:
    rows = [
        [model, name, *(show(model, part, thresholds, metric) for metric in METRIC_NAMES)]
        for model in run.models
        for thresholds, name in THRESHOLD_NAMES.items()
        if dig(run.scores, model, part, thresholds) is not None
    ]
    if not rows:
        return []
    return [
        f"## Scores on the {part} part",
        "",
        *markdown_table(["Model", "Thresholds", *METRIC_NAMES.values()], rows, text_columns=2),
        "",
        "Hamming loss and ECE: less is better. Thresholds are tuned on the validation part"
        + (", so its tuned scores flatter." if part == "validation" else "."),
    ]


def _describe_labels(run: Run, show: Show) -> list[str]:
    rows = [
        [
            escape_markdown(label),
            model,
            *(show(model, "test", "tuned", "per_label", label, name) for name in LABEL_METRIC_NAMES),
        ]
        for label in run.label_names
        for model in run.models
    ]
    header = ["Label", "Model", *LABEL_METRIC_NAMES.values()]
    return [
        "## Labels on the test part, at tuned thresholds",
        "",
        *markdown_table(header, rows, text_columns=2),
    ]


def _describe_agreement(run: Run, show: Show) -> list[str]:
    parts = [part for part in PARTS if dig(run.scores, "agreement", part) is not None]
    if not parts:
        return []
    rows = [[text, *(show("agreement", part, name) for part in parts)] for name, text in AGREEMENT_NAMES.items()]
    return ["## Agreement of student and teacher", "", *markdown_table(["", *parts], rows)]


def _describe_efficiency(run: Run) -> list[str]:
    if not run.has("efficiency.json"):
        return []
    efficiency = run.efficiency
    models = [model for model in ("teacher", "student") if model in efficiency]
    ratios = efficiency.get("ratios") or {}
    rows = []
    for entry, (name, ratio) in EFFICIENCY_NAMES.items():
        decimals = 0 if entry.startswith("parameters") else 2
        cells = [format_number(dig(efficiency, model, entry), decimals) for model in models]
        value = ratios.get(ratio) if ratio else None
        rows.append([name, *cells, *([UNKNOWN if value is None else f"{value:.2f} ×"] if ratios else [])])
    header = ["", *models, *(["Gain of the student"] if ratios else [])]
    lines = ["## Efficiency", "", *markdown_table(header, rows)]
    if remark := efficiency.get("remark"):
        sentence = escape_markdown(remark)
        lines += ["", f"{sentence[:1].upper()}{sentence[1:]}{'' if sentence.endswith('.') else '.'}"]
    return [*lines, "", "Timings were measured once on the machine named below; they vary from run to run."]


def _describe_training(run: Run) -> list[str]:
    facts = dig(run.scores, "training") or {}
    lines = [f"- {escape_markdown(name.replace('_', ' '))}: {_format_fact(value)}" for name, value in facts.items()]
    if run.has("history.csv") and run.history:
        first, last = run.history[0], run.history[-1]
        changes = [
            f"- {text}: first epoch {format_number(first[name])}, last epoch {format_number(last[name])}"
            for name, text in (("total_loss", "total loss"), ("val_f1_macro", "validation macro-F1"))
            if first.get(name) is not None and last.get(name) is not None
        ]
        skipped = sum(row.get("skipped_steps") or 0 for row in run.history)
        lines += [f"- epochs in history.csv: {len(run.history)}", *changes]
        lines += [f"- optimizer steps skipped by the gradient scaler: {skipped:,.0f}"] if skipped else []
    return ["## Training", "", *lines] if lines else []


def _format_fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{escape_markdown(str(key))} {_format_fact(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(_format_fact(entry) for entry in value)
    return escape_markdown(str(value)) if isinstance(value, bool) else format_number(value)


def _describe_folds(run: Run) -> list[str]:
    if "folds" not in run.metrics:
        return []
    rows = [
        [f"[{fold.path.name}]({fold.path.name}/report.md)", format_number(fold.metrics["headline"]["value"])]
        for fold in run.folds
    ]
    return ["## Folds", "", *markdown_table(["Fold", METRIC_NAMES["f1_macro"]], rows)]


def _describe_plots(plots: Sequence[str]) -> list[str]:
    lines = [f"![{PLOTS[name]}](plots/{name})" for name in plots]
    return ["## Plots", "", "\n\n".join(lines)] if lines else []


def _describe_reproduction(run: Run) -> list[str]:
    if not run.has("environment.json"):
        return []
    environment = run.environment
    lines = ["## How to repeat it", ""]
    if command := environment.get("command_line"):
        lines += [*fence(shlex.join(command) if isinstance(command, list) else str(command)), ""]
    facts = {name: value for name, value in environment.items() if name not in ("command_line", "timing_s")}
    rows = [[escape_markdown(name), escape_markdown(str(value))] for name, value in _flatten(facts) if value is not None]
    return [*lines, *markdown_table(["", "Recorded"], rows, text_columns=2)] if rows else lines[:-1]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        leaves += _flatten(value, f"{prefix}{name} ") if isinstance(value, Mapping) else [(prefix + name, value)]
    return leaves


# Plots


def _draw_plots(run: Run) -> list[str]:
    """Draw what the files allow and return the names of the plots, in the order of PLOTS."""
    import research_plots

    drawings: dict[str, Callable[[io.BytesIO], None]] = {}
    if run.has("history.csv") and run.history:
        best_epoch = dig(run.scores, "training", "best_epoch")
        drawings["training.png"] = lambda target: research_plots.plot_training(run.history, target, best_epoch)
    f1 = {
        model: {label: dig(run.scores, model, "test", "tuned", "per_label", label, "f1") for label in run.label_names}
        for model in run.models
    }
    drawings["label_f1.png"] = lambda target: research_plots.plot_label_f1(f1, target)
    if run.has(PREDICTION_FILES["test"]):
        _add_prediction_drawings(run, drawings)
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    for name, draw in drawings.items():
        buffer = io.BytesIO()
        draw(buffer)
        write_atomic(folder / name, buffer.getvalue())
    return [name for name in PLOTS if name in drawings]


def _add_prediction_drawings(run: Run, drawings: dict[str, Callable[[io.BytesIO], None]]) -> None:
    import research_plots
    from research_evaluation import compute_calibration  # the same bins as the calibration error's

    predictions = run.predictions
    tables = {model: compute_calibration(predictions.labels, probs) for model, probs in predictions.probs.items()}
    drawings["precision_recall.png"] = lambda target: research_plots.plot_precision_recall(
        predictions.label_names, predictions.labels, predictions.probs, target
    )
    drawings["reliability.png"] = lambda target: research_plots.plot_reliability(tables, target)
