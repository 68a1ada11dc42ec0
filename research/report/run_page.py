"""report.md, report.html and the plots of a run, written from the files of its directory (no torch).

One function a section, each of a run alone; matplotlib is imported when the plots are drawn.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.evaluation.calibration import compute_calibration
from research.evaluation.gain import GAIN_METRICS, describe_gain
from research.evaluation.metrics import count_confusions, most_disagreeing
from research.names import HEADLINE_METRIC, LABEL_SCORES, METRIC_OF, MODELS, PARTS, THRESHOLDS, metrics_of
from research.report import figures
from research.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Figure,
    Figures,
    Heading,
    Hidden,
    Inline,
    Link,
    Paragraph,
    Strong,
    Table,
    Text,
    Typed,
    render_html,
    render_markdown,
)
from research.report.numbers import format_interval, format_number, format_p_value
from research.runs.formats import PLOTS, PREDICTION_FILES, dig, read_json, to_plain, write_text_atomic
from research.runs.run import Run, load_run, teacher_headline
from research.storage.files import write_atomic

FetchTexts = Callable[[Sequence[int]], Mapping[int, str]]
UNKNOWN = "–"
MAX_DISAGREEMENTS = 20
AGREEMENTS = {"student": "agreement", "control": "control_agreement"}
CONFUSION_NAMES = ("True positives", "False positives", "False negatives", "True negatives")
AGREEMENT_NAMES = {
    "decisions_equal": "Equal decisions at 0.5 (share of label cells)",
    "rows_equal": "Rows with every decision equal (share)",
    "probability_mae": "Mean absolute difference of probabilities",
    "probability_correlation": "Correlation of probabilities (mean over labels)",
}
SOFT_NAMES = {"soft_loss": "Soft loss at the run's temperature", "soft_excess": "of which above the teacher's entropy"}
TRAINING_NAMES = {"best_epoch": "Best epoch", "epochs_run": "Epochs run", "skipped_steps": "Skipped steps"}
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


def write_report(
    run_dir: str | Path,
    metrics: Mapping[str, Any] | None = None,
    fetch_texts: FetchTexts | None = None,
    *,
    plots: bool = True,
) -> None:
    """Write report.md, report.html and plots/*.png from the files of a run's directory, of one split or of several folds.

    With `metrics` the report can be written before metrics.json, which marks the run as finished. The texts
    are in none of the files: `fetch_texts` returns those of some values of `index` for report.html. Without `plots`
    none is drawn, which takes most of the time.

    Raises:
        InputError: one of the files is missing or cut short.
    """
    path = Path(run_dir)
    run = load_run(path) if metrics is None else Run(path, read_json(path / "config.json"), to_plain(metrics))
    drawn = _draw_plots(run) if plots else []
    document = Document(run.path.resolve().name, _build_blocks(run, drawn))
    write_text_atomic(run.path / "report.md", render_markdown(document))
    images = {f"plots/{name}": (run.path / "plots" / name).read_bytes() for name in drawn}
    document = Document(document.title, document.blocks + _describe_disagreements(run, fetch_texts))
    write_text_atomic(run.path / "report.html", render_html(document, images))


def _build_blocks(run: Run, plots: Sequence[str]) -> list[Block]:
    return [
        *_describe_opening(run),
        *_describe_scores(run, "test"),
        *_describe_scores(run, "validation"),
        *_describe_labels(run),
        *_describe_confusions(run),
        *_describe_calibration(run),
        *_describe_agreement(run),
        *_describe_efficiency(run),
        *_describe_training(run),
        *_describe_data(run),
        *_describe_folds(run),
        *_describe_plots(plots),
        *_describe_reproduction(run),
    ]


def _number(value: Any, decimals: int = 4, sign: str = "") -> str:
    return format_number(value, decimals, sign) or UNKNOWN


def _show(run: Run, *keys: str, sign: str = "") -> str:
    """Return the text of a number of metrics.json; of several folds, mean and deviation."""
    text = _number(dig(run.scores, *keys), sign=sign)
    deviation = dig(run.metrics, "std", *keys)
    return text if deviation is None else f"{text} ± {format_number(deviation)}"


def _describe_opening(run: Run) -> list[Block]:
    if dig(run.scores, "training", "teacher", "training_texts") != "unknown":
        return _describe_outcome(run)
    doubt = (
        Strong("The teacher may have seen test rows."),
        " Its checkpoint does not say which texts it was trained on; if some of the test part were among them, its "
        "scores and the student's are too high.",
    )
    return [*_describe_outcome(run), Paragraph(doubt)]


def _describe_outcome(run: Run) -> list[Block]:
    headline = Paragraph(_describe_headline(run))
    if "kd_gain" in run.scores:
        return [*_describe_gain(run), headline]
    if run.config.get("pipeline") != "kd_only":
        return [headline]
    hint = (
        "Whether distillation helped cannot be told from this run alone: it has no control. Train one with ",
        Typed("--with_control"),
        ", or let ",
        Typed("research_compare.py"),
        " find a student_only run of the same data, seed and student.",
    )
    return [headline, Paragraph(hint)]


def _describe_gain(run: Run) -> list[Block]:
    """Return the sentence that matters, what the three measures say together, and their table."""
    gains = run.scores["kd_gain"]
    sentence: list[Inline] = [f"Distillation ({run.config.get('kd_method')}) changed "]
    for separator, metric in zip(("", ", ", " and "), GAIN_METRICS, strict=True):
        change = Strong(_show(run, "kd_gain", metric, "gain", sign="+"))
        sentence += [f"{separator}{METRIC_OF[metric].full_label} by ", change]
        sentence += [f" ({_interval(gains[metric])})"] if run.num_folds == 1 else []
    sentence.append(f" against the same student without a teacher; {_describe_gap(gains)}. {_describe_closeness(run)}")
    opening, table = Paragraph(tuple(sentence)), _build_gain_table(run)
    if run.num_folds > 1:
        return [opening, table, Paragraph(f"Means over {run.num_folds} folds ± their sample standard deviation.")]
    source = (
        f"Intervals are 95 %, from a paired bootstrap over the {format_number(dig(run.scores, 'rows', 'test'))} test rows, for "
        "this one seed. Another seed would move the scores as well: repeat with several and compare them by ",
        Typed("research_compare.py --group_by seed"),
        ".",
    )
    return [opening, Paragraph(Strong(describe_gain(gains))), table, Paragraph(source)]


def _build_gain_table(run: Run) -> Table:
    gains = run.scores["kd_gain"]
    single = run.num_folds == 1  # an interval over test rows cannot be averaged over folds
    rows = []
    for metric in GAIN_METRICS:
        cells = [_show(run, "kd_gain", metric, model) for model in ("teacher", "control", "student")]
        cells.append(_show(run, "kd_gain", metric, "gain", sign="+"))
        cells += [_interval(gains[metric]), format_p_value(gains[metric]["p_value"]) or UNKNOWN] if single else []
        share = _gap_closed(gains[metric])
        rows.append([METRIC_OF[metric].full_label, *cells, UNKNOWN if share is None else f"{100 * share + 0.0:.0f} %"])
    uncertainty = ["95 % interval", "p"] if single else []
    header = ["Measure", "Teacher", "Control", "Student", "KD gain", *uncertainty, "Gap closed"]
    return Table("What distillation gained on the test part, student against control", header, rows)


def _interval(gain: Mapping[str, Any]) -> str:
    return format_interval(gain["low"], gain["high"], sign="+") or UNKNOWN


def _gap_closed(gain: Mapping[str, Any]) -> float | None:
    """Return the gain's share of the teacher's lead over the control; of folds, from their means."""
    gap = gain["teacher"] - gain["control"]
    return gain["gain"] / gap if gap > 0 else None


def _describe_gap(gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how much of the way from control to teacher was made, where the teacher is ahead at all."""
    closed: list[str] = []
    widened: list[str] = []
    absent: list[str] = []
    for metric in GAIN_METRICS:
        name = METRIC_OF[metric].full_label
        share = _gap_closed(gains[metric])
        if share is None:
            absent.append(name)
        else:
            (widened if share < 0 else closed).append(f"{100 * abs(share):.0f} % in {name}")
    texts = [f"it closed {', '.join(closed)} of the gap to the teacher"] if closed else []
    texts += [f"it widened the gap to the teacher by {', '.join(widened)}"] if widened else []
    texts += [f"in {', '.join(absent)} the control has no gap to close"] if absent else []
    return "; ".join(texts)


def _describe_closeness(run: Run) -> str:
    student, control = (dig(run.scores, name, "test", "decisions_equal") for name in AGREEMENTS.values())
    if student is None or control is None:
        return ""
    return (
        f"The student decides as its teacher does in {100 * student:.1f} % of the label cells, the control in "
        f"{100 * control:.1f} %."
    )


def _describe_headline(run: Run) -> Text:
    entry = run.metrics["headline"]
    value, teacher = entry["value"], teacher_headline(run.metrics)
    spread = "" if entry.get("std") is None else f" ± {format_number(entry['std'])} over {run.num_folds} folds"
    rows = dig(run.scores, "rows", entry["part"])
    size = "" if rows is None else f" ({rows:,.0f} rows)"
    after = f"{spread} at a threshold of 0.5"
    if value is not None and teacher:
        side = "below" if value < teacher else "above"
        after += (
            f", which keeps {100 * value / teacher:.1f} % of its teacher's {format_number(teacher)} "
            f"({format_number(abs(teacher - value))} {side})"
        )
    majority = dig(run.scores, "majority_baseline", entry["part"], entry["metric"])
    after += "." + ("" if majority is None else f" Guessing each label's majority scores {format_number(majority)}.")
    start = f"{HEADLINE_METRIC.short} of the {entry['model']} on the {entry['part']} part{size} is "
    return (start, Strong(_number(value)), after)


def _describe_scores(run: Run, part: str) -> list[Block]:
    metrics = metrics_of("decisions", "ranking")
    rows = [
        [model, name, *(_show(run, model, part, thresholds, metric.name) for metric in metrics)]
        for model in run.models
        for thresholds, name in THRESHOLDS.items()
        if dig(run.scores, model, part, thresholds) is not None
    ]
    if not rows:
        return []
    falling = ", ".join(metric.short for metric in metrics if metric.lower_is_better)
    ranking = ", ".join(metric.short for metric in metrics if metric.kind == "ranking")
    tuned = "Thresholds are tuned on the validation part" + (
        ", so its tuned scores are optimistic." if part == "validation" else "."
    )
    return [
        Heading(f"Scores on the {part} part"),
        Table(
            f"Scores of each model on the {part} part",
            ["Model", "Thresholds", *(metric.short for metric in metrics)],
            rows,
            text_columns=2,
        ),
        Paragraph(f"{falling}: less is better. {ranking}: the same at every threshold. {tuned}"),
    ]


def _describe_labels(run: Run) -> list[Block]:
    rows = [
        [label, model, *(_show(run, model, "test", "tuned", "per_label", label, name) for name in LABEL_SCORES)]
        for label in run.label_names
        for model in run.models
    ]
    header = ["Label", "Model", *LABEL_SCORES.values()]
    caption = "Every label on the test part, at thresholds tuned on validation"
    return [Heading("Labels"), Table(caption, header, rows, text_columns=2)]


def _describe_confusions(run: Run) -> list[Block]:
    if not run.has(PREDICTION_FILES["test"]):
        return []
    predictions = run.predictions
    counts = {}
    for model, probs in predictions.probs.items():
        tuned = [dig(run.scores, "thresholds", model, label) for label in predictions.label_names]
        if None not in tuned:
            counts[model] = count_confusions(predictions.labels, probs, np.array(tuned))
    rows = [
        [label, model, *(format_number(int(cell)) for cell in counts[model][column])]
        for column, label in enumerate(predictions.label_names)
        for model in counts
    ]
    caption = "Decisions of each model on the test part, at thresholds tuned on validation"
    table = Table(caption, ["Label", "Model", *CONFUSION_NAMES], rows, text_columns=2)
    return [Heading("Confusions"), table] if rows else []


def _describe_calibration(run: Run) -> list[Block]:
    metrics = metrics_of("probabilities")
    names = ("temperature", *(metric.name for metric in metrics))
    rows = [
        [
            model,
            part,
            *(_show(run, model, part, *metric.path) for metric in metrics),
            *(_show(run, model, part, "calibration", name) for name in names),
        ]
        for model in run.models
        for part in reversed(PARTS)
        if dig(run.scores, model, part, "calibration") is not None
    ]
    if not rows:
        return []
    scaled = [f"{metric.short}, scaled" for metric in metrics]
    header = ["Model", "Part", *(metric.short for metric in metrics), "Temperature", *scaled]
    note = (
        "Less is better. Scaled: after dividing the logits by a temperature fitted on the validation part, which changes no "
        "ranking; above 1 it softens an overconfident model."
    )
    return [Heading("Calibration"), Table("Calibration of the probabilities", header, rows, text_columns=2), Paragraph(note)]


def _describe_agreement(run: Run) -> list[Block]:
    columns = [(model, part) for model, entry in AGREEMENTS.items() for part in PARTS if dig(run.scores, entry, part) is not None]
    if not columns:
        return []
    rows = [
        [text, *(_show(run, AGREEMENTS[model], part, name) for model, part in columns)] for name, text in AGREEMENT_NAMES.items()
    ]
    rows += [
        [text, *(_show(run, model, part, name) for model, part in columns)]
        for name, text in SOFT_NAMES.items()
        if any(dig(run.scores, model, part, name) is not None for model, part in columns)
    ]
    header = ["Measure", *(f"{model}, {part}" for model, part in columns)]
    return [Heading("Agreement with the teacher"), Table("Agreement of each student with its teacher", header, rows)]


def _describe_efficiency(run: Run) -> list[Block]:
    if not run.has("efficiency.json"):
        return []
    efficiency = run.efficiency
    models = [model for model in MODELS if model in efficiency]
    ratios = efficiency.get("ratios") or {}
    rows = []
    for entry, (name, ratio) in EFFICIENCY_NAMES.items():
        decimals = 0 if entry.startswith("parameters") else 2
        cells = [_number(dig(efficiency, model, entry), decimals) for model in models]
        rows.append([name, *cells, *([_describe_ratio(efficiency, ratio)] if ratios else [])])
    header = ["Cost", *models, *(["Gain of the student"] if ratios else [])]
    blocks: list[Block] = [Heading("Efficiency"), Table("Size and speed", header, rows)]
    if remark := str(efficiency.get("remark") or ""):
        blocks.append(Paragraph(f"{remark[:1].upper()}{remark[1:]}{'' if remark.endswith('.') else '.'}"))
    note = "Timings were measured once on the machine named below; they vary from run to run."
    if efficiency.get("ratio_ranges"):
        note += " In brackets the lowest and the highest ratio of a round, in which both models are timed in turn."
    return [*blocks, Paragraph(note)]


def _describe_ratio(efficiency: Mapping[str, Any], ratio: str | None) -> str:
    """Return how much cheaper the student is, with the spread over the rounds where it was timed."""
    value = dig(efficiency, "ratios", ratio) if ratio else None
    if value is None:
        return UNKNOWN
    spread = dig(efficiency, "ratio_ranges", str(ratio))
    return f"{value:.2f} ×" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else "")


def _describe_training(run: Run) -> list[Block]:
    facts = dig(run.scores, "training") or {}
    models = [model for model in MODELS if isinstance(facts.get(model), Mapping)]
    rows = [
        [model, *(_number(facts[model].get(name), 1) for name in TRAINING_NAMES)]
        for model in models
        if any(name in facts[model] for name in TRAINING_NAMES)
    ]
    blocks: list[Block] = []
    if rows:
        blocks.append(Table("Training of each model", ["Model", *TRAINING_NAMES.values()], rows))
    notes: list[Text] = []
    if dig(facts, "teacher", "source") == "checkpoint":
        notes.append("The teacher was read from --teacher_checkpoint, fine-tuned elsewhere.")
    notes += [f"{model.capitalize()}: {text}" for model, history in _histories(run) if (text := _describe_progress(history))]
    blocks += [Bullets(notes)] if notes else []
    return [Heading("Training"), *blocks] if blocks else []


def _histories(run: Run) -> Iterator[tuple[str, list[dict[str, float | None]]]]:
    if run.has("history.csv"):
        yield "student", run.history
    if run.has("history_control.csv"):
        yield "control", run.control_history


def _describe_progress(history: Sequence[Mapping[str, float | None]]) -> str:
    """Return what changed from the first to the last epoch, as in "total loss 0.9 to 0.4 over 8 epochs"."""
    names = {"total_loss": "total loss", f"val_{HEADLINE_METRIC.name}": f"validation {HEADLINE_METRIC.label}"}
    changes = [
        f"{text} {format_number(history[0][name])} after the first epoch, {format_number(history[-1][name])} after the last"
        for name, text in names.items()
        if history and history[0].get(name) is not None and history[-1].get(name) is not None
    ]
    return "; ".join(changes) + "." if changes else ""


def _describe_data(run: Run) -> list[Block]:
    dataset = run.environment.get("dataset") if run.has("environment.json") else None
    if not dataset:
        return []
    known_parts = ("train", "validation", "test", "unlabelled")  # sorted by name in the file
    parts = {part: facts for part in known_parts if (facts := dataset["parts"].get(part)) and facts["rows"]}
    rows = [
        [what, *(f"{facts[name]:,}" for facts in parts.values())]
        for what, name in (("Rows", "rows"), ("Distinct texts", "distinct_texts"))
    ]
    rows += [
        [f"Positives: {label}", *(_count_positives(facts["labels"][label], facts["rows"]) for facts in parts.values())]
        for label in dataset["label_names"]
    ]
    kept = {"dropped_rows": "rows without a text", "leaked_rows": "rows left out because their text is in another part"}
    notes = [
        f"{sum(counts.values()):,} {text} ({', '.join(f'{name} {count:,}' for name, count in counts.items() if count)})"
        for key, text in kept.items()
        if sum((counts := dataset.get(key) or {}).values())
    ]
    counted = {
        "duplicate_texts": "rows repeat the text of an earlier one",
        "conflicting_texts": "texts carry contradicting labels",
    }
    notes += [f"{dataset[key]:,} {text}" for key, text in counted.items() if dataset.get(key)]
    blocks: list[Block] = [Heading("Data"), Table("Rows and positives of each part", ["Count", *parts], rows)]
    return [*blocks, Paragraph("; ".join(notes) + ".")] if notes else blocks


def _count_positives(facts: Mapping[str, int], rows: int) -> str:
    """Return positives and their share of the known cells, and how many are known if not all."""
    positive, known = facts["positive"], facts["known"]
    if not known:
        return UNKNOWN
    return f"{positive:,} ({100 * positive / known:.1f} %)" + ("" if known == rows else f" of {known:,} known")


def _describe_folds(run: Run) -> list[Block]:
    if "folds" not in run.metrics:
        return []
    rows: list[list[Text]] = [
        [Link(fold.path.name, f"{fold.path.name}/report"), _number(fold.metrics["headline"]["value"])] for fold in run.folds
    ]
    return [Heading("Folds"), Table("Headline of each fold", ["Fold", HEADLINE_METRIC.short], rows)]


def _describe_plots(plots: Sequence[str]) -> list[Block]:
    return [Heading("Plots"), Figures([Figure(f"plots/{name}", PLOTS[name]) for name in plots])] if plots else []


def _describe_reproduction(run: Run) -> list[Block]:
    if not run.has("environment.json"):
        return []
    environment = run.environment
    blocks: list[Block] = [Heading("How to repeat it")]
    if command := environment.get("command_line"):
        blocks.append(Code(shlex.join(command) if isinstance(command, list) else str(command)))
    rows = [
        [name, str(environment[key])] for name, key in (("Device", "device"), ("Threads", "num_threads")) if key in environment
    ]
    rows += [[name, str(value)] for name, value in sorted((environment.get("versions") or {}).items())]
    table = Table("Where it ran", ["What", "Recorded"], rows, text_columns=2)
    return [*blocks, table] if rows else blocks if command else []


def _describe_disagreements(run: Run, fetch_texts: FetchTexts | None) -> list[Block]:
    """Show where teacher and student differ most; the texts may be abusive and stay hidden until a click."""
    if not run.has(PREDICTION_FILES["test"]) or not {"teacher", "student"} <= run.predictions.probs.keys():
        return []
    predictions = run.predictions
    teacher, student = predictions.probs["teacher"], predictions.probs["student"]
    places = most_disagreeing(teacher, student, MAX_DISAGREEMENTS)
    texts = {} if fetch_texts is None else fetch_texts(predictions.index[places].tolist())
    rows: list[list[Text]] = []
    for place in places.tolist():
        column = int(np.argmax(np.abs(teacher[place] - student[place])))
        index, truth = int(predictions.index[place]), predictions.labels[place, column]
        text = Hidden("Show the text", texts[index]) if index in texts else "not kept in the run directory"
        rows.append(
            [
                str(index),
                text,
                predictions.label_names[column],
                UNKNOWN if np.isnan(truth) else f"{truth:.0f}",
                f"{teacher[place, column]:.3f}",
                f"{student[place, column]:.3f}",
                f"{np.abs(teacher[place] - student[place]).sum():.3f}",
            ]
        )
    header = ["Row", "Text", "Label that differs most", "Truth", "Teacher", "Student", "Distance over all labels"]
    note = (
        "Rows are counted from 0 in the table; the distance is the sum over labels of the probabilities' differences. "
        "The texts may be abusive, so each is hidden until you ask for it."
    )
    caption = f"The {len(rows)} test rows where teacher and student differ most"
    return [Heading("Where teacher and student disagree"), Paragraph(note), Table(caption, header, rows, text_columns=3)]


def _draw_plots(run: Run) -> list[str]:
    """Draw what the files allow and return the names of the plots, in the order of PLOTS."""
    drawings: dict[str, Callable[[io.BytesIO], None]] = {}
    if run.has("history.csv") and run.history:
        best_epoch = dig(run.scores, "training", "student", "best_epoch")
        control = run.control_history if run.has("history_control.csv") else ()
        drawings["training.png"] = lambda target: figures.plot_training(run.history, target, best_epoch, control)
    f1 = {
        model: {label: dig(run.scores, model, "test", "tuned", "per_label", label, "f1") for label in run.label_names}
        for model in run.models
    }
    drawings["label_f1.png"] = lambda target: figures.plot_label_f1(f1, target)
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
    predictions = run.predictions
    tables = {model: compute_calibration(predictions.labels, probs) for model, probs in predictions.probs.items()}
    drawings["precision_recall.png"] = lambda target: figures.plot_precision_recall(
        predictions.label_names, predictions.labels, predictions.probs, target
    )
    drawings["reliability.png"] = lambda target: figures.plot_reliability(tables, target)
