"""Time a training step of every kind on the same batches, and what surrounds it: padding, evaluation, tokenising.

    python benchmarks/step.py                          # students of 6 and 3 layers
    python benchmarks/step.py --rows 300 --steps 2 --repeats 1

Sides: plain fine-tuning of the student (labels only; the limit); the same with a last layer that computes every
position, as fine-tuning does elsewhere and as hidden states need it; distillation with every --kd_method from the
cache, and with the teacher run live; and each further loss, and averaged weights, beside logit. All go through
`DistillationTrainer.fit`, collating included. Evaluation and tokenising are timed against the reference loop's way:
batches of 32 in dataset order padded to 128, with eager attention or with the fused kernel, and one call of the
tokenizer per row. `share_of_matmul_rate` is how near a step comes to the machine: the operations of its matrix
products over its time, over the rate of one large product in the same precision (it has no embedding look-up, norm or
optimizer to pay for).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import numpy as np
import torch
from common import Side, Timing, timed
from numpy.typing import NDArray
from reference_loop import PaddedRows, evaluate_padded
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from research.evaluation.predict import predict_logits
from research.experiment.context import EVAL_BATCH, EVAL_TOKENS
from research.kd.layers import compare_layers
from research.kd.targets import KeptTeacher, TeacherTargets
from research.kd.teacher import Teacher, fetch_layers, fetch_logits
from research.models.classifiers import POSITIONWISE_PARTS, ModelShape, TextClassifier
from research.storage.cache import Cache
from research.text.batches import BatchLoader, move_batch, padding_ratio
from research.text.tokens import Tokens, tokenize
from research_config import KD_METHODS, ExperimentConfig
from research_data import Comments, load_comments
from research_distillation import DistillationTrainer

LIVE_METHODS = ("logit", "multi_level")
# What is added to distillation of logits, by the side's name.
ADDED: dict[str, dict[str, Any]] = {
    "logit_pearson": {"rank_loss_weight": 0.5},
    "logit_pairwise": {"rank_loss_weight": 0.5, "rank_objective": "pairwise"},
    "logit_annealed": {"anneal_labels": True},
    "logit_undone": {"undo_class_weights": True},
    "logit_averaged": {"ema_decay": 0.99},
}
PLAIN = "plain"
PLAIN_WHOLE = "plain_whole"
BYTES_PER_PADDED_TOKEN = 16  # an int64 id and its int64 mask
MATMUL_SIZE, MATMULS = 2048, 5


class PlannedBatches(BatchLoader):
    """The first batches of an epoch over many rows, the first of them twice: a warm-up step and `steps` timed ones."""

    steps = 1

    def __len__(self) -> int:
        return self.steps + 1

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        batches = super().plan(0)[: self.steps]
        return [batches[0], *batches]


class Bench:
    """The rows, tokens and teacher that every side shares."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        from transformers import AutoTokenizer

        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.cache = Cache(scratch / "cache")
        self.comments: Comments = load_comments(common.write_table(arguments.dataset, scratch / "comments.csv", arguments.rows))
        self.rows = np.arange(len(self.comments))
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.tokens: Tokens = tokenize(self.comments, self.tokenizer, common.MAX_LENGTH, self.cache, with_words=False)
        model = common.build_teacher(arguments.model, len(self.comments.label_names))
        self.teacher = Teacher({"seed": common.SEED}, ModelShape.of(model.backbone_config), lambda: model, lambda _: None, {}, 0)
        self.steps = min(arguments.steps, -(-len(self.rows) // common.BATCH))

    def build_evaluation_loader(self, rows: NDArray[np.int64]) -> BatchLoader:
        budget = EVAL_TOKENS[self.device.type]
        return BatchLoader(rows, self.tokens, self.comments.labels, EVAL_BATCH, token_budget=budget)

    def build_training_loader(self, **extras: Any) -> PlannedBatches:
        loader = PlannedBatches(self.rows, self.tokens, self.comments.labels, common.BATCH, seed=common.SEED, **extras)
        loader.steps = self.steps
        return loader

    def planned_rows(self) -> NDArray[np.int64]:
        return np.unique(np.concatenate(self.build_training_loader().plan(0)))

    def count_timed_rows(self) -> int:
        return sum(len(batch) for batch in self.build_training_loader().plan(0)[1:])

    def config(self, **settings: Any) -> ExperimentConfig:
        precision = {"amp": self.arguments.dtype != "float32", "amp_dtype": "bfloat16"}
        return ExperimentConfig(epochs=1, **precision, **settings)

    def compute_logits(self) -> NDArray[np.float32]:
        """Return the teacher's logits, filled in for the rows that are trained on, (N, C)."""
        rows = self.planned_rows()
        logits = np.zeros((len(self.comments), len(self.comments.label_names)), dtype=np.float32)
        logits[rows] = fetch_logits(self.teacher, self.build_evaluation_loader(rows), self.device, self.cache)
        return logits

    def keep_teacher(self, config: ExperimentConfig, student_layers: int) -> KeptTeacher:
        """Return the teacher's answers to the rows that are trained on, written down beforehand."""
        student = dataclasses.replace(self.teacher.shape, num_layers=student_layers)
        comparison = compare_layers(config, self.teacher.shape, student)
        store = None
        if comparison is not None:
            planned = self.build_evaluation_loader(self.planned_rows())
            store = fetch_layers(self.teacher, comparison.teacher, planned, self.device, self.cache)
        return KeptTeacher(self.teacher.shape, self.compute_logits(), store, self.device)


def build_sides(bench: Bench, layers: int) -> dict[str, Side]:
    """Return every kind of step for a student of `layers` layers; each trains a copy of the same student."""
    student = common.build_student(bench.arguments.model, len(bench.comments.label_names), layers)

    def build_side(method: str, *, live: bool, **settings: Any) -> Side:
        distils = method in KD_METHODS
        config = bench.config(kd_method=method if distils else "logit", **settings)
        teacher: TextClassifier | TeacherTargets | None = None
        if distils:
            teacher = bench.teacher.model if live else bench.keep_teacher(config, layers)
        label_names = bench.comments.label_names
        trainer = DistillationTrainer(teacher, copy.deepcopy(student), config, bench.device, label_names=label_names)
        loader = bench.build_training_loader()

        def train() -> None:
            with patch.dict(POSITIONWISE_PARTS, clear=method == PLAIN_WHOLE):
                trainer.fit(loader, lambda _: {config.select_by: 0.0}, torch.ones(len(label_names)))

        return lambda: common.time_last_steps(train, bench.steps, bench.arguments.device)

    sides = {name: build_side(name, live=False) for name in (PLAIN, PLAIN_WHOLE)}
    sides |= {f"{method}_cached": build_side(method, live=False) for method in KD_METHODS}
    sides |= {name: build_side("logit", live=False, **settings) for name, settings in ADDED.items()}
    return sides | {f"{method}_live": build_side(method, live=True) for method in LIVE_METHODS}


def count_operations(bench: Bench, layers: int) -> dict[str, int]:
    """Return the operations of the matrix products of the timed steps, forward and backward, of the plain sides."""
    student = common.build_student(bench.arguments.model, len(bench.comments.label_names), layers)
    trainer = DistillationTrainer(None, student, bench.config(), bench.device)
    loader, counts = bench.build_training_loader(), {}
    for side in (PLAIN, PLAIN_WHOLE):
        with patch.dict(POSITIONWISE_PARTS, clear=side == PLAIN_WHOLE), FlopCounterMode(display=False) as counter:
            for index in loader.plan(0)[1:]:
                trainer.compute_losses(move_batch(loader.collate(index), bench.device), None)["total_loss"].backward()
        counts[side] = counter.get_total_flops()
    return counts


def build_matmul(bench: Bench) -> Side:
    """Return large matrix products in the precision of the steps."""
    dtype = getattr(torch, bench.arguments.dtype)
    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=bench.device).to(dtype)

    def multiply() -> None:
        for _ in range(MATMULS):
            left @ right
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)

    multiply()
    return lambda: timed(multiply)


