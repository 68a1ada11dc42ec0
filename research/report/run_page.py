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
from research.evaluation.metrics import count_confusions, most_disagreeing
from research.flags import format_value
from research.names import HEADLINE_METRIC, LABEL_SCORES, METRIC_OF, MODELS, PARTS, THRESHOLDS, metrics_of, order_of_model
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
    Link,
    Paragraph,
    Table,
    Text,
    Typed,
    render_html,
    render_markdown,
)
from research.report.intervals import Resampled, resample_run
from research.report.model_card import write_cards
from research.report.numbers import UNKNOWN, format_interval, format_number, show_number, show_score, show_threshold
from research.report.teachers import describe_teachers
from research.report.verdict import AGREEMENTS, describe_gain_section, describe_verdict, list_improving
from research.runs.formats import PLOTS, PREDICTION_FILES, dig, read_json, to_plain, write_text_atomic
from research.runs.run import Run, load_run
from research.storage.files import write_atomic
from research_config import ExperimentConfig, saved_settings

FetchTexts = Callable[[Sequence[int]], Mapping[int, str]]
MAX_DISAGREEMENTS = 20
LONGEST_FLAG = 200
# What a reader asks first stands first, and two columns come out about equally long.
FIGURE_ORDER = ("label_f1.png", "precision_recall.png", "training.png", "reliability.png")
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
    """Write report.md, report.html, plots/*.png and the models' cards from the files of a run's directory.

    The run may be one of a single split or of several folds.

    With `metrics` the report can be written before metrics.json, which marks the run as finished. The texts
    are in none of the files: `fetch_texts` returns those of some values of `index` for report.html. Without `plots`
    none is drawn, which takes most of the time.

    Raises:
        InputError: one of the files is missing or cut short.
    """
    path = Path(run_dir)
    run = load_run(path) if metrics is None else Run(path, read_json(path / "config.json"), to_plain(metrics))
    resampled = resample_run(run)
    drawn = _draw_plots(run, resampled) if plots else []
    document = Document(run.path.resolve().name, _build_blocks(run, resampled, drawn))
    write_text_atomic(run.path / "report.md", render_markdown(document))
    images = {f"plots/{name}": (run.path / "plots" / name).read_bytes() for name in drawn}
    document = Document(document.title, document.blocks + _describe_disagreements(run, fetch_texts))
    write_text_atomic(run.path / "report.html", render_html(document, images))
    write_cards(run, resampled)


def _build_blocks(run: Run, resampled: Resampled | None, plots: Sequence[str]) -> list[Block]:
    return [
        describe_verdict(run, resampled),
        *_describe_figures(run, plots),
        *describe_gain_section(run),
        *_describe_scores(run, "test"),
        *_describe_labels(run, resampled),
        *_describe_confusions(run),
        *_describe_scores(run, "validation"),
        *_describe_calibration(run),
        *describe_teachers(run),
        *_describe_agreement(run),
        *_describe_efficiency(run),
        *_describe_training(run),
        *_describe_data(run),
        *_describe_folds(run),
        *_describe_flags(run),
        *_describe_reproduction(run),
    ]


