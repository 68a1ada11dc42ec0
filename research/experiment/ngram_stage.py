"""--student_ngrams: a logistic regression on the n-grams of its pieces is put beside a trained student's layers."""

from __future__ import annotations

import logging
from typing import Any

from numpy.typing import NDArray

from research.errors import InputError
from research.evaluation.calibration import sigmoid
from research.evaluation.metrics import compute_metrics, take_best
from research.evaluation.thresholds import DEFAULT_THRESHOLD
from research.experiment.context import RunContext
from research.experiment.training import predict_rows, weigh_positives
from research.models.classifiers import EncoderClassifier, TextClassifier
from research.models.ngram_table import LEAST_TEXTS, NgramTable, list_ngrams
from research.models.ngrams import build_branch
from research.models.tfidf import INVERSE_PENALTIES, fit_labels
from research.names import METRIC_OF

log = logging.getLogger(__name__)
SHARES = tuple(tenths / 10 for tenths in range(11))


def count_ngrams(context: RunContext) -> NgramTable:
    """Return the n-grams of the student's pieces that the labelled training texts have in common.

    Raises:
        InputError: there are none.
    """
    inputs, tokens = context.inputs, context.tokens.student
    longest = inputs.config.student_ngrams
    assert tokens is not None and longest is not None
    table = list_ngrams(*tokens.take(inputs.split.train), inputs.shapes["student"].vocabulary, longest)
    if not len(table.codes):
        raise InputError(
            f"--student_ngrams: no piece stands in {LEAST_TEXTS} of the {len(inputs.split.train)} training texts; drop the flag"
        )
    return table


def add_ngrams(name: str, student: TextClassifier, table: NgramTable, context: RunContext) -> dict[str, Any]:
    """Fit the regression on the labels, give it its share of the student's logits, and return the facts of it.

    Penalty and share are those that are best on validation by --select_by, the penalty for the n-grams alone; equal ones
    leave more to the layers.

    Args:
        name: Whose n-grams they are, in log lines.
    """
    inputs, tokens = context.inputs, context.tokens.student
    assert isinstance(student, EncoderClassifier) and tokens is not None
    split, labels = inputs.split, inputs.comments.labels
    positive_weights = weigh_positives(inputs)
    learned, asked = (table.weigh(*tokens.take(rows)) for rows in (split.train, split.validation))

    def score(logits: NDArray[Any]) -> float:
        scores = compute_metrics(labels[split.validation], sigmoid(logits), DEFAULT_THRESHOLD, inputs.comments.label_names)
        return scores[inputs.config.select_by]

    alone: dict[float, float] = {}
    fitted, answers = {}, {}
    for penalty in INVERSE_PENALTIES:
        if context.runtime.stop.requested:
            raise KeyboardInterrupt
        fitted[penalty] = fit_labels(learned, labels[split.train], positive_weights, penalty)
        answers[penalty] = asked @ fitted[penalty][0].T + fitted[penalty][1]
        alone[penalty] = score(answers[penalty])
    penalty = take_best(alone)
    layers = predict_rows(f"{name} without n-grams", student, split.validation, tokens, context)
    together = {share: score((1 - share) * layers + share * answers[penalty]) for share in SHARES}
    share = take_best(together)
    short = METRIC_OF[inputs.config.select_by].short
    log.info(
        "%s: %s n-grams have a share of %.1f in its logits: validation %s %.4f, of the layers alone %.4f, of the n-grams %.4f",
        *(name, f"{len(table.codes):,}", share, short, together[share], together[0.0], alone[penalty]),
    )
    if share > 0:
        student.ngrams = build_branch(table, *fitted[penalty], share).to(context.runtime.device)
    return {
        "longest": table.longest,
        "ngrams": len(table.codes),
        "inverse_penalty": penalty,
        "share": share,
        "validation": {"layers": together[0.0], "ngrams": alone[penalty], "together": together[share]},
    }
