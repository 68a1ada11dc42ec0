"""What a run shows, at the top of its report: the models' scores with intervals, what they mean and what they leave open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from research.evaluation.gain import GAIN_METRICS, describe_gain, describe_keeping
from research.evaluation.inference import Difference
from research.names import EPOCH_FLAGS, HEADLINE_METRIC, METRIC_OF, MODELS
from research.report.document import Below, Block, Box, Heading, Inline, Paragraph, Strong, Table, Text, Typed
from research.report.intervals import Resampled
from research.report.numbers import UNKNOWN, format_interval, format_number, format_p_value, show_number, show_score
from research.runs.formats import dig
from research.runs.run import Run, teacher_headline

AGREEMENTS = {"student": "agreement", "control": "control_agreement"}


def describe_verdict(run: Run, resampled: Resampled | None) -> Box:
    """Return the box that opens a report; the intervals are those of `resampled`, where there are any."""
    blocks: list[Block] = [Paragraph(Strong(text)) for text in _conclude(run, resampled)]
    blocks.append(Paragraph(_describe_headline(run)))
    if table := _build_score_table(run, resampled):
        blocks.append(table)
    if run.num_folds == 1 and "kept" in run.scores:  # a bound cannot be averaged over folds
        blocks.append(Paragraph(describe_keeping(run.scores["kept"])))
    return Box([*blocks, *map(Paragraph, [*_describe_basis(run, resampled), *_describe_doubts(run)])])


def _conclude(run: Run, resampled: Resampled | None) -> list[str]:
    """Return what the scores mean, in a sentence for the control and one for the teacher; intervals are of one split."""
    sentences = [describe_gain(run.scores["kd_gain"])] if "kd_gain" in run.scores and run.num_folds == 1 else []
    found = None if resampled is None else resampled.difference("student", "teacher", HEADLINE_METRIC.name)
    if found is not None:
        measure, size = HEADLINE_METRIC.full_label, f"({_write_interval(found)})"
        if found.low > 0:
            sentences.append(f"In {measure} the student is above its teacher by {format_number(found.value)} {size}.")
        elif found.high < 0:
            sentences.append(f"In {measure} the student is below its teacher by {format_number(-found.value)} {size}.")
        else:
            change = format_number(found.value, sign="+")
            sentences.append(
                f"In {measure} these rows cannot tell the student from its teacher: the difference is {change} {size}."
            )
    return [sentence for sentence in sentences if sentence]


def _describe_headline(run: Run) -> Text:
    entry = run.metrics["headline"]
    value, teacher = entry["value"], teacher_headline(run.metrics)
    spread = "" if entry.get("std") is None else f" ± {format_number(entry['std'])} over {run.num_folds} folds"
    after = f"{spread} at a threshold of 0.5"
    if value is not None and teacher:
        side = "below" if value < teacher else "above"
        after += (
            f", which keeps {100 * value / teacher:.1f} % of its teacher's {format_number(teacher)} "
            f"({format_number(abs(teacher - value))} {side})"
        )
    majority = dig(run.scores, "majority_baseline", entry["part"], entry["metric"])
    after += "." + ("" if majority is None else f" Guessing each label's majority scores {format_number(majority)}.")
    start = f"{HEADLINE_METRIC.short} of the {entry['model']} on the {entry['part']} part is "
    return (start, Strong(show_number(value)), after)


def _build_score_table(run: Run, resampled: Resampled | None) -> Table | None:
    """Return the models' scores by the measures of a gain, and how far the student is from each of the others."""
    others = [model for model in run.models if model != "student"] if "student" in run.models else []
    rows: list[list[Text]] = []
    for metric in GAIN_METRICS:
        if all(dig(run.scores, model, "test", *METRIC_OF[metric].path) is None for model in run.models):
            continue
        cells = [_score_cell(run, resampled, model, metric) for model in run.models]
        cells += [_difference_cell(run, resampled, model, metric) for model in others]
        rows.append([METRIC_OF[metric].full_label, *cells])
    header = ["Measure", *(model.capitalize() for model in run.models), *(f"Student minus {model}" for model in others)]
    return Table("Scores on the test part and their differences", header, rows) if rows else None


def _score_cell(run: Run, resampled: Resampled | None, model: str, metric: str) -> Text:
    text = show_score(run, model, "test", *METRIC_OF[metric].path)
    found = None if resampled is None else resampled.score(model, metric)
    return text if found is None else (text, Below(format_interval(found.low, found.high)))


def _difference_cell(run: Run, resampled: Resampled | None, model: str, metric: str) -> Text:
    gain = dig(run.scores, "kd_gain", metric)
    if model == "control" and gain:
        text = show_score(run, "kd_gain", metric, "gain", sign="+")
        interval = _gain_interval(gain) if run.num_folds == 1 else UNKNOWN
        return text if interval == UNKNOWN else (text, Below(interval))
    found = None if resampled is None else resampled.difference("student", model, metric)
    if found is not None:
        return format_number(found.value, sign="+"), Below(format_interval(found.low, found.high, sign="+"))
    values = [dig(run.scores, name, "test", *METRIC_OF[metric].path) for name in ("student", model)]
    return UNKNOWN if None in values else format_number(values[0] - values[1], sign="+")


