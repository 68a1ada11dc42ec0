"""Time the suite's step against TextBrewer's and Hugging Face Trainer's, in one process, on the same batches.

    python benchmarks/peers.py --install cache/peers        # once: a virtual environment of its own
    python benchmarks/peers.py                              # runs there

The weights, data, batches, padding, loss, optimizer (AdamW) and clipping are the same; only logits are
distilled, since TextBrewer caches nothing else. The peers' models are stock transformers encoders with fused
attention. Sides: the suite from its cache and with a live teacher; TextBrewer's BasicDistiller live and with
`is_caching_logits` (the fill is not timed); `Trainer` with a `compute_loss` that runs the teacher. The peers
get their batches ready-made, while the suite's side collates its own in the timed steps. TextBrewer knows no
multi-label loss: one is registered in `presets.KD_LOSS_MAP`, as its documentation says.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import Side

REQUIREMENTS = Path(__file__).with_name("requirements-peers.txt")
DEFAULT_ENVIRONMENT = common.ROOT / "cache" / "peers"
MODULES = ("textbrewer", "accelerate")
COUNTERPARTS = {
    "textbrewer_live": "suite_live",
    "textbrewer_cached": "suite_cached",
    "trainer_live": "suite_live",
}


def install(folder: Path) -> None:
    """Make a virtual environment that holds the suite's requirements and the peers."""
    venv.create(folder, with_pip=True)
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-r", str(REQUIREMENTS)], check=True)


def has_peers() -> bool:
    return all(importlib.util.find_spec(module) is not None for module in MODULES)


def find_environment(folder: Path) -> Path:
    """Return the interpreter of the peers' environment."""
    interpreter = folder / "bin" / "python"
    if not interpreter.is_file():
        command = f"python benchmarks/peers.py --install {folder}"
        common.fail(f"--environment: no virtual environment in {folder}. Make it with: {command}")
    return interpreter


def build_sides(arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Side], int]:
    """Return the five sides, each training a copy of one student, and the rows of a measurement."""
    from step import Bench

    import research_distillation

    bench = Bench(arguments, scratch)
    num_labels = len(bench.comments.label_names)
    student = common.build_student(arguments.model, num_labels, arguments.student_layers)
    config = bench.config(pipeline="kd_only")
    kept = bench.keep_teacher(config, arguments.student_layers)
    loader = bench.build_training_loader()
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")} for batch in loader]
    stock_teacher, stock_student = (make_stock_classifier(model).to(bench.device) for model in (bench.teacher.model, student))
    peers = Peers(stock_teacher, stock_student, config, batches, scratch, arguments.device)

    def build_suite(*, live: bool) -> Side:
        trainer = research_distillation.DistillationTrainer(
            bench.teacher.model if live else kept, copy.deepcopy(student), config, bench.device
        )
        own_loader = bench.build_training_loader()
        return lambda: common.time_last_steps(
            lambda: trainer.fit(own_loader, lambda _: {config.select_by: 0.0}), bench.steps, arguments.device
        )

    steps = {"textbrewer_live": peers.textbrewer(caching=False), "textbrewer_cached": peers.textbrewer(caching=True)}
    steps["trainer_live"] = peers.hugging_face()
    sides = {"suite_cached": build_suite(live=False), "suite_live": build_suite(live=True)}
    for name, train in steps.items():
        sides[name] = lambda train=train: common.time_last_steps(train, bench.steps, arguments.device)  # type: ignore[misc]
    return sides, bench.count_timed_rows()