def _describe_scores(run: Run, part: str) -> list[Block]:
    metrics = metrics_of("decisions", "ranking")
    rows = [
        [model, name, *(show_score(run, model, part, thresholds, metric.name) for metric in metrics)]
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


def _describe_labels(run: Run, resampled: Resampled | None) -> list[Block]:
    rows: list[list[str]] = []
    for label in run.label_names:
        for model in run.models:
            keys = (model, "test", "tuned", "per_label", label)
            scores = {name: show_score(run, *keys, name) for name in LABEL_SCORES}
            scores["threshold"] = show_threshold(run, *keys, "threshold")
            if resampled is not None:
                interval = _f1_interval(resampled, model, label)
                scores["f1"] += f" ({format_interval(*interval)})" if interval else ""
            rows.append([label, model, *scores.values()])
    header = ["Label", "Model", *LABEL_SCORES.values()]
    caption = "Every label on the test part, at thresholds tuned on validation" + (
        "; in brackets the 95 % interval of F1" if resampled is not None else ""
    )
    blocks: list[Block] = [Heading("Labels"), Table(caption, header, rows, text_columns=2)]
    unknown = [label for label in run.label_names if all(_known_cells(run, model, label) == 0 for model in run.models)]
    if unknown:
        blocks.append(Paragraph(f"Without a known test cell, so left out of every mean over labels: {', '.join(unknown)}."))
    return blocks


def _known_cells(run: Run, model: str, label: str) -> float | None:
    return dig(run.scores, model, "test", "tuned", "per_label", label, "known")


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
            *(show_score(run, model, part, *metric.path) for metric in metrics),
            *(show_score(run, model, part, "calibration", name) for name in names),
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
        [text, *(show_score(run, AGREEMENTS[model], part, name) for model, part in columns)]
        for name, text in AGREEMENT_NAMES.items()
    ]
    rows += [
        [text, *(show_score(run, model, part, name) for model, part in columns)]
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
        cells = [show_number(dig(efficiency, model, entry), decimals) for model in models]
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
    models = sorted((model for model, found in facts.items() if isinstance(found, Mapping)), key=order_of_model)
    rows = [
        [model, *(show_number(facts[model].get(name), 1) for name in TRAINING_NAMES)]
        for model in models
        if any(name in facts[model] for name in TRAINING_NAMES)
    ]
    blocks: list[Block] = []
    if rows:
        blocks.append(Table("Training of each model", ["Model", *TRAINING_NAMES.values()], rows))
    notes: list[Text] = []
    given = [model for model in models if facts[model].get("source") == "checkpoint"]
    if given:
        named = "The teacher was" if given == ["teacher"] else f"{', '.join(given)} were"
        notes.append(f"{named} read from --teacher_checkpoint, fine-tuned elsewhere.")
    notes += [f"{model.capitalize()}: {text}" for model, history in _histories(run) if (text := _describe_progress(history))]
    blocks += [Bullets(notes)] if notes else []
    blocks += [table] if (table := _describe_ngrams({model: facts[model].get("ngrams") for model in models}, run)) else []
    blocks += [block for model in models if (block := _describe_trials(model, facts[model].get("trials") or (), run))]
    return [Heading("Training"), *blocks] if blocks else []


def _describe_ngrams(facts: Mapping[str, Mapping[str, Any] | int | None], run: Run) -> Table | None:
    """Return what --student_ngrams put beside a model's layers; of tf-idf, `ngrams` is a number."""
    rows = [
        [
            model,
            f"{found['ngrams']:,}",
            str(found["longest"]),
            format_value(found["inverse_penalty"]),
            f"{found['share']:.1f}",
            *(show_number(found["validation"][side]) for side in ("layers", "ngrams", "together")),
        ]
        for model, found in facts.items()
        if isinstance(found, Mapping)
    ]
    if not rows:
        return None
    short = METRIC_OF[run.config["select_by"]].short
    header = [
        "Model",
        "N-grams",
        "Pieces at most",
        "Inverse penalty",
        "Share",
        f"{short}, layers",
        f"{short}, n-grams",
        f"{short}, both",
    ]
    return Table("N-grams beside the layers; penalty and share are chosen on validation", header, rows)


def _describe_trials(model: str, trials: Sequence[Mapping[str, Any]], run: Run) -> Table | None:
    """Return the trials of --search for a model, the chosen one marked."""
    if not trials:
        return None
    metric = METRIC_OF[run.config["select_by"]]
    rows = [
        [
            *(format_value(value) for value in trial["settings"].values()),
            UNKNOWN if trial.get("failed") else show_number(trial["validation"]),
            show_number(trial.get("best_epoch"), 0),
            show_number(trial.get("epochs_run"), 0),
            "failed" if trial.get("failed") else "chosen" if trial.get("chosen") else "",
        ]
        for trial in trials
    ]
    header = [*(f"--{flag}" for flag in trials[0]["settings"]), f"{metric.short}, validation", "Best epoch", "Epochs run", ""]
    return Table(f"Trials of --search for the {model}, chosen on validation", header, rows)


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
    near = dataset.get("near_duplicates") or {}  # which runs of earlier versions did not count
    told = {"unlabelled": "unlabelled rows left out because their text nearly equals a held-out one"}
    told["train"] = "training rows kept whose text nearly equals one of test"
    notes += [f"{near[part]:,} {text}" for part, text in told.items() if near.get(part)]
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
        [Link(fold.path.name, f"{fold.path.name}/report"), show_number(fold.metrics["headline"]["value"])] for fold in run.folds
    ]
    return [Heading("Folds"), Table("Headline of each fold", ["Fold", HEADLINE_METRIC.short], rows)]


def _describe_figures(run: Run, plots: Sequence[str]) -> list[Block]:
    if not plots:
        return []
    captions = dict(PLOTS)
    if "student" in list_improving(run):
        captions["training.png"] += "; the best epoch is the last one: the student was still improving"
    return [Heading("Figures"), Figures([Figure(f"plots/{name}", captions[name]) for name in FIGURE_ORDER if name in plots])]


def _describe_flags(run: Run) -> list[Block]:
    """List the flags that are not at their defaults, and what was found from the data, which has none."""
    defaults = saved_settings(ExperimentConfig())
    rows: list[list[Text]] = [
        [Typed(f"--{name}"), *(_show_flag(settings.get(name)) for settings in (run.config, defaults))]
        for name, value in run.config.items()
        if name not in defaults or value != defaults[name]
    ]
    if not rows:
        return []
    caption = "Flags that differ from their defaults; every flag is in config.json"
    return [Heading("Flags"), Table(caption, ["Flag", "This run", "Default"], rows, text_columns=3)]


def _show_flag(value: Any) -> str:
    text = format_value(value)
    return (text if len(text) <= LONGEST_FLAG else text[: LONGEST_FLAG - 1] + "…") or UNKNOWN


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


def _draw_plots(run: Run, resampled: Resampled | None) -> list[str]:
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
    intervals = {model: {label: _f1_interval(resampled, model, label) for label in run.label_names} for model in run.models}
    drawings["label_f1.png"] = lambda target: figures.plot_label_f1(f1, target, intervals)
    if run.has(PREDICTION_FILES["test"]):
        _add_prediction_drawings(run, drawings)
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    for name, draw in drawings.items():
        buffer = io.BytesIO()
        draw(buffer)
        write_atomic(folder / name, buffer.getvalue())
    return [name for name in PLOTS if name in drawings]


def _f1_interval(resampled: Resampled | None, model: str, label: str) -> tuple[float, float] | None:
    found = None if resampled is None else resampled.f1_of(model, label)
    return None if found is None else (found.low, found.high)


def _add_prediction_drawings(run: Run, drawings: dict[str, Callable[[io.BytesIO], None]]) -> None:
    predictions = run.predictions
    tables = {model: compute_calibration(predictions.labels, probs) for model, probs in predictions.probs.items()}
    drawings["precision_recall.png"] = lambda target: figures.plot_precision_recall(
        predictions.label_names, predictions.labels, predictions.probs, target
    )
    drawings["reliability.png"] = lambda target: figures.plot_reliability(tables, target)
