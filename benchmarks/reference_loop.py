"""Time the loop that shared/KD_REFERENCE.md describes against the suite: one whole run, or a sweep of eight.

    python benchmarks/reference_loop.py --epochs 10                                # one run, start to finish
    python benchmarks/reference_loop.py --mode sweep --reference_fraction 0.05

Both sides get the same table, split, teacher and flags, in processes of their own that start cold; the suite
gets an empty cache. The reference loop holds only what is needed to make the description run: each row is
tokenised by itself and padded to 128, the teacher runs live with eager attention in every step, the soft loss
has the logits form, AdamW is not fused, batches are shuffled, validation is padded too, and the best epoch is
kept and evaluated on the test part. The hidden and attention losses have the suite's masks. It leaves out what
the suite does beside: teacher scores, latencies, reports, plots. Class weights, schedule and clipping are the same.

--reference_fraction measures that share of the reference's steps and evaluation rows and extrapolates to the
whole; the JSON line says so, and then holds no macro-F1 of the reference.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import Timing, timed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from research.evaluation.metrics import compute_metrics
from research.evaluation.thresholds import DEFAULT_THRESHOLD
from research.experiment.dataset import load_dataset
from research.experiment.inputs import load_inputs
from research.kd.loop import schedule
from research.kd.losses import MultiLabelDistillationLoss, compute_attention_loss, compute_hidden_state_loss
from research.models.classifiers import freeze
from research_config import ExperimentConfig, parse_arguments
from research_data import compute_class_weights
from research_distillation import choose_autocast_dtype

ALPHAS = (0.3, 0.5, 0.7, 0.9)
TEMPERATURES = (2.0, 4.0)
AS_REFERENCE = "as_reference"
Flags = dict[str, Any]


# The reference


class PaddedRows(Dataset[dict[str, Any]]):
    """Rows tokenised one at a time, whenever they are asked for, and padded to the greatest length."""

    def __init__(self, texts: Sequence[str], labels: Any, tokenizer: Any, max_length: int) -> None:
        self.texts = texts
        self.labels = labels
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, place: int) -> dict[str, Any]:
        encoded = self.tokenizer(self.texts[place], padding="max_length", truncation=True, max_length=self.max_length)
        return {
            "input_ids": torch.tensor(encoded["input_ids"]),
            "attention_mask": torch.tensor(encoded["attention_mask"]),
            "labels": torch.tensor(self.labels[place]),
            "place": place,
        }


@torch.no_grad()
def evaluate_padded(model: Any, loader: DataLoader[dict[str, Tensor]], device: torch.device) -> Any:
    """Return probabilities (N, C) in dataset order, the way the reference computes them."""
    model.eval()
    logits = []
    for batch in loader:
        input_ids, attention_mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        states = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits.append(model.classify(states, attention_mask).float())
    return torch.sigmoid(torch.cat(logits)).cpu().numpy()


class ReferenceLoop:
    """One run of the reference for the flags of a run of the suite."""

    def __init__(self, config: ExperimentConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        inputs = load_inputs(load_dataset(config))
        assert inputs.checkpoint is not None
        self.config = config
        self.device = torch.device(config.device)
        self.label_names = inputs.comments.label_names
        self.inputs = inputs
        self.texts = list(inputs.comments.iter_texts())
        # Eager attention returns the maps that the description needs, at the price of the fused kernel.
        self.teacher = freeze(common.make_stock(inputs.checkpoint.model, "eager")).to(self.device)
        assert config.student_layers is not None
        student = common.build_student(
            Path(config.student_path), len(self.label_names), config.student_layers, config.pooling, config.seed
        )
        self.student = common.make_stock(student, "eager").to(self.device)
        self.criterion = MultiLabelDistillationLoss(config.kd_alpha, config.kd_temperature).to(self.device)
        weights, _ = compute_class_weights(inputs.comments.labels[inputs.split.train], self.label_names)
        self.class_weights = torch.from_numpy(weights).to(self.device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.autocast_dtype = choose_autocast_dtype(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)

    def build_loader(self, rows: Any, *, shuffle: bool) -> DataLoader[dict[str, Tensor]]:
        texts = [self.texts[row] for row in rows]
        data = PaddedRows(texts, self.inputs.comments.labels[rows], self.inputs.student_tokenizer, self.config.max_length)
        return DataLoader(data, batch_size=self.config.batch, shuffle=shuffle)

    def forward(self, model: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
        outputs = model.encoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=self.config.method.hidden,
            output_attentions=self.config.method.attention,
        )
        return outputs, model.classify(outputs.last_hidden_state, batch["attention_mask"])

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        config, mask = self.config, batch["attention_mask"]
        with self.autocast():
            with torch.no_grad():
                teacher, teacher_logits = self.forward(self.teacher, batch)
            student, student_logits = self.forward(self.student, batch)
            losses = self.criterion(student_logits, teacher_logits, batch["labels"], self.class_weights)
            total = losses["total_loss"]
            if config.method.hidden:
                hidden = compute_hidden_state_loss(teacher.hidden_states, student.hidden_states, attention_mask=mask)
                total = total + config.hidden_loss_weight * hidden
            if config.method.attention:
                attention = compute_attention_loss(teacher.attentions, student.attentions, attention_mask=mask)
                total = total + config.attention_loss_weight * attention
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.update_weights()
        return {name: loss.item() for name, loss in losses.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def update_weights(self) -> None:
        """Clip the gradient and take the optimizer's step."""
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), self.config.gradient_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def train(self, loader: DataLoader[dict[str, Tensor]], first_step: int, last_step: int, total_steps: int) -> None:
        """Take the steps of one epoch that lie before `last_step`."""
        self.student.train()
        for step, batch in zip(range(first_step, last_step), loader, strict=False):
            rate = self.config.lr * schedule(step, total_steps, self.config.warmup_ratio)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.train_step({name: tensor.to(self.device) for name, tensor in batch.items()})

    def predict(self, rows: Any) -> Any:
        """Return the student's probabilities (N, C) of these rows."""
        return evaluate_padded(self.student, self.build_loader(rows, shuffle=False), self.device)

    def score(self, rows: Any) -> dict[str, Any]:
        return compute_metrics(self.inputs.comments.labels[rows], self.predict(rows), DEFAULT_THRESHOLD, self.label_names)

    def run(self) -> dict[str, Any]:
        """Train every epoch, keep the best one's weights and return their scores on the test part."""
        torch.manual_seed(self.config.seed)
        loader = self.build_loader(self.inputs.split.train, shuffle=True)
        best_f1, best_state = -1.0, {}
        for epoch in range(self.config.epochs):
            start, stop = epoch * len(loader), (epoch + 1) * len(loader)
            self.train(loader, start, stop, len(loader) * self.config.epochs)
            if (f1 := self.score(self.inputs.split.validation)["f1_macro"]) > best_f1:
                best_f1, best_state = f1, copy.deepcopy(self.student.state_dict())
        self.student.load_state_dict(best_state)
        return self.score(self.inputs.split.test)

    def run_fraction(self, fraction: float) -> dict[str, Any]:
        """Take a share of the steps, at most an epoch's, and evaluate a share of one validation; time both."""
        torch.manual_seed(self.config.seed)
        split = self.inputs.split
        loader = self.build_loader(split.train, shuffle=True)
        total_steps = len(loader) * self.config.epochs
        steps = min(len(loader), max(2, math.ceil(fraction * total_steps)))
        sample = split.validation[: max(self.config.batch, math.ceil(fraction * len(split.validation)))]
        training = timed(lambda: self.train(loader, 0, steps, total_steps))
        evaluation = timed(lambda: self.score(sample))
        return {
            "steps": [steps, total_steps],
            "evaluation_rows": [len(sample), self.config.epochs * len(split.validation) + len(split.test)],
            "training": vars(training),
            "evaluation": vars(evaluation),
            "macro_f1": None,
        }


