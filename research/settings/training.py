"""Flags of the training that teacher, student and control have in common."""

from __future__ import annotations

from dataclasses import dataclass

from research.flags import between, setting
from research.names import BOTH_MODELS, SCORES_PER_EPOCH


@dataclass(frozen=True)
class TrainingSettings:
    """Length, steps and precision of every training of a run."""

    epochs: int = setting(15, "training", "most epochs of the student", check=between(1), decides="student")
    batch: int = setting(32, "training", "rows in a batch", check=between(1), decides=BOTH_MODELS)
    gradient_accumulation: int = setting(
        1, "training", "batches summed up before an optimizer step", check=between(1), decides=BOTH_MODELS
    )
    lr: float = setting(
        2e-5, "training", "peak learning rate, greater than 0", check=between(0, open_low=True), decides=BOTH_MODELS
    )
    weight_decay: float = setting(0.01, "training", "decoupled weight decay, 0 or more", check=between(0), decides=BOTH_MODELS)
    warmup_ratio: float = setting(
        0.1, "training", "share of the steps with a rising learning rate, 0 to 1", check=between(0, 1), decides=BOTH_MODELS
    )
    dropout: float = setting(0.1, "training", "dropout in both classifiers, 0 to 0.9", check=between(0, 0.9), decides=BOTH_MODELS)
    gradient_clip_norm: float = setting(
        1.0, "training", "largest norm of the gradient, greater than 0", check=between(0, open_low=True), decides=BOTH_MODELS
    )
    ema_decay: float = setting(
        0.0,
        "training",
        "average the weights over the steps, each step's share shrinking by this factor with every later one; the average "
        "is validated and saved, in teacher, student and control alike; 0 is off, 0.999 averages over about 1,000 steps",
        check=between(0, 0.99999),
        decides=BOTH_MODELS,
        keyed_at_default=False,
    )
    select_by: str = setting(
        "average_precision_macro",
        "training",
        "validation score that chooses the best epoch of teacher, student and control, and a sweep's best run",
        choices=SCORES_PER_EPOCH,
        decides=(*BOTH_MODELS, "tfidf"),
    )
    threshold_rule: str = setting(
        "best_f1",
        "training",
        "how the tuned thresholds of every model are chosen on validation: best_f1: each label's best F1; half_f1: half the "
        "best F1 of the label's calibrated probabilities; shrunk: best_f1 drawn toward one cut for all labels",
        choices=("best_f1", "half_f1", "shrunk"),
        decides="scores",
    )
    early_stopping_patience: int = setting(
        5, "training", "epochs without a better --select_by before stopping", check=between(1), decides=BOTH_MODELS
    )
    amp: bool = setting(True, "training", "automatic mixed precision (float16 is used on CUDA only)", decides=BOTH_MODELS)
    amp_dtype: str = setting(
        "float16",
        "training",
        "precision of --amp; bfloat16 also works on CPUs that have it",
        choices=("float16", "bfloat16"),
        decides=BOTH_MODELS,
    )
