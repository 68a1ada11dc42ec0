"""Experiment trackers behind one function: config, history and final scores, each through its own library.

Everything is sent when the run has been written, so that a run which was stopped and resumed sends each
epoch once, and a tracker that is out of reach costs no result. Where a tracker keeps what it is sent, and
as whom, is set as its own documentation says (MLFLOW_TRACKING_URI, WANDB_MODE, ...); tensorboard writes into
the run directory.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from research.errors import first_line
from research.names import PARTS
from research.runs.run import Run

log = logging.getLogger(__name__)
PROJECT = "knowledge-distillation"
# Every name of a metric goes to every tracker, so it keeps to what the strictest (MLflow) accepts.
NOT_IN_A_NAME = re.compile(r"[^\w./: -]")


def track_run(tracker: str, run: Run) -> None:
    """Send a finished run to a tracker; an error of the tracker becomes one warning, since the run is complete.

    Args:
        tracker: one of `research.names.TRACKERS`.
        run: config, histories and metrics are read from it.
    """
    module = importlib.import_module(tracker)
    try:
        SENDERS[tracker](module, run)
    except _errors_of(module) as error:
        log.warning("--track %s: %s; the run itself is complete in %s", tracker, first_line(error), run.path)


def history_rows(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (epoch, {"student/total_loss": ...}) for every epoch of the student and of its control."""
    rows: dict[int, dict[str, float]] = {}
    for model, file in (("student", "history.csv"), ("control", "history_control.csv")):
        history = () if not run.has(file) else run.history if model == "student" else run.control_history
        for row in history:
            values = {f"{model}/{name}": value for name, value in row.items() if name != "epoch" and value is not None}
            rows.setdefault(int(row["epoch"] or 0), {}).update(values)
    yield from sorted(rows.items())


def final_scores(run: Run) -> dict[str, float]:
    """Return {"student/test/at_0.5/f1_macro": ...} for every model's scores, the KD gain and the headline."""
    tree: dict[str, Any] = {
        model: {part: scores for part, scores in run.scores[model].items() if part in PARTS} for model in run.models
    }
    tree |= {name: run.scores[name] for name in ("agreement", "control_agreement", "kd_gain") if name in run.scores}
    scores = {NOT_IN_A_NAME.sub("_", name): value for name, value in flatten(tree)}
    headline = run.metrics["headline"]["value"]
    return scores if headline is None else scores | {"headline": headline}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a tree with its path; null, which no tracker takes, is left out."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield prefix + name, float(value)


def _errors_of(module: Any) -> tuple[type[BaseException], ...]:
    """Return what a tracker raises: its own base class, and what the network and the disk raise below it."""
    own = [getattr(module, "Error", None), getattr(getattr(module, "exceptions", None), "MlflowException", None)]
    return (OSError, RuntimeError, ValueError, *(kind for kind in own if isinstance(kind, type)))


def _settings(run: Run) -> dict[str, str]:
    """Return the config as texts no longer than every tracker accepts."""
    return {name: (value if isinstance(value, str) else json.dumps(value))[:500] for name, value in run.config.items()}


def _send_tensorboard(_module: Any, run: Run) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=str(run.path / "tensorboard")) as writer:
        writer.add_text("config", "\n".join(f"    {name} = {value}" for name, value in _settings(run).items()))
        for epoch, values in history_rows(run):
            for name, value in values.items():
                writer.add_scalar(name, value, epoch)
        for name, value in final_scores(run).items():
            writer.add_scalar(f"final/{name}", value)


def _send_mlflow(module: Any, run: Run) -> None:
    module.set_experiment(PROJECT)
    with module.start_run(run_name=run.path.resolve().name):
        module.log_params(_settings(run))
        for epoch, values in history_rows(run):
            module.log_metrics(values, step=epoch)
        module.log_metrics(final_scores(run))


def _send_wandb(module: Any, run: Run) -> None:
    session = module.init(project=PROJECT, name=run.path.resolve().name, config=dict(run.config))
    for epoch, values in history_rows(run):
        session.log(values, step=epoch)
    session.summary.update(final_scores(run))
    session.finish()


def _send_trackio(module: Any, run: Run) -> None:
    module.init(project=PROJECT, name=run.path.resolve().name, config=dict(run.config))
    last = 0
    for epoch, values in history_rows(run):
        module.log(values, step=epoch)
        last = epoch
    module.log(final_scores(run), step=last + 1)
    module.finish()


SENDERS: dict[str, Callable[[Any, Run], None]] = {
    "tensorboard": _send_tensorboard,
    "mlflow": _send_mlflow,
    "wandb": _send_wandb,
    "trackio": _send_trackio,
}
