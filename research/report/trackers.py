"""Experiment trackers behind one class: config, each epoch as it ends, and final scores, through each tracker's own library.

An epoch is noted in the run directory before it is sent, so a run that was stopped and goes on sends none twice,
and sends those that it had not come to. Where a tracker keeps what it is sent, and as whom, is set as its own
documentation says (MLFLOW_TRACKING_URI, WANDB_MODE, ...); tensorboard writes into the run directory.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from research.errors import first_line
from research.names import PARTS
from research.runs.directory import TRACKING_FILE
from research.runs.formats import read_json, write_json_atomic
from research.runs.run import Run, load_run

log = logging.getLogger(__name__)
PROJECT = "knowledge-distillation"
# Every name of a metric goes to every tracker, so it keeps to what the strictest (MLflow) accepts.
NOT_IN_A_NAME = re.compile(r"[^\w./: -]")


@dataclass(frozen=True)
class Beginning:
    """What a session is begun with.

    Attributes:
        name: The run's, by which a reader finds its directory.
        path: That directory.
        config: What its config.json holds.
        identity: What an earlier session of the same run was known by; None for the first.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    identity: str | None


class Session(Protocol):
    """A tracker that has been told of a run; `identity` is what it is known by there."""

    identity: str

    def log_epoch(self, model: str, epoch: int, values: Mapping[str, float]) -> None:
        """Send the values of one epoch of one model, named as in "student/total_loss"."""

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Send the final scores."""

    def close(self) -> None:
        """Let the tracker send what it holds back."""


class Tracking:
    """Sends one run to a tracker while it is done; a tracker that fails costs one warning and nothing else.

    A session begins with the first thing to send. With the tracker "none" nothing is ever sent.

    Args:
        tracker: One of `research.names.TRACKERS`, or none.
        path: The run directory, claimed, with its config.json.
    """

    def __init__(self, tracker: str, path: Path) -> None:
        self.tracker = tracker
        self.path = path
        self._session: Session | None = None
        self._name = ""
        self._sent: dict[str, int] = {}
        self._off = tracker == "none"

    def send_epochs(self, model: str, history: Sequence[Mapping[str, Any]]) -> None:
        """Send those epochs of a model's history that have not been sent.

        Args:
            history: Rows of history.csv; None is an empty cell.
        """
        if self._off:
            return
        with self._costing_a_warning():
            session = self._begun()
            for row in history:
                epoch = int(row["epoch"])
                if epoch <= self._sent.get(model, 0):
                    continue
                self._sent[model] = epoch
                self._note(session)
                values = {f"{model}/{name}": float(value) for name, value in row.items() if name != "epoch" and value is not None}
                session.log_epoch(model, epoch, values)

    def finish(self) -> None:
        """Send the scores of the run, whose metrics.json has been written."""
        if self._off:
            return
        with self._costing_a_warning():
            self._begun().log_scores(final_scores(load_run(self.path)))

    def close(self) -> None:
        """End the session, if there is one."""
        session, self._session = self._session, None
        if session is not None:
            with self._costing_a_warning():
                session.close()

    def _begun(self) -> Session:
        """Return the session, begun anew or gone on with where there is none yet."""
        if self._session is None:
            found = read_json(self.path / TRACKING_FILE) if (self.path / TRACKING_FILE).is_file() else {}
            # What another tracker was sent says nothing of this one.
            noted = found if found.get("tracker") == self.tracker else {}
            self._name, self._sent = noted.get("name") or name_run(self.path), dict(noted.get("sent", {}))
            beginning = Beginning(self._name, self.path, read_json(self.path / "config.json"), noted.get("identity"))
            self._session = SESSIONS[self.tracker](importlib.import_module(self.tracker), beginning)
            self._note(self._session)
        return self._session

    def _note(self, session: Session) -> None:
        noted = {"tracker": self.tracker, "name": self._name, "identity": session.identity, "sent": self._sent}
        write_json_atomic(self.path / TRACKING_FILE, noted)

    @contextlib.contextmanager
    def _costing_a_warning(self) -> Iterator[None]:
        """Turn whatever a tracker raises into one warning, and send nothing more.

        What it prints goes to standard error, since the last line of standard output is the run's, and random numbers
        it draws are given back, since training draws from the same.
        """
        try:
            with contextlib.redirect_stdout(sys.stderr), _keeping_random_state():
                yield
        except (Exception, SystemExit) as error:  # libraries for a network raise anything, and no result depends on them
            session, self._session, self._off = self._session, None, True
            if session is not None:
                with contextlib.suppress(Exception):  # so that the next run of this process can begin a session
                    session.close()
            log.warning(
                "warning: --track %s: %s; nothing more is sent, and the run in %s is not affected",
                self.tracker,
                first_line(error),
                self.path,
            )


NO_TRACKING = Tracking("none", Path())


@contextlib.contextmanager
def following(tracker: str, path: Path) -> Iterator[Tracking]:
    """Give what sends a run to a tracker; its session ends with the block, however that ends."""
    tracking = Tracking(tracker, path)
    try:
        yield tracking
    finally:
        tracking.close()


@contextlib.contextmanager
def _keeping_random_state() -> Iterator[None]:
    if "torch" not in sys.modules:
        yield
        return
    import torch

    with torch.random.fork_rng(devices=[]):
        yield


def name_run(path: Path) -> str:
    """Return a run's directory as seen from the working folder, so that no two runs, folds or parts of a sweep share a name."""
    full = path.resolve()
    here = Path.cwd()
    return full.relative_to(here).as_posix() if full.is_relative_to(here) and full != here else full.as_posix()


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


