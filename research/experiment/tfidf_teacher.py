"""The teacher of --teacher_tfidf: character n-grams, answering for each training text by a fit that has not seen it.

A model that has learned a text's labels by heart answers with them, and teaches nothing that the labels do not. So the
training texts are parted, and each part is answered by the model of the others (cross-fitting, as in stacked
generalization: Wolpert 1992); validation, test and unlabelled texts, but for those that are training texts too, by a
model of them all.
"""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.evaluation.calibration import sigmoid
from research.evaluation.metrics import compute_metrics, take_best
from research.evaluation.thresholds import DEFAULT_THRESHOLD
from research.experiment.common_ngrams import MOST_PARTS, learned_without, part_texts
from research.experiment.context import RunContext
from research.experiment.inputs import Inputs, hash_rows
from research.models.tfidf import INVERSE_PENALTIES, MIN_TEXTS, NGRAM_OPTIONS, TfidfTrainer
from research.names import PARTS
from research.storage.arrays import write_npy
from research_data import compute_class_weights

log = logging.getLogger(__name__)
FLAG = "--teacher_tfidf"
CHOSEN_BY = "average_precision_macro"
ANSWERS_FILE, FACTS_FILE = "answers.npy", "facts.json"
# Part of the cache key: raise it when the answers to the same texts change.
FORMAT = 2


def get_tfidf_answers(context: RunContext) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return the logits (N, C) of every row of the tables, nan for those of no part, and the facts of the fit.

    They come from the cache when they are there.
    """
    inputs = context.inputs

    def build(folder: Path, _: Path) -> None:
        answers, facts = fit_answers(context)
        write_npy(folder / ANSWERS_FILE, answers)
        (folder / FACTS_FILE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")

    folder = context.runtime.cache.fetch("tfidf_teachers", answers_key(inputs), build)
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    answers = np.full((len(inputs.comments), len(inputs.comments.label_names)), np.nan, dtype=np.float32)
    answers[asked_rows(inputs)] = np.load(folder / ANSWERS_FILE, allow_pickle=False)
    context.runtime.cache.check_unchanged(folder)
    return answers, facts


def asked_rows(inputs: Inputs) -> NDArray[np.int64]:
    """Return the rows that it answers for: those to learn from, validation and test, and the views of training texts."""
    split, views = inputs.split, inputs.views
    rows = [split.train, split.unlabelled, *(getattr(split, part) for part in PARTS)]
    return np.concatenate([*rows, *([] if views is None else [views.rows.reshape(-1)])])


def answers_key(inputs: Inputs) -> dict[str, Any]:
    """Return everything the answers depend on."""
    comments, split, rows = inputs.comments, inputs.split, asked_rows(inputs)
    views = {} if inputs.views is None else {"views": list(inputs.views.rows.shape)}
    return views | {
        "train": hash_rows(comments, split.train),
        "asked": hash_rows(comments, rows[len(split.train) :]),
        "class_weights": inputs.config.class_weights,
        "text_normalization": inputs.config.text_normalization,
        "ngrams": {name: str(value) for name, value in NGRAM_OPTIONS.items()} | {"min_df": MIN_TEXTS},
        "inverse_penalties": INVERSE_PENALTIES,
        "parts": MOST_PARTS,
        "versions": {name: version(name) for name in ("numpy", "scikit-learn")},
        "format": FORMAT,
    }


def part_rows(inputs: Inputs, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the part of each of the asked rows, (R,): that of its text, a view's that of its source, -1 for other texts."""
    text_hash = inputs.comments.text_hash
    part_of_text = dict(zip(text_hash[inputs.split.train].tolist(), part_texts(text_hash[inputs.split.train]), strict=True))
    sources = rows.copy()
    if inputs.views is not None:
        sources[len(rows) - inputs.views.rows.size :] = inputs.views.sources.reshape(-1)
    return np.array([part_of_text.get(text, -1) for text in text_hash[sources].tolist()], dtype=np.int64)


def fit_answers(context: RunContext) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return the logits (R, C) of the asked rows and the facts of the fit.

    A view of a training text is answered as the text is, by a fit that has not seen it. The penalty is the one whose
    answers for the training texts rank best, so validation rows choose nothing.
    """
    inputs = context.inputs
    split, comments, rows = inputs.split, inputs.comments, asked_rows(inputs)
    of_row = comments.read_texts(rows)
    texts = [of_row[row] for row in rows.tolist()]
    labels = comments.labels[split.train]
    weights: NDArray[Any] = np.ones(labels.shape[1])
    if inputs.config.class_weights:
        weights, _ = compute_class_weights(labels, comments.label_names)
    parts = part_rows(inputs, rows)
    held, others = np.flatnonzero(parts >= 0), np.flatnonzero(parts < 0)
    held_out = hold_out([texts[row] for row in held], parts[held], labels, weights, context)
    scores = {
        penalty: compute_metrics(labels, sigmoid(answers[: len(labels)]), DEFAULT_THRESHOLD, comments.label_names)[CHOSEN_BY]
        for penalty, answers in held_out.items()
    }
    best = take_best(scores)
    log.info("teacher_tfidf: inverse penalty %g, mAP %.4f on training texts that a fit had not seen", best, scores[best])
    model = TfidfTrainer(texts[: len(labels)], labels, weights, FLAG).fit(best)
    facts = {
        "source": "tfidf",
        "inverse_penalty": best,
        "ngrams": len(model.vectorizer.vocabulary_),
        "parts": int(parts.max()) + 1,
    }
    answers = np.empty((len(rows), labels.shape[1]), dtype=np.float32)
    answers[held], answers[others] = held_out[best], model.predict_logits([texts[row] for row in others])
    return answers, facts


def hold_out(
    texts: list[str], parts: NDArray[np.int64], labels: NDArray[np.float32], weights: NDArray[Any], context: RunContext
) -> dict[float, NDArray[np.float32]]:
    """Return, for every penalty, the logits (T, C) of each text by a fit without the texts of its part.

    Args:
        texts: T texts, those to learn from first.
        parts: (T,) the part of each.
        labels: (N, C) of the N texts to learn from.
    """
    held_out = {penalty: np.empty((len(texts), labels.shape[1]), dtype=np.float32) for penalty in INVERSE_PENALTIES}
    num_parts = int(parts.max()) + 1
    for part in range(num_parts):
        log.info("teacher_tfidf: fitting without part %d of %d of the training texts", part + 1, num_parts)
        asked = np.flatnonzero(parts == part)
        learned = learned_without(part, parts[: len(labels)])
        trainer = TfidfTrainer([texts[row] for row in learned], labels[learned], weights, FLAG)
        for penalty, answers in held_out.items():
            if context.runtime.stop.requested:
                raise KeyboardInterrupt
            answers[asked] = trainer.fit(penalty).predict_logits([texts[row] for row in asked])
    return held_out
