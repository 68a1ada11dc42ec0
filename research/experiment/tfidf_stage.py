"""The model of --pipeline tfidf: fitted, chosen on validation, timed and saved."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.evaluation.efficiency import LATENCY_BATCH, MOST_ROUNDS
from research.experiment.context import RunContext
from research.experiment.training import choose_penalty, weigh_positives
from research.models.tfidf import TfidfClassifier, TfidfTrainer, load_tfidf, save_tfidf
from research.names import PARTS

TIMED_ROWS = 8 * LATENCY_BATCH
REMARK = "timed from text to logits, with the making of the n-grams; timings of transformers start from tokens"


@dataclass(frozen=True)
class TrainedTfidf:
    """The chosen model, its logits {part: (N, C)}, the facts of its training, and what it costs."""

    model: TfidfClassifier
    logits: dict[str, NDArray[np.float32]]
    training: dict[str, Any]
    costs: dict[str, Any]

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write the model, and see that what is loaded answers alike."""
        save_tfidf(self.model, folder, settings)
        loaded, _ = load_tfidf(folder)
        probe = list(self.model.vectorizer.vocabulary_)[:LATENCY_BATCH]
        assert np.array_equal(loaded.predict_logits(probe), self.model.predict_logits(probe)), folder


def train_tfidf(context: RunContext) -> TrainedTfidf:
    """Fit the model on the labels for every penalty, and take the one that is best on validation by --select_by."""
    inputs = context.inputs
    comments, split = inputs.comments, inputs.split
    texts = comments.read_texts(np.concatenate([split.train, *(getattr(split, part) for part in PARTS)]))
    trainer = TfidfTrainer([texts[row] for row in split.train.tolist()], comments.labels[split.train], weigh_positives(inputs))
    of_part = {part: [texts[row] for row in getattr(split, part).tolist()] for part in PARTS}

    def fit(penalty: float) -> tuple[TfidfClassifier, NDArray[np.float32]]:
        model = trainer.fit(penalty)
        return model, model.predict_logits(of_part["validation"])

    chosen = choose_penalty("", fit, context)
    model = chosen.model
    training = {"inverse_penalty": chosen.inverse_penalty, "ngrams": len(model.vectorizer.vocabulary_)}
    logits = {part: model.predict_logits(of_part[part]) for part in PARTS}
    return TrainedTfidf(model, logits, training, measure_costs(model, of_part["test"], context.runtime.extras.measure_s))


def measure_costs(model: TfidfClassifier, texts: list[str], time_budget_s: float) -> dict[str, Any]:
    """Return what efficiency.json has of every model: parameters, size, and medians over rounds of its timings."""
    order = np.random.default_rng(0).permutation(len(texts))[:TIMED_ROWS]
    drawn = [texts[row] for row in order.tolist()]
    facts: dict[str, Any] = {**model.count_parameters(), "size_mb": model.size_mb}
    for size in (1, LATENCY_BATCH):
        batches = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)] or [drawn]
        rounds: list[float] = []
        while not rounds or (len(rounds) < MOST_ROUNDS and sum(rounds) < time_budget_s):
            started = time.perf_counter()
            for batch in batches:
                model.predict_logits(batch)
            rounds.append(time.perf_counter() - started)
        calls_ms = [1000 * seconds / len(batches) for seconds in rounds]
        facts |= {
            f"latency_ms_batch{size}": float(np.median(calls_ms)),
            f"latency_ms_batch{size}_range": [min(calls_ms), max(calls_ms)],
        }
        rates = [len(batches) * len(batches[0]) / seconds for seconds in rounds]
    return {
        "student": facts | {"throughput_per_s": float(np.median(rates)), "throughput_per_s_range": [min(rates), max(rates)]},
        "remark": REMARK,
    }
