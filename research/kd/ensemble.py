"""Several teachers that speak as one: their probabilities averaged, and the average given back as logits.

Shapes: K teachers, N rows, C labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.kd.teacher import Teacher
from research.models.classifiers import NO_LAYERS, ModelShape

# A table's certain 0 and 1 are moved this far from the edge, where they have no logit: 13.8 at most.
LEAST_PROBABILITY = 1e-6
CHUNK_ROWS = 65536


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The teachers of a run, one or several.

    Args:
        members: The models by name; layers are those of the first.
        answers: Logits (N, C) of every row of the data by what is no such model, by name: a table, or n-grams; nan where
            it says nothing.
        answering: Deterministic facts of how each of these came about.
    """

    members: Mapping[str, Teacher]
    answers: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    answering: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def first(self) -> Teacher | None:
        """The teacher whose layers are compared and copied; None when there is only a table."""
        return next(iter(self.members.values()), None)

    @property
    def shape(self) -> ModelShape:
        """That of the first teacher."""
        return NO_LAYERS if self.first is None else self.first.shape

    @property
    def num_parameters(self) -> int:
        """Of all models together."""
        return sum(member.num_parameters for member in self.members.values())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """JSON values that change with any weight of its models and with any other answer."""
        identities = [member.identity for member in self.members.values()]
        if not self.answers and len(identities) == 1:
            return identities[0]
        digests = {
            name: hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest() for name, logits in self.answers.items()
        }
        return {"teachers": identities, "answers": digests}

    @property
    def training(self) -> dict[str, dict[str, Any]]:
        """Deterministic facts of how each came about, by name."""
        return {name: member.training for name, member in self.members.items()} | dict(self.answering)


def average_logits(
    logits: Sequence[NDArray[np.floating[Any]]], temperature: float, shift: NDArray[np.floating[Any]] | float = 0.0
) -> NDArray[np.float32]:
    """Return the logits of the mean probability at a temperature: T * logit(mean over k of sigmoid(z_k / T)), (N, C).

    The soft loss softens them by the same T, so its target is the mean of the teachers' softened probabilities:
    an ensemble as teacher as in Hinton, Vinyals and Dean 2015, here of independent labels. At T = 1 they are the
    usual ensemble's. The odds are added up by their logarithms, in float64, so no logit is too large. A
    cell of which a teacher says nothing (nan) is the mean of the others; that of a single one is that one's to
    the bit, and one that nobody speaks of stays nan.

    Args:
        logits: K arrays (N, C).
        temperature: Greater than 0.
        shift: (C,) what the objective will take off the result, as --undo_class_weights does: it is taken off each
            teacher's logits before the mean, and put back.
    """
    if len(logits) == 1:
        return np.asarray(logits[0], dtype=np.float32)
    combined = np.empty(logits[0].shape, dtype=np.float32)
    for start in range(0, len(combined), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        stacked = np.stack([np.asarray(entry[rows], dtype=np.float64) for entry in logits])
        combined[rows] = _average(stacked - shift, temperature) + shift
    return combined


def _average(stacked: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Do what `average_logits` says for (K, N, C)."""
    silent = np.isnan(stacked)
    softened = np.where(silent, 0.0, stacked) / temperature
    # log sigmoid(u) is -log(1 + exp(-u)), that of the opposite -log(1 + exp(u)).
    log_yes, log_no = (np.where(silent, -np.inf, -np.logaddexp(0.0, sign * softened)) for sign in (-1.0, 1.0))
    with np.errstate(invalid="ignore"):  # of cells that nobody speaks of, which become nan as they should
        averaged = temperature * (np.logaddexp.reduce(log_yes) - np.logaddexp.reduce(log_no))
    alone = np.where(silent, 0.0, stacked).sum(axis=0)
    return np.where((~silent).sum(axis=0) == 1, alone, averaged)


def logits_of_probs(probs: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return the logits of probabilities (N, C), which are kept LEAST_PROBABILITY from 0 and 1; nan stays nan."""
    clipped = np.clip(np.asarray(probs, dtype=np.float64), LEAST_PROBABILITY, 1.0 - LEAST_PROBABILITY)
    return (np.log(clipped) - np.log1p(-clipped)).astype(np.float32)