def measure_shares(bench: Bench, layers: int, timings: dict[str, list[Timing]]) -> dict[str, Any]:
    """Return the rate of the matrix products in the plain sides' steps, and its share of one large product's."""
    rate = MATMULS * 2 * MATMUL_SIZE**3 / common.median_of(timings["matmul"]).wall_s
    rates = {side: count / common.median_of(timings[side]).wall_s for side, count in count_operations(bench, layers).items()}
    return {
        "matmul_gflop_per_s": common.significant(rate / 1e9),
        "step_gflop_per_s": {side: common.significant(value / 1e9) for side, value in rates.items()},
        "share_of_matmul_rate": {side: common.significant(value / rate) for side, value in rates.items()},
    }


def measure_steps(bench: Bench, layers: int) -> dict[str, Any]:
    timings = common.interleave(build_sides(bench, layers) | {"matmul": build_matmul(bench)}, bench.arguments.repeats)
    shares = measure_shares(bench, layers, timings)
    del timings["matmul"]
    rows = bench.count_timed_rows()
    return {
        **shares,
        "sides": {name: common.summarize(of_side, rows) for name, of_side in timings.items()},
        **{
            f"over_{plain}": {name: common.compare(of_side, timings[plain]) for name, of_side in timings.items() if name != plain}
            for plain in (PLAIN, PLAIN_WHOLE)
        },
    }


