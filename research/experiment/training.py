"""What the teacher's fine-tuning, the student's and the control's training have in common."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from research.evaluation.calibration import sigmoid
from research.evaluation.metrics import DEFAULT_THRESHOLD, compute_metrics
from research.evaluation.predict import predict_logits
from research.experiment.context import RunContext
from research.experiment.inputs import Inputs
from research.kd.loop import TrainingResult
from research.runs.formats import PARTS
from research.storage.checkpoints import CheckpointFolder
from research.text.batches import BatchLoader
from research.text.tokens import Tokens
from research_data import compute_class_weights
from research_distillation import DistillationTrainer

log = logging.getLogger(__name__)
SCORES_PER_EPOCH = ("f1_macro", "f1_micro", "average_precision_macro")


def train(
    name: str, trainer: DistillationTrainer, loader: BatchLoader, checkpoints: CheckpointFolder, context: RunContext
) -> TrainingResult:
    """Train with class weights, choosing the best epoch on validation, with a progress bar on stderr.

    Raises:
        TrainingFault: the loss or a gradient is not finite, or memory ran out.
        Interrupted: a signal asked the run to stop; a checkpoint has been written.
    """
    torch.manual_seed(trainer.config.seed)
    with tqdm(desc=name, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:

        def show_step(step: int, total: int) -> None:
            bar.total = total
            bar.update(step - bar.n)

        return trainer.fit(
            loader,
            build_validation(loader.tokens, context),
            weight_classes(context.inputs),
            checkpoints=checkpoints,
            stop=context.runtime.stop,
            on_step=show_step,
        )


def weight_classes(inputs: Inputs) -> torch.Tensor | None:
    """Return the (C,) weights of positives in the hard loss, None without --class_weights."""
    if not inputs.config.class_weights:
        return None
    weights, warnings = compute_class_weights(inputs.comments.labels[inputs.split.train], inputs.comments.label_names)
    for warning in warnings:
        log.warning("%s", warning)
    return torch.from_numpy(weights)


def build_validation(tokens: Tokens, context: RunContext) -> Callable[[nn.Module], Mapping[str, float]]:
    """Return what scores a model on the validation part.

    It runs in float32 whatever the training's precision, as the final evaluation does.
    """
    inputs, device = context.inputs, context.runtime.device
    batches = context.evaluation_batches(inputs.split.validation, tokens)
    labels = inputs.comments.labels[inputs.split.validation]

    def validate(model: nn.Module) -> dict[str, float]:
        probs = sigmoid(predict_logits(model, batches, device))
        scores = compute_metrics(labels, probs, DEFAULT_THRESHOLD, inputs.comments.label_names)
        return {score: scores[score] for score in SCORES_PER_EPOCH}

    return validate


def predict_parts(model: nn.Module, tokens: Tokens, context: RunContext) -> dict[str, NDArray[np.float64]]:
    """Return a model's probabilities on the validation and the test part, (N, C) each."""
    probs = {}
    for part in PARTS:
        batches = context.evaluation_batches(getattr(context.inputs.split, part), tokens)
        probs[part] = sigmoid(predict_logits(model, batches, context.runtime.device))
    return probs


def summarize(result: TrainingResult) -> dict[str, int]:
    """Return what metrics.json says of a training: only what repeats exactly."""
    return {"best_epoch": result.best_epoch, "epochs_run": len(result.history), "skipped_steps": result.skipped_steps}