def run_as_reference(argv: Sequence[str]) -> int:
    """Be the reference's process: FRACTION, then the flags of a run of the suite."""
    loop, fraction = ReferenceLoop(parse_arguments(argv[1:]).config), float(argv[0])
    report = loop.run_fraction(fraction) if fraction < 1 else {"macro_f1": loop.run()["f1_macro"]}
    print(json.dumps(report))
    return 0


# The comparison


@dataclass(frozen=True)
class Outcome:
    """What one run of the reference took, all of it or by extrapolation, and its test macro-F1."""

    timing: Timing
    macro_f1: float | None
    measured: dict[str, Any]


def complete(timing: Timing, report: dict[str, Any]) -> Timing:
    """Return the time of a whole run from a process that did a fraction: its start-up as it was, the rest scaled."""
    if "training" not in report:
        return timing
    training, evaluation = Timing(**report["training"]), Timing(**report["evaluation"])
    start_up = timing + training * -1.0 + evaluation * -1.0
    (steps, total_steps), (rows, total_rows) = report["steps"], report["evaluation_rows"]
    return start_up + training * (total_steps / steps) + evaluation * (total_rows / rows)


class Comparison:
    """The sides of the benchmark, each a call that runs it anew and returns its time."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments = arguments
        self.scratch = scratch
        self.number = itertools.count()
        self.fraction: float = arguments.reference_fraction
        self.table = common.write_table(arguments.dataset, scratch / "comments.csv", arguments.rows)
        self.teacher = arguments.teacher_checkpoint or self.make_teacher()
        self.f1: dict[str, list[float]] = {"suite": [], "reference": []}
        self.measured: dict[str, Any] = {}

    def make_teacher(self) -> Path:
        """Fine-tune a teacher with the suite, or give the encoder a seeded head when no epochs are asked for."""
        arguments = self.arguments
        if arguments.teacher_epochs == 0:
            return common.save_teacher(arguments.model, common.read_labels(self.table), self.scratch / "teacher")
        flags = {
            "pipeline": "baseline",
            "teacher_path": arguments.model,
            "teacher_epochs": arguments.teacher_epochs,
            "lr": arguments.lr,
            "pooling": arguments.pooling,
            "num_threads": arguments.threads,
            "device": arguments.device,
            "allow_weak_teacher": True,
            "output_dir": self.scratch / "baseline",
            "cache_dir": self.scratch / "teacher_cache",
        }
        flags |= self.data_flags()
        common.run_process(common.suite_command(**flags), self.scratch / "teacher.log", arguments.threads)
        return self.scratch / "baseline" / "teacher"

    def data_flags(self) -> Flags:
        """Return the flags that decide the table and its split."""
        return {"dataset_path": self.table}

    def flags(self, threads: int) -> Flags:
        """Return the flags that both sides get; early stopping is off so that both take the same steps."""
        arguments = self.arguments
        return {
            "pipeline": "kd_only",
            "teacher_checkpoint": self.teacher,
            "student_path": arguments.model,
            "student_layers": arguments.student_layers,
            "kd_method": arguments.kd_method,
            "epochs": arguments.epochs,
            "early_stopping_patience": arguments.epochs,
            "lr": arguments.lr,
            "batch": common.BATCH,
            "max_length": common.MAX_LENGTH,
            "pooling": arguments.pooling,
            "data_fraction": arguments.data_fraction,
            "allow_weak_teacher": True,
            "num_threads": threads,
            "device": arguments.device,
        } | self.data_flags()

    def run_suite(self, flags: Flags, threads: int) -> Timing:
        """Run the suite with an empty cache into a new folder and note every run's macro-F1."""
        number = next(self.number)
        folder = self.scratch / f"suite_{number}"
        command = common.suite_command(**flags, output_dir=folder / "runs", cache_dir=folder / "cache")
        command += common.precision_flags(self.arguments.dtype)
        folder.mkdir()
        finished = common.run_process(command, folder / "log", threads)
        paths = sorted((folder / "runs").rglob("metrics.json"))
        self.f1["suite"] = [json.loads(path.read_text())["student"]["test"]["at_0.5"]["f1_macro"] for path in paths]
        return finished.timing

    def run_reference(self, flags: Flags, threads: int) -> Outcome:
        command = common.script_command(Path(__file__).resolve(), AS_REFERENCE, str(self.fraction), **flags)
        command += common.precision_flags(self.arguments.reference_dtype)
        log = self.scratch / f"reference_{next(self.number)}.log"
        finished = common.run_process(command, log, threads)
        report = json.loads(finished.stdout.splitlines()[-1])
        return Outcome(complete(finished.timing, report), report["macro_f1"], report)

    def suite_once(self) -> Timing:
        return self.run_suite(self.flags(self.arguments.threads), self.arguments.threads)

    def reference_once(self) -> Timing:
        return self.run_references([{}], workers=1, threads=self.arguments.threads)

    def suite_sweep(self) -> Timing:
        """Run the grid in one-thread workers, one for each of --threads."""
        sweep = [f"{name}={','.join(f'{value:g}' for value in values)}" for name, values in self.grid().items()]
        return self.run_suite(self.flags(1) | {"sweep": sweep, "jobs": self.arguments.threads}, threads=1)

    def reference_in_turn(self) -> Timing:
        return self.run_references(self.sweep_runs(), workers=1, threads=self.arguments.threads)

    def reference_side_by_side(self) -> Timing:
        """Run the reference one-threaded, as many at a time as --threads."""
        return self.run_references(self.sweep_runs(), workers=self.arguments.threads, threads=1)

    def run_references(self, runs: Sequence[Flags], workers: int, threads: int) -> Timing:
        """Run the reference for each of these flags, `workers` at a time.

        With a fraction, only one batch of `workers` runs is started, and its time stands for the others too.
        """
        chosen = runs[:workers] if self.fraction < 1 else runs
        outcomes: list[Outcome] = []

        def work() -> None:
            with ThreadPoolExecutor(workers) as pool:
                outcomes.extend(pool.map(lambda run: self.run_reference(self.flags(threads) | run, threads), chosen))

        elapsed = timed(work)
        self.f1["reference"] = [outcome.macro_f1 for outcome in outcomes if outcome.macro_f1 is not None]
        self.measured = outcomes[0].measured
        cpu_s = sum(outcome.timing.cpu_s for outcome in outcomes)
        if self.fraction == 1:
            return Timing(elapsed.wall_s, cpu_s)
        slowest_s = max(outcome.timing.wall_s for outcome in outcomes)
        return Timing(slowest_s * math.ceil(len(runs) / workers), cpu_s * len(runs) / len(outcomes))

    def grid(self) -> dict[str, Sequence[float]]:
        return {"kd_alpha": self.arguments.alphas, "kd_temperature": self.arguments.temperatures}

    def sweep_runs(self) -> list[Flags]:
        return [dict(zip(self.grid(), values, strict=True)) for values in itertools.product(*self.grid().values())]


