"""The section of a report on several teachers, or on a table of probabilities: each by itself, and all together."""

from __future__ import annotations

from research.evaluation.gain import GAIN_METRICS
from research.names import METRIC_OF, PARTS, TEACHER_TABLE, order_of_model
from research.report.document import Block, Heading, Paragraph, Table
from research.report.numbers import show_score
from research.runs.formats import dig
from research.runs.run import Run

# Chosen on validation by the ranking, as epochs are by default.
CHOOSING_METRIC = METRIC_OF["average_precision_macro"]


def describe_teachers(run: Run) -> list[Block]:
    """Return the scores of each teacher beside those of their mean, and which is best by validation; nothing for one model."""
    teachers = run.scores.get("teachers")
    if not teachers:
        return []
    rows = [[name, *_score_cells(run, "teachers", name)] for name in sorted(teachers, key=order_of_model)]
    if "teacher" in run.models and len(teachers) > 1:
        rows.append(["all together", *_score_cells(run, "teacher")])
    header = ["Teacher", *(f"{METRIC_OF[metric].short}, {part}" for part in PARTS for metric in GAIN_METRICS)]
    blocks: list[Block] = [Heading("Teachers"), Table("Each teacher by itself and the mean of their probabilities", header, rows)]
    sentences = [*_describe_best(run), *_describe_coverage(run)]
    return [*blocks, Paragraph(" ".join(sentences))] if sentences else blocks


def _score_cells(run: Run, *keys: str) -> list[str]:
    return [show_score(run, *keys, part, *METRIC_OF[metric].path) for part in PARTS for metric in GAIN_METRICS]


def _describe_best(run: Run) -> list[str]:
    """Name the teacher that ranks best on validation, the only part that may choose one."""
    found = {name: dig(scores, "validation", *CHOOSING_METRIC.path) for name, scores in run.scores["teachers"].items()}
    known = {name: value for name, value in found.items() if value is not None}
    if len(known) < 2:
        return []
    best = max(known, key=lambda name: known[name])
    score = show_score(run, "teachers", best, "test", *CHOOSING_METRIC.path)
    return [f"The best single teacher by {CHOOSING_METRIC.label} on validation is {best}, with {score} on the test part."]


def _describe_coverage(run: Run) -> list[str]:
    coverage = dig(run.scores, "teachers", TEACHER_TABLE, "coverage")
    if not coverage:
        return []
    shares = ", ".join(f"{100 * share:.1f} % of {part}" for part, share in coverage.items())
    text = f"{TEACHER_TABLE} is the table of --teacher_probs_path, which speaks of these rows: {shares}; its scores are of those."
    alone = len(run.scores["teachers"]) == 1
    return [f"{text} The student learned the other rows from the labels alone." if alone else text]