class Peers:
    """The other toolkits, each set up as its documentation says, over ready-made batches."""

    def __init__(self, teacher: Any, student: Any, config: Any, batches: list[Any], scratch: Path, device: str) -> None:
        self.teacher = teacher
        self.student = student
        self.config = config
        self.batches = batches
        self.scratch = scratch
        self.device = device

    def soft_loss(self, student_logits: Any, teacher_logits: Any, temperature: float) -> Any:
        from research.kd.losses import soft_bce_loss

        return soft_bce_loss(student_logits, teacher_logits, temperature).mean()

    def hard_loss(self, logits: Any, labels: Any) -> Any:
        from research.kd.losses import hard_bce_loss

        loss, known = hard_bce_loss(logits, labels)
        return loss.sum() / known.sum()

    def build_optimizer(self, model: Any) -> Any:
        import torch

        return torch.optim.AdamW(model.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    def textbrewer(self, *, caching: bool) -> Any:
        """Return a call that trains with TextBrewer; each call starts a new distiller on the same student."""
        import textbrewer  # type: ignore[import-not-found, unused-ignore]
        from textbrewer.presets import KD_LOSS_MAP  # type: ignore[import-not-found, unused-ignore]

        KD_LOSS_MAP["multi_label"] = self.soft_loss
        student, teacher = copy.deepcopy(self.student), self.teacher
        config = self.config
        # Saving is put off past the epochs that are timed.
        training = textbrewer.TrainingConfig(
            output_dir=str(self.scratch / "textbrewer"), device=self.device, ckpt_epoch_frequency=1000
        )

        def adapt_student(batch: Any, outputs: Any) -> dict[str, Any]:
            return {"logits": (outputs["logits"],), "losses": (self.hard_loss(outputs["logits"], batch["labels"]),)}

        def adapt_teacher(_batch: Any, outputs: Any) -> dict[str, Any]:
            return {"logits": (outputs["logits"],)}

        # Cached batches come in an order of TextBrewer's own, so the second epoch over the timed ones is measured.
        batches, epochs = (self.batches[1:], 2) if caching else (self.batches, 1)

        def train() -> None:
            distillation = textbrewer.DistillationConfig(
                temperature=config.kd_temperature,
                kd_loss_type="multi_label",
                kd_loss_weight=config.kd_alpha,
                hard_label_weight=1 - config.kd_alpha,
                is_caching_logits=caching,
            )
            distiller = textbrewer.BasicDistiller(training, distillation, teacher, student, adapt_teacher, adapt_student)
            optimizer = self.build_optimizer(student)
            with distiller:
                distiller.train(optimizer, batches, num_epochs=epochs, max_grad_norm=config.gradient_clip_norm)

        return train

    def hugging_face(self) -> Any:
        """Return a call that trains with Trainer, the teacher run inside its loss."""
        import torch
        from torch.utils.data import DataLoader
        from transformers import Trainer, TrainingArguments

        config, batches = self.config, self.batches
        teacher = self.teacher.eval().requires_grad_(False)
        student = copy.deepcopy(self.student)
        hard_loss, soft_loss = self.hard_loss, self.soft_loss

        class DistillingTrainer(Trainer):
            def get_train_dataloader(self) -> Any:
                return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
                labels = inputs["labels"]
                inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
                outputs = model(**inputs)
                with torch.no_grad():
                    teacher_logits = teacher(**inputs)["logits"]
                soft = soft_loss(outputs["logits"], teacher_logits, config.kd_temperature)
                loss = config.kd_alpha * soft + (1 - config.kd_alpha) * hard_loss(outputs["logits"], labels)
                return (loss, outputs) if return_outputs else loss

        settings = TrainingArguments(
            output_dir=str(self.scratch / "trainer"),
            num_train_epochs=1,
            learning_rate=config.lr,
            weight_decay=config.weight_decay,
            max_grad_norm=config.gradient_clip_norm,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=self.device == "cpu",
            remove_unused_columns=False,
        )

        def train() -> None:
            DistillingTrainer(model=student, args=settings, train_dataset=batches).train()

        return train


def make_stock_classifier(model: Any) -> Any:
    """Copy a classifier of the suite into a plain module on a stock encoder.

    It can be called with a whole batch, labels included, as TextBrewer calls models.
    """
    from torch import nn

    model = common.make_stock(copy.deepcopy(model), "sdpa")

    class StockClassifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
            states = self.model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return {"logits": self.model.classify(states, attention_mask)}

    return StockClassifier()


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = common.build_parser(__doc__, rows=4000, repeats=7)
    parser.add_argument("--student_layers", type=int, default=6, help="layers of the student, cut from the model")
    parser.add_argument("--steps", type=int, default=10, help="steps of each measurement (default: %(default)s)")
    parser.add_argument("--environment", type=Path, default=DEFAULT_ENVIRONMENT, help="the peers' virtual environment")
    parser.add_argument("--install", type=Path, metavar="DIR", help="make the peers' virtual environment there, and end")
    arguments = parser.parse_args(argv)
    if arguments.install is not None:
        install(arguments.install)
        return 0
    if not has_peers():
        interpreter = find_environment(arguments.environment)
        return subprocess.run([str(interpreter), str(Path(__file__).resolve()), *argv], env=os.environ, check=False).returncode
    arguments = common.parse_flags(parser, argv)
    if arguments.dtype != "float32":
        common.fail("--dtype: TextBrewer trains in float32 or with apex, so only float32 is compared")
    machine = common.describe_machine(arguments.threads, arguments.device)
    # The toolkits print to stdout, which is for the JSON line.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        sides, rows = build_sides(arguments, Path(folder))
        timings = common.interleave(sides, arguments.repeats)
    result = {
        "sides": {name: common.summarize(of_side, rows) for name, of_side in timings.items()},
        "over_suite": {f"{peer}/{own}": common.compare(timings[peer], timings[own]) for peer, own in COUNTERPARTS.items()},
    }
    common.print_result("peers", arguments, machine, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
