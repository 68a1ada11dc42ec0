"""What a run shows, at the top of its report: the models' scores with intervals, what they mean and what they leave open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from research.evaluation.gain import GAIN_METRICS, describe_gain, describe_keeping
from research.names import HEADLINE_METRIC, METRIC_OF, TEACHER_TABLE, epoch_flag, order_of_model
from research.report.document import Below, Block, Box, Heading, Inline, Paragraph, Strong, Table, Text, Typed
from research.report.intervals import Resampled
from research.report.numbers import UNKNOWN, format_interval, format_number, format_p_value, show_number, show_score
from research.runs.formats import dig
from research.runs.run import Run, teacher_headline
from research_config import unused_fields

AGREEMENTS = {"student": "agreement", "control": "control_agreement"}


def describe_verdict(run: Run, resampled: Resampled | None) -> Box:
    """Return the box that opens a report; the intervals are those of `resampled`, where there are any."""
    blocks: list[Block] = [Paragraph(Strong(text)) for text in _conclude(run, resampled)]
    blocks.append(Paragraph(_describe_headline(run)))
    if table := _build_score_table(run, resampled):
        blocks.append(table)
    if kept := run.over_all_rows.get("kept"):
        blocks.append(Paragraph(describe_keeping(kept)))
    return Box([*blocks, *map(Paragraph, [*_describe_basis(run, resampled), *_describe_doubts(run)])])


def _conclude(run: Run, resampled: Resampled | None) -> list[str]:
    """Return what the scores mean, in a sentence for the control and one for the teacher."""
    sentences = [describe_gain(gains)] if (gains := run.over_all_rows.get("kd_gain")) else []
    found = _find_gap(run, resampled, "teacher", HEADLINE_METRIC.name)
    if found is not None:
        value, low, high = found
        measure, size = HEADLINE_METRIC.full_label, f"(95 % interval {format_interval(low, high, sign='+')})"
        if low > 0:
            sentences.append(f"In {measure} the student is above its teacher by {format_number(value)} {size}.")
        elif high < 0:
            sentences.append(f"In {measure} the student is below its teacher by {format_number(-value)} {size}.")
        else:
            change = format_number(value, sign="+")
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
    if pooled := dig(run.metrics, "pooled", "scores", metric, model):
        return show_number(pooled["value"]), Below(format_interval(pooled["low"], pooled["high"]))
    text = show_score(run, model, "test", *METRIC_OF[metric].path)
    found = None if resampled is None else resampled.score(model, metric)
    return text if found is None else (text, Below(format_interval(found.low, found.high)))


def _difference_cell(run: Run, resampled: Resampled | None, model: str, metric: str) -> Text:
    if found := _find_gap(run, resampled, model, metric):
        value, low, high = found
        return format_number(value, sign="+"), Below(format_interval(low, high, sign="+"))
    if model == "control" and dig(run.scores, "kd_gain", metric):
        return show_score(run, "kd_gain", metric, "gain", sign="+")
    values = [dig(run.scores, name, "test", *METRIC_OF[metric].path) for name in ("student", model)]
    return UNKNOWN if None in values else format_number(values[0] - values[1], sign="+")


def _find_gap(run: Run, resampled: Resampled | None, model: str, metric: str) -> tuple[float, float, float] | None:
    """Return how far the student is from another model over all rows, with both ends of the interval, where it is known."""
    if gain := dig(run.over_all_rows, "kd_gain", metric) if model == "control" else None:
        found = gain["gain"], gain["low"], gain["high"]
    elif gap := dig(run.metrics, "pooled", "gap", metric) if model == "teacher" else None:
        found = gap["value"], gap["low"], gap["high"]
    else:
        drawn = None if resampled is None else resampled.difference("student", model, metric)
        found = (None, None, None) if drawn is None else (drawn.value, drawn.low, drawn.high)
    return None if None in found else found


def _describe_basis(run: Run, resampled: Resampled | None) -> list[Text]:
    """Say on which rows and seeds the scores stand, and what the intervals are of."""
    rows = dig(run.scores, "rows", "test")
    size = "" if rows is None else f" on {rows:,.0f} test rows"
    if resampled is not None and resampled.num_texts is not None:
        size += f" of {resampled.num_texts:,} distinct texts"
    unread = unused_fields(str(run.config.get("pipeline")))
    seeds = [
        f"{text} {run.config[name]}"
        for name, text in (("seed", "seed"), ("split_seed", "split seed"))
        if name in run.config and name not in unread
    ]
    if run.num_folds > 1:
        return [_describe_folds_basis(run, size)]
    measured = f"Measured{size}{', ' if seeds else ''}{', '.join(seeds)}."
    if resampled is None:
        return [measured]
    unit = "rows" if resampled.num_texts is None else "texts"
    drawn = f"Intervals are 95 %, from a bootstrap over the {unit}: they say what other {unit} would have changed."
    if "seed" in unread:
        return [f"{measured} {drawn}"]
    meaning: tuple[Inline, ...] = (
        f"{measured} {drawn} Another seed would move the scores as well; whether distillation helps, several can tell, "
        "compared by ",
        Typed("research_compare.py --group_by seed"),
        ".",
    )
    return [meaning]


def _describe_folds_basis(run: Run, size: str) -> Text:
    pooled = run.metrics.get("pooled")
    if not pooled:
        return f"Means over {run.num_folds} folds ± their sample standard deviation{size and f',{size} each'}."
    return (
        f"The table is over all {pooled['rows']:,} rows of {pooled['texts']:,} distinct texts, each answered by the model of the "
        f"fold, of {run.num_folds}, that did not learn from it: F1 of all rows together, at the thresholds of each fold; mean "
        "average precision as the mean over folds. Intervals are 95 %, over the texts and the folds' trainings. Several seeds "
        "are compared by ",
        Typed("research_compare.py --group_by seed"),
        f"; elsewhere scores are means over the folds ± their sample standard deviation{size and f',{size} each'}.",
    )


def _describe_doubts(run: Run) -> list[Text]:
    """Return what a reader must know before believing the scores."""
    doubts: list[Text] = []
    training = run.scores.get("training") or {}
    unknown = [name for name in training if dig(training, name, "training_texts") == "unknown"]
    if unknown:
        what = "table" if unknown == [TEACHER_TABLE] else "checkpoint"
        doubts.append(
            (
                Strong("The teacher may have seen test rows."),
                f" Its {what} does not say which texts it was trained on; if some of the test part were among them, its "
                "scores and the student's are too high.",
            )
        )
    if improving := list_improving(run):
        flags = sorted(set(map(epoch_flag, improving)))
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
    facts = {model: found for model, found in (run.scores.get("training") or {}).items() if isinstance(found, Mapping)}
    return [
        model
        for model in sorted(facts, key=order_of_model)
        if facts[model].get("best_epoch") and facts[model]["best_epoch"] == facts[model].get("epochs_run")
    ]


def describe_gain_section(run: Run) -> list[Block]:
    """Return what the student gained over its control by all three measures, and how much of the way to its teacher."""
    if "kd_gain" not in run.scores:
        return []
    gains = run.over_all_rows.get("kd_gain") or run.scores["kd_gain"]
    sentence: list[Inline] = [f"Distillation ({run.config.get('kd_method')}) changed "]
    for separator, metric in zip(("", ", ", " and "), GAIN_METRICS, strict=True):
        sentence += [f"{separator}{METRIC_OF[metric].full_label} by ", Strong(_show_gain(run, metric))]
    control = "the same student without a teacher"
    if run.config.get("control_labels") == "pseudo":
        control = "the same student on the labels and the teacher's decisions on unlabelled rows"
    sentence.append(f" against {control}; {_describe_gap(gains)}. {_describe_closeness(run)}".rstrip())
    return [Heading("What distillation gained"), Paragraph(tuple(sentence)), _build_gain_table(run, gains)]


def _build_gain_table(run: Run, gains: Mapping[str, Mapping[str, Any]]) -> Table:
    with_intervals = "kd_gain" in run.over_all_rows  # an interval over test rows cannot be averaged over folds
    rows = []
    for metric in GAIN_METRICS:
        cells = [_show_gain(run, metric)]
        if with_intervals:
            interval = format_interval(gains[metric]["low"], gains[metric]["high"], sign="+")
            cells += [interval or UNKNOWN, format_p_value(gains[metric].get("p_holm")) or UNKNOWN]
        share = _gap_closed(gains[metric])
        rows.append([METRIC_OF[metric].full_label, *cells, UNKNOWN if share is None else f"{100 * share + 0.0:.0f} %"])
    uncertainty = ["95 % interval, rows", "p (Holm)"] if with_intervals else []
    header = ["Measure", "KD gain", *uncertainty, "Gap closed"]
    return Table("What distillation gained on the test part, student against control", header, rows)


def _show_gain(run: Run, metric: str) -> str:
    """Return a gain over all rows; of folds that were not pooled, mean and deviation."""
    gain = dig(run.over_all_rows, "kd_gain", metric, "gain")
    return show_score(run, "kd_gain", metric, "gain", sign="+") if gain is None else format_number(gain, sign="+")


def _gap_closed(gain: Mapping[str, Any]) -> float | None:
    """Return the gain's share of the teacher's lead over the control; of folds, from their means."""
    gap = 0.0 if gain["teacher"] is None else gain["teacher"] - gain["control"]
    return gain["gain"] / gap if gap > 0 else None


def _describe_gap(gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how much of the way from control to teacher was made, where the teacher is ahead at all."""
    if all(gain["teacher"] is None for gain in gains.values()):
        return "its teacher does not speak of all test rows, so there is no gap to set that against"
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
