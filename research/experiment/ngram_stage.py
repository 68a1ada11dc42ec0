"""--student_ngrams: a logistic regression on the n-grams of its pieces is put beside a trained student's layers.

V rows of validation, C labels, F n-grams.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError
from research.evaluation.metrics import take_best
from research.experiment.context import RunContext
from research.experiment.training import Regression, choose_penalty, predict_rows, score_validation, weigh_positives
from research.models.classifiers import EncoderClassifier, TextClassifier
from research.models.ngram_table import LEAST_TEXTS, NgramTable, list_ngrams
from research.models.ngrams import build_branch
from research.models.tfidf import fit_labels
from research.names import METRIC_OF

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

log = logging.getLogger(__name__)
SHARES = tuple(tenths / 10 for tenths in range(11))


@dataclass(frozen=True)
class FittedNgrams:
    """A regression's `weights` (C, F) and `bias` (C,) on the n-grams of a table."""

    table: NgramTable
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]

    def answer(self, features: csr_matrix) -> NDArray[np.floating]:
        """Return the logits (N, C) of features (N, F), as the table weighs them."""
        return np.asarray(features @ self.weights.T + self.bias)


def fit_ngrams(context: RunContext) -> Regression[FittedNgrams]:
    """Fit the labels of the training texts for every penalty, and take the one that is best on validation.

    Raises:
        InputError: the training texts have no n-grams in common.
    """
    inputs, tokens = context.inputs, context.tokens.student
    split, longest = inputs.split, inputs.config.student_ngrams
    assert tokens is not None and longest is not None
    table = list_ngrams(*tokens.take(split.train), inputs.shapes["student"].vocabulary, longest)
    if not len(table.codes):
        raise InputError(
            f"--student_ngrams: no piece stands in {LEAST_TEXTS} of the {len(split.train)} training texts; drop the flag"
        )
    learned, asked = (table.weigh(*tokens.take(rows)) for rows in (split.train, split.validation))
    labels, positive_weights = inputs.comments.labels[split.train], weigh_positives(inputs)

    def fit(penalty: float) -> tuple[FittedNgrams, NDArray[np.floating]]:
        fitted = FittedNgrams(table, *fit_labels(learned, labels, positive_weights, penalty))
        return fitted, fitted.answer(asked)

    return choose_penalty("n-grams: ", fit, context)


def choose_share(name: str, layers: NDArray[np.float32], fitted: Regression[FittedNgrams], context: RunContext) -> dict[str, Any]:
    """Return the facts of the mixture whose `share` of n-grams is best on validation; of equal ones, the smallest.

    Args:
        name: Whose layers they are, in the log.
        layers: Their logits of validation (V, C).
    """
    scores = {share: score_validation((1 - share) * layers + share * fitted.validation, context) for share in SHARES}
    share, num_ngrams, short = take_best(scores), len(fitted.model.table.codes), METRIC_OF[context.inputs.config.select_by].short
    if math.isnan(scores[share]):
        log.warning(
            "warning: %s: its n-grams get no share of its logits: validation has no %s. Choose another --select_by.", name, short
        )
    log.info(
        f"{name}: {num_ngrams:,} n-grams have a share of {share:.1f} in its logits: validation {short} {scores[share]:.4f}, "
        f"of the layers alone {scores[0.0]:.4f}, of the n-grams {fitted.score:.4f}"
    )
    return {
        "longest": fitted.model.table.longest,
        "ngrams": num_ngrams,
        "inverse_penalty": fitted.inverse_penalty,
        "share": share,
        "validation": {"layers": scores[0.0], "ngrams": fitted.score, "together": scores[share]},
    }


def add_ngrams(name: str, student: TextClassifier, fitted: Regression[FittedNgrams], context: RunContext) -> dict[str, Any]:
    """Give the n-grams the share of a trained student's logits that is best on validation; return the facts of it."""
    tokens = context.tokens.student
    assert isinstance(student, EncoderClassifier) and tokens is not None
    layers = predict_rows(f"{name} without n-grams", student, context.inputs.split.validation, tokens, context)
    facts = choose_share(name, layers, fitted, context)
    if facts["share"] > 0:
        ngrams = fitted.model
        branch = build_branch(ngrams.table, ngrams.weights, ngrams.bias, facts["share"])
        student.ngrams = branch.to(context.runtime.device)
    return facts
