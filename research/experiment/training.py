"""What the teacher's fine-tuning, the student's and the control's training have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from research.evaluation.calibration import sigmoid
from research.evaluation.metrics import compute_metrics, take_best
from research.evaluation.predict import predict_logits
from research.evaluation.thresholds import DEFAULT_THRESHOLD
from research.experiment.context import RunContext
from research.experiment.inputs import Inputs
from research.kd.loop import TrainingResult
from research.logs import with_progress
from research.models.tfidf import INVERSE_PENALTIES
from research.names import PARTS, SCORES_PER_EPOCH
from research.storage.checkpoints import CheckpointFolder
from research.text.batches import BatchLoader
from research.text.tokens import Tokens
from research_data import compute_class_weights
from research_distillation import DistillationTrainer

log = logging.getLogger(__name__)
Model = TypeVar("Model")


def train(
    name: str, trainer: DistillationTrainer, loader: BatchLoader, checkpoints: CheckpointFolder, context: RunContext
) -> TrainingResult:
    """Train with class weights, choosing the best epoch on validation.

    Args:
        name: Whose training it is, in log lines and for --track.

    Raises:
        TrainingFault: the loss or a gradient is not finite, or memory ran out.
        Interrupted: a signal asked the run to stop; a checkpoint has been written.
    """
    torch.manual_seed(trainer.config.seed)
    return trainer.fit(
        loader,
        build_validation(name, loader.tokens, context),
        weight_classes(context.inputs),
        checkpoints=checkpoints,
        stop=context.runtime.stop,
        name=name,
        watch=partial(context.tracking.send_epochs, context.name_training(name)),
    )


def weight_classes(inputs: Inputs) -> torch.Tensor | None:
    """Return the (C,) weights of positives in the hard loss, None without --class_weights."""
    if not inputs.config.class_weights:
        return None
    weights, warnings = compute_class_weights(inputs.comments.labels[inputs.split.train], inputs.comments.label_names)
    for warning in warnings:
        log.warning("%s", warning)
    return torch.from_numpy(weights)


def weigh_positives(inputs: Inputs) -> NDArray[np.float32]:
    """Return the same for a fit by scikit-learn: ones without --class_weights."""
    weights = weight_classes(inputs)
    return np.ones(inputs.comments.labels.shape[1], dtype=np.float32) if weights is None else weights.numpy()


def build_validation(name: str, tokens: Tokens, context: RunContext) -> Callable[[nn.Module], Mapping[str, float]]:
    """Return what scores a model on the validation part.

    It runs in float32 whatever the training's precision, as the final evaluation does.
    """
    inputs = context.inputs
    labels = inputs.comments.labels[inputs.split.validation]

    def validate(model: nn.Module) -> dict[str, float]:
        probs = sigmoid(predict_rows(f"{name} validation", model, inputs.split.validation, tokens, context))
        scores = compute_metrics(labels, probs, DEFAULT_THRESHOLD, inputs.comments.label_names)
        return {score: scores[score] for score in SCORES_PER_EPOCH}

    return validate


def score_validation(logits: NDArray[Any], context: RunContext) -> float:
    """Return what --select_by says of the logits of validation (V, C)."""
    inputs = context.inputs
    labels = inputs.comments.labels[inputs.split.validation]
    return compute_metrics(labels, sigmoid(logits), DEFAULT_THRESHOLD, inputs.comments.label_names)[inputs.config.select_by]


@dataclass(frozen=True)
class Regression(Generic[Model]):
    """A fitted model, the penalty that was chosen for it, its logits of validation (V, C) and their score by --select_by."""

    model: Model
    inverse_penalty: float
    validation: NDArray[np.floating]
    score: float


def choose_penalty(name: str, fit: Callable[[float], tuple[Model, NDArray[Any]]], context: RunContext) -> Regression[Model]:
    """Fit a regression for every penalty and return the first that is best on validation.

    Args:
        name: What goes before the penalty in log lines.
        fit: Returns the model of an inverse penalty, and its logits of validation (V, C).
    """
    scores: dict[float, float] = {}
    best: Regression[Model] | None = None
    for penalty in INVERSE_PENALTIES:
        if context.runtime.stop.requested:
            raise KeyboardInterrupt
        model, logits = fit(penalty)
        scores[penalty] = score_validation(logits, context)
        log.info("%sinverse penalty %g: validation %s %.4f", name, penalty, context.inputs.config.select_by, scores[penalty])
        if take_best(scores) == penalty:  # the others' models are not needed any more
            best = Regression(model, penalty, logits, scores[penalty])
    assert best is not None
    return best


def predict_parts(name: str, model: nn.Module, tokens: Tokens, context: RunContext) -> dict[str, NDArray[np.float32]]:
    """Return a model's logits on the validation and the test part, (N, C) each."""
    split = context.inputs.split
    return {part: predict_rows(f"{name} evaluation on {part}", model, getattr(split, part), tokens, context) for part in PARTS}


def predict_rows(
    task: str, model: nn.Module, rows: NDArray[np.int64], tokens: Tokens, context: RunContext
) -> NDArray[np.float32]:
    """Return a model's logits on some rows (R, C).

    Args:
        task: What the lines on its progress call it.
    """
    loader = context.evaluation_batches(rows, tokens)
    batches = with_progress(loader, task, len(loader))
    device, world = context.runtime.device, context.runtime.world
    return predict_logits(model, batches, device, num_rows=loader.num_rows, world=world)


def summarize(result: TrainingResult) -> dict[str, int]:
    """Return what metrics.json says of a training: only what repeats exactly."""
    return {"best_epoch": result.best_epoch, "epochs_run": len(result.history), "skipped_steps": result.skipped_steps}
