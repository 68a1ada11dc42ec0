"""Names in a run's files: its models, parts and thresholds, and one row for every metric (no imports to speak of).

metrics.json and history.csv are written, and trackers, figures, reports and comparisons are made from this table. A
metric that averages a score of the labels needs nothing but its row; any other needs a function beside it, in
`research.evaluation.metrics.OVERALL_METRICS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MODELS = ("teacher", "control", "student")  # the control is the student trained without the teacher
# What a run calls the teachers that are no transformers, beside teacher, teacher_2, ...: a table, and n-grams.
TEACHER_TABLE, TEACHER_TFIDF = "teacher_probs", "teacher_tfidf"
PARTS = ("validation", "test")
BOTH_MODELS = ("teacher", "student")  # what one setting trains alike
# Each is its own library, installed by those who use it: none of them is a requirement.
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
THRESHOLDS = {"at_0.5": "0.5", "tuned": "tuned"}  # what metrics.json calls them: what a table does
MetricKind = Literal["decisions", "ranking", "probabilities"]


def number_name(name: str, number: int) -> str:
    """Return what the things of one name are called, counted from 1: teacher, teacher_2, ..."""
    return name if number == 1 else f"{name}_{number}"


def order_of_model(name: str) -> tuple[int, int, str]:
    """Return what sorts the models of a run as MODELS does, and its teachers by their numbers."""
    return [*MODELS, name].index(name.partition("_")[0] if name.startswith("teacher") else name), len(name), name


def epoch_flag(model: str) -> str:
    """Return the flag that ends a model's training; several teachers are called teacher, teacher_2, ..."""
    return "--teacher_epochs" if model.startswith("teacher") else "--epochs"


@dataclass(frozen=True)
class Metric:
    """One score of a model on one part.

    Attributes:
        name: Its key in metrics.json, its column val_<name> in history.csv and its --metric.
        label: Its name within a sentence.
        short: Its name above a column or in a legend.
        kind: What it looks at: the decisions at the thresholds, the order of the probabilities, or their values
            (calibration).
        mean_of: The score of LABEL_SCORES whose mean over labels it is; None for one taken over all labels at once.
        by_support: Whether that mean is weighted by each label's positives.
        lower_is_better: Whether less is better.
        per_epoch: Whether it is computed on validation after every epoch.
        tuned: Whether it is another metric at the tuned thresholds, by that one's name and "_tuned"; comparisons
            need a name for it, metrics.json has both thresholds for each.
    """

    name: str
    label: str
    short: str
    kind: MetricKind = "decisions"
    mean_of: str | None = None
    by_support: bool = False
    lower_is_better: bool = False
    per_epoch: bool = False
    tuned: bool = False

    @property
    def path(self) -> tuple[str, str]:
        """The keys below a model and a part in metrics.json."""
        return ("tuned", self.name.removesuffix("_tuned")) if self.tuned else ("at_0.5", self.name)

    @property
    def full_label(self) -> str:
        """Its label with the thresholds it is taken at, where they matter."""
        thresholds = "tuned thresholds" if self.tuned else "0.5"
        return f"{self.label} at {thresholds}" if self.kind == "decisions" else self.label

    @property
    def axis_label(self) -> str:
        """Its full label, with a warning where less is better."""
        return f"{self.full_label} (lower is better)" if self.lower_is_better else self.full_label


METRICS: tuple[Metric, ...] = (
    Metric("f1_macro", "macro-F1", "Macro-F1", mean_of="f1", per_epoch=True),
    Metric("f1_micro", "micro-F1", "Micro-F1", per_epoch=True),
    Metric("f1_weighted", "weighted F1", "Weighted F1", mean_of="f1", by_support=True),
    Metric("f1_macro_tuned", "macro-F1", "Macro-F1, tuned", mean_of="f1", tuned=True),
    Metric("precision_macro", "macro-precision", "Macro-precision", mean_of="precision"),
    Metric("recall_macro", "macro-recall", "Macro-recall", mean_of="recall"),
    Metric("average_precision_macro", "mean average precision", "mAP", "ranking", mean_of="average_precision", per_epoch=True),
    Metric("roc_auc_macro", "mean ROC AUC", "ROC AUC", "ranking", mean_of="roc_auc"),
    Metric("subset_accuracy", "subset accuracy", "Subset accuracy"),
    Metric("hamming_loss", "Hamming loss", "Hamming loss", lower_is_better=True),
    Metric("lrap", "label ranking average precision", "LRAP", "ranking"),
    Metric("ece", "expected calibration error", "ECE", "probabilities", lower_is_better=True),
    Metric("brier", "Brier score", "Brier", "probabilities", lower_is_better=True),
)
METRIC_OF = {metric.name: metric for metric in METRICS}
HEADLINE_METRIC = METRIC_OF["f1_macro"]  # at 0.5, so that no tuned number is needed to repeat it
SCORES_PER_EPOCH = tuple(metric.name for metric in METRICS if metric.per_epoch)
LABEL_SCORES = {
    "threshold": "Threshold",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "average_precision": "AP",
    "roc_auc": "ROC AUC",
    "support": "Positives",
    "predicted": "Predicted",
    "known": "Known",
}


def metrics_of(*kinds: MetricKind) -> list[Metric]:
    """Return the metrics of some kinds that metrics.json holds."""
    return [metric for metric in METRICS if metric.kind in kinds and not metric.tuned]