def settings_as_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the config as texts no longer than every tracker accepts."""
    return {name: (value if isinstance(value, str) else json.dumps(value))[:500] for name, value in config.items()}


class TensorBoardSession:
    """Event files in the run directory, one for each session; TensorBoard reads them together."""

    def __init__(self, _module: Any, beginning: Beginning) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.identity = beginning.identity or "tensorboard"
        self.writer = SummaryWriter(log_dir=str(beginning.path / "tensorboard"))
        if beginning.identity is None:
            lines = (f"    {name} = {value}" for name, value in settings_as_texts(beginning.config).items())
            self.writer.add_text("config", "\n".join(lines))

    def log_epoch(self, model: str, epoch: int, values: Mapping[str, float]) -> None:
        """Write an epoch, so that a reader has it at once."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Write the final scores."""
        for name, value in scores.items():
            self.writer.add_scalar(f"final/{name}", value)

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class MlflowSession:
    """A run of MLflow."""

    def __init__(self, module: Any, beginning: Beginning) -> None:
        self.module = module
        module.set_experiment(PROJECT)
        if beginning.identity is None:
            self.identity = module.start_run(run_name=beginning.name).info.run_id
            module.log_params(settings_as_texts(beginning.config))
        else:
            self.identity = module.start_run(run_id=beginning.identity).info.run_id

    def log_epoch(self, model: str, epoch: int, values: Mapping[str, float]) -> None:
        """Send an epoch."""
        self.module.log_metrics(dict(values), step=epoch)

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Send the final scores."""
        self.module.log_metrics(dict(scores))

    def close(self) -> None:
        """End the run."""
        self.module.end_run()


class WandbSession:
    """A run of Weights & Biases, in which each model counts its own epochs: wandb's steps must not go back."""

    def __init__(self, module: Any, beginning: Beginning) -> None:
        self.identity = beginning.identity or secrets.token_hex(8)
        self.models: set[str] = set()
        self.run = module.init(
            project=PROJECT, name=beginning.name, id=self.identity, resume="allow", config=dict(beginning.config)
        )

    def log_epoch(self, model: str, epoch: int, values: Mapping[str, float]) -> None:
        """Send an epoch."""
        axis = f"{model}/epoch"
        if model not in self.models:
            self.models.add(model)
            self.run.define_metric(axis)
            self.run.define_metric(f"{model}/*", step_metric=axis)
        self.run.log({**values, axis: epoch})

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Send the final scores."""
        self.run.summary.update(dict(scores))

    def close(self) -> None:
        """Wait for what is still to be sent."""
        self.run.finish()


class TrackioSession:
    """A run of Trackio, which knows it by its name."""

    def __init__(self, module: Any, beginning: Beginning) -> None:
        self.module = module
        self.last_epoch = 0
        resume = "never" if beginning.identity is None else "allow"
        name = beginning.identity or beginning.name
        run = module.init(project=PROJECT, name=name, resume=resume, config=dict(beginning.config))
        self.identity = getattr(run, "name", None) or name  # another where there is a run of that name

    def log_epoch(self, model: str, epoch: int, values: Mapping[str, float]) -> None:
        """Send an epoch."""
        self.module.log(dict(values), step=epoch)
        self.last_epoch = max(self.last_epoch, epoch)

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Send the final scores, after the last epoch that this session has sent."""
        self.module.log(dict(scores), step=self.last_epoch + 1)

    def close(self) -> None:
        """Wait for what is still to be sent."""
        self.module.finish()


SESSIONS: dict[str, Callable[[Any, Beginning], Session]] = {
    "tensorboard": TensorBoardSession,
    "mlflow": MlflowSession,
    "wandb": WandbSession,
    "trackio": TrackioSession,
}