def _write_interval(found: Difference) -> str:
    return f"95 % interval {format_interval(found.low, found.high, sign='+')}"


def _describe_basis(run: Run, resampled: Resampled | None) -> list[Text]:
    """Say on which rows and seeds the scores stand, and what the intervals are of."""
    rows = dig(run.scores, "rows", "test")
    size = "" if rows is None else f" on {rows:,.0f} test rows"
    if resampled is not None and resampled.num_texts is not None:
        size += f" of {resampled.num_texts:,} distinct texts"
    seeds = [
        f"{text} {run.config[name]}" for name, text in (("seed", "seed"), ("split_seed", "split seed")) if name in run.config
    ]
    if run.num_folds > 1:
        return [f"Means over {run.num_folds} folds ± their sample standard deviation{size and f',{size} each'}."]
    measured = f"Measured{size}{', ' if seeds else ''}{', '.join(seeds)}."
    if resampled is None:
        return [measured]
    unit = "rows" if resampled.num_texts is None else "texts"
    meaning: tuple[Inline, ...] = (
        f"{measured} Intervals are 95 %, from a bootstrap over the {unit}: they say what other {unit} would have changed. "
        "Another seed would move the scores as well; whether distillation helps, several can tell, compared by ",
        Typed("research_compare.py --group_by seed"),
        ".",
    )
    return [meaning]


def _describe_doubts(run: Run) -> list[Text]:
    """Return what a reader must know before believing the scores."""
    doubts: list[Text] = []
    if dig(run.scores, "training", "teacher", "training_texts") == "unknown":
        doubts.append(
            (
                Strong("The teacher may have seen test rows."),
                " Its checkpoint does not say which texts it was trained on; if some of the test part were among them, its "
                "scores and the student's are too high.",
            )
        )
    if improving := list_improving(run):
        flags = sorted({EPOCH_FLAGS[model] for model in improving})
        names = " and ".join([", ".join(improving[:-1]), improving[-1]] if len(improving) > 1 else improving)
        text = f"Still improving: {names}."
        why = " The best epoch is the last one, so more epochs may change the scores and what they say of each other; raise "
        doubts.append((Strong(text), why, Typed(flags[0]), *((" and ", Typed(flags[1])) if len(flags) > 1 else ()), "."))
    if "control" not in run.models and run.config.get("pipeline") == "kd_only":
        doubts.append(
            (
                "Whether distillation helped cannot be told from this run alone: it has no control. Train one with ",
                Typed("--with_control"),
                ", or let ",
                Typed("research_compare.py"),
                " find a student_only run of the same data, seed and student.",
            )
        )
    return doubts


def list_improving(run: Run) -> list[str]:
    """Return the models whose best epoch is their last one; of folds, in all of them."""
    facts = {model: dig(run.scores, "training", model) or {} for model in MODELS}
    return [model for model, found in facts.items() if found.get("best_epoch") and found["best_epoch"] == found.get("epochs_run")]


def describe_gain_section(run: Run) -> list[Block]:
    """Return what the student gained over its control by all three measures, and how much of the way to its teacher."""
    if "kd_gain" not in run.scores:
        return []
    gains = run.scores["kd_gain"]
    sentence: list[Inline] = [f"Distillation ({run.config.get('kd_method')}) changed "]
    for separator, metric in zip(("", ", ", " and "), GAIN_METRICS, strict=True):
        change = Strong(show_score(run, "kd_gain", metric, "gain", sign="+"))
        sentence += [f"{separator}{METRIC_OF[metric].full_label} by ", change]
    sentence.append(f" against the same student without a teacher; {_describe_gap(gains)}. {_describe_closeness(run)}")
    return [Heading("What distillation gained"), Paragraph(tuple(sentence)), _build_gain_table(run)]


def _build_gain_table(run: Run) -> Table:
    gains = run.scores["kd_gain"]
    single = run.num_folds == 1  # an interval over test rows cannot be averaged over folds
    rows = []
    for metric in GAIN_METRICS:
        cells = [show_score(run, "kd_gain", metric, "gain", sign="+")]
        cells += [_gain_interval(gains[metric]), format_p_value(gains[metric].get("p_holm")) or UNKNOWN] if single else []
        share = _gap_closed(gains[metric])
        rows.append([METRIC_OF[metric].full_label, *cells, UNKNOWN if share is None else f"{100 * share + 0.0:.0f} %"])
    uncertainty = ["95 % interval, rows", "p (Holm)"] if single else []
    header = ["Measure", "KD gain", *uncertainty, "Gap closed"]
    return Table("What distillation gained on the test part, student against control", header, rows)


def _gain_interval(gain: Mapping[str, Any]) -> str:
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