def measure_evaluation(bench: Bench, layers: int) -> dict[str, Any]:
    """Time a student's evaluation: sorted by length in large batches, against dataset order padded to 128."""
    rows = bench.rows[: bench.arguments.evaluation_rows]
    texts = [text for text, _ in zip(bench.comments.iter_texts(), rows, strict=False)]
    labels = bench.comments.labels[rows]
    padded = DataLoader(PaddedRows(texts, labels, bench.tokenizer, common.MAX_LENGTH), batch_size=common.BATCH)
    sorted_loader = bench.build_evaluation_loader(rows)
    student = common.build_student(bench.arguments.model, labels.shape[1], layers).to(bench.device)
    fused = common.make_stock(copy.deepcopy(student), "sdpa")
    eager = common.make_stock(copy.deepcopy(student), "eager")
    timings = common.interleave(
        {
            "suite": lambda: timed(lambda: predict_logits(student, sorted_loader, bench.device)),
            "padded_fused": lambda: timed(lambda: evaluate_padded(fused, padded, bench.device)),
            "padded_eager": lambda: timed(lambda: evaluate_padded(eager, padded, bench.device)),
        },
        min(bench.arguments.repeats, 3),
    )
    return compare_with_suite(timings, len(rows))


def compare_with_suite(timings: dict[str, list[Timing]], rows: int) -> dict[str, Any]:
    return {
        "rows": rows,
        "sides": {name: common.summarize(of_side, rows) for name, of_side in timings.items()},
        "over_suite": {name: common.compare(of_side, timings["suite"]) for name, of_side in timings.items() if name != "suite"},
    }


class ListedTexts:
    """Texts in memory, so that tokenising is timed without reading a table."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.text_sha256 = "timed"

    def __len__(self) -> int:
        return len(self.texts)

    def iter_texts(self) -> Iterator[str]:
        return iter(self.texts)


def measure_tokenising(bench: Bench) -> dict[str, Any]:
    """Time the suite's tokenising, its cache entry written, against a call per row padded to 128."""
    from transformers import AutoTokenizer

    texts = ListedTexts(list(bench.comments.iter_texts()))
    # Each side has a tokenizer of its own: padding and truncation are settings that stay in it.
    tokenizer = AutoTokenizer.from_pretrained(bench.arguments.model)
    padded_rows = PaddedRows(
        texts.texts, bench.comments.labels, AutoTokenizer.from_pretrained(bench.arguments.model), common.MAX_LENGTH
    )

    def suite() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tokenize(texts, tokenizer, common.MAX_LENGTH, Cache(Path(folder)), with_words=False)

    def per_row() -> None:
        for place in range(len(padded_rows)):
            padded_rows[place]

    sides = {"suite": lambda: timed(suite), "per_row": lambda: timed(per_row)}
    timings = common.interleave(sides, min(bench.arguments.repeats, 3))
    cache_bytes = sum(path.stat().st_size for path in (bench.cache.root / "tokens").rglob("*") if path.is_file())
    padded_bytes = len(texts.texts) * common.MAX_LENGTH * BYTES_PER_PADDED_TOKEN
    sizes = {"suite": cache_bytes, "padded_int64": padded_bytes, "ratio": round(padded_bytes / cache_bytes, 1)}
    return compare_with_suite(timings, len(texts.texts)) | {"bytes": sizes}


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.build_parser(__doc__, rows=None, repeats=7)
    parser.add_argument("--student_layers", type=int, nargs="+", default=[6, 3], help="layers of each student timed")
    parser.add_argument("--steps", type=int, default=10, help="steps of each measurement (default: %(default)s)")
    parser.add_argument("--evaluation_rows", type=int, default=1250, help="rows of the timed evaluation (default: %(default)s)")
    arguments = common.parse_flags(parser, argv)
    machine = common.describe_machine(arguments.threads, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        lengths = bench.tokens.lengths
        result = {
            "steps": {f"{layers}_layers": measure_steps(bench, layers) for layers in arguments.student_layers},
            "padded_over_real_tokens": {
                "suite": round(
                    padding_ratio(BatchLoader(bench.rows, bench.tokens, bench.comments.labels, common.BATCH, seed=common.SEED)), 4
                ),
                "suite_evaluation": round(padding_ratio(bench.build_evaluation_loader(bench.rows)), 4),
                "padded_to_max_length": round(common.MAX_LENGTH * len(lengths) / int(lengths.sum()), 2),
            },
            "evaluation": measure_evaluation(bench, arguments.student_layers[0]),
            "tokenising": measure_tokenising(bench),
        }
    common.print_result("step", arguments, machine, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