def summarize(comparison: Comparison, timings: dict[str, list[Timing]]) -> dict[str, Any]:
    """Return the sides, the ratios of each reference over the suite, and both sides' macro-F1."""
    extrapolated = comparison.fraction < 1
    sides = {name: common.summarize(of_side) for name, of_side in timings.items()}
    for name in timings:
        if name != "suite" and extrapolated:
            sides[name] |= {"extrapolated": True, "measured": comparison.measured}
    f1 = {side: round(float(np.mean(values)), 4) if values else None for side, values in comparison.f1.items()}
    if f1["suite"] is not None and f1["reference"] is not None:
        f1["suite_minus_reference_points"] = round(100 * (f1["suite"] - f1["reference"]), 2)
    return {
        "extrapolated": extrapolated,
        "sides": sides,
        "ratios_over_suite": {name: common.compare(timings[name], timings["suite"]) for name in timings if name != "suite"},
        "test_macro_f1": f1,
    }


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of how both sides are trained; a benchmark sets the defaults of its own."""
    parser.add_argument("--student_layers", type=int, help="layers of the student, cut from the model (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--pooling", choices=("cls", "mean"), help="text vector of teacher and student (default: %(default)s)")
    parser.add_argument("--data_fraction", type=float, default=1.0, help="share of the training part to train on")
    parser.add_argument("--teacher_checkpoint", type=Path, help="fine-tuned teacher, as the suite takes it")
    parser.add_argument(
        "--teacher_epochs",
        type=int,
        help="else fine-tune one so long; 0: a seeded head, for timing only (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [AS_REFERENCE]:
        return run_as_reference(argv[1:])
    parser = common.build_parser(__doc__, rows=None, repeats=1)
    parser.add_argument("--mode", choices=("run", "sweep"), default="run", help="one run, or a grid of runs")
    add_training_flags(parser)
    parser.set_defaults(student_layers=6, pooling="cls", teacher_epochs=0)
    parser.add_argument("--kd_method", default="logit", help="logit, hidden, attention or multi_level (default: %(default)s)")
    parser.add_argument("--reference_dtype", choices=("float32", "bfloat16"), default="float32", help="the reference's precision")
    parser.add_argument("--reference_fraction", type=float, default=1.0, help="share of the reference to measure, above 0, to 1")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, help="kd_alpha of the sweep")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES, help="kd_temperature of the sweep")
    arguments = common.parse_flags(parser, argv)
    if not 0 < arguments.reference_fraction <= 1:
        common.fail(f"--reference_fraction: must be above 0 and at most 1, got {arguments.reference_fraction}")
    machine = common.describe_machine(arguments.threads, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(arguments, Path(folder))
        sides: dict[str, Callable[[], Timing]] = {"suite": comparison.suite_once, "reference": comparison.reference_once}
        if arguments.mode == "sweep":
            sides = {
                "suite": comparison.suite_sweep,
                "reference_in_turn": comparison.reference_in_turn,
                "reference_side_by_side": comparison.reference_side_by_side,
            }
        timings = common.interleave(sides, arguments.repeats)
    common.print_result("reference_loop", arguments, machine, summarize(comparison, timings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
