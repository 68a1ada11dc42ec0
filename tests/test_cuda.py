"""What a card has to do as the CPU does it, and the waiting that a step must not do.

Skipped where there is no card. `KD_TEST_DEVICE=cpu` runs what does not need one, to see that the tests themselves hold.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import QUICK_EXTRAS, build_model_folder, make_table, make_texts
from transformers import BertConfig, BertModel

import research_main
from research.kd.layers import compare_layers
from research.kd.targets import LiveTeacher
from research.models.classifiers import ModelShape, StudentModel, TeacherModel
from research.models.encoders import prepare_encoder
from research.text.batches import Batch
from research_config import KD_METHODS, ExperimentConfig
from research_distillation import DistillationTrainer

DEVICE = os.environ.get("KD_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LABELS = 3


def build_tiny_encoder(layers: int, width: int) -> torch.nn.Module:
    torch.manual_seed(layers)
    shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    config = BertConfig(vocab_size=50, num_attention_heads=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape)
    return prepare_encoder(BertModel(config, add_pooling_layer=False))


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(12)[None] < torch.tensor([12, 7, 5, 3])[:, None]
    labels = torch.randint(0, 2, (4, LABELS), generator=generator).float()
    labels[1, 0] = torch.nan
    return {
        "index": torch.arange(4),
        "row": torch.arange(4),
        "input_ids": torch.randint(1, 50, (4, 12), generator=generator) * mask,
        "attention_mask": mask.long(),
        "labels": labels,
    }


def build_trainer(method: str, device: str, **settings: Any) -> DistillationTrainer:
    config = ExperimentConfig(kd_method=method, dropout=0.0, lr=1e-3, **settings)
    teacher = TeacherModel(num_labels=LABELS, dropout=0.0, encoder=build_tiny_encoder(4, 24))
    student = StudentModel(num_labels=LABELS, dropout=0.0, classifier_hidden_size=8, encoder=build_tiny_encoder(2, 16))
    shapes = ModelShape.of(teacher.backbone_config), ModelShape.of(student.backbone_config)
    comparison = compare_layers(config, *shapes)
    targets = LiveTeacher(teacher, device, None if comparison is None else comparison.teacher)
    torch.manual_seed(0)  # of the projections
    return DistillationTrainer(targets, student, config, device)


@contextmanager
def forbidding_waits() -> Iterator[None]:
    """Let every operation that makes the host wait for the card raise."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", KD_METHODS)
def test_ten_steps_on_the_card_lose_what_they_lose_on_the_cpu(method: str) -> None:
    trainers = {device: build_trainer(method, device, amp=False) for device in ("cpu", DEVICE)}
    optimizers = {device: trainer.build_optimizer() for device, trainer in trainers.items()}
    for _ in range(10):
        losses = {device: trainer.train_step(make_batch(), optimizers[device]) for device, trainer in trainers.items()}
        for name, value in losses["cpu"].items():
            assert losses[DEVICE][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", KD_METHODS)
def test_lower_precision_stays_near_float32(method: str, amp_dtype: str) -> None:
    trainers = [build_trainer(method, DEVICE, **settings) for settings in ({"amp": False}, {"amp_dtype": amp_dtype})]
    exact, lower = (trainer.train_step(make_batch(), trainer.build_optimizer()) for trainer in trainers)
    for name, value in exact.items():
        assert lower[name] == pytest.approx(value, rel=0.05, abs=0.02), name


@needs_card
def test_float16_trains_through_a_scaler_that_skips_overflowing_steps() -> None:
    trainer = build_trainer("logit", DEVICE, amp_dtype="float16")
    assert trainer.scaler.is_enabled()
    before = copy.deepcopy(trainer.student.state_dict())
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    trainer.set_training_mode()
    assert not trainer.take_step([make_batch()], trainer.build_optimizer(), None, step=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.student.state_dict().items())
    trainer.read_losses()  # a skipped step is no fault


@needs_card
@pytest.mark.parametrize("settings", [{"amp": False}, {"amp_dtype": "bfloat16"}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", KD_METHODS)
def test_step_never_waits_for_the_card(method: str, settings: dict[str, Any]) -> None:
    trainer = build_trainer(method, DEVICE, **settings)
    optimizer, batch = trainer.build_optimizer(), make_batch()
    trainer.train_step(batch, optimizer)  # what is allocated and chosen once
    trainer.set_training_mode()
    with forbidding_waits():
        trainer.take_step([batch], optimizer, None, step=2)
    losses, rows = trainer.read_losses()
    assert rows == 4 and np.isfinite(losses["total_loss"])


def test_non_finite_loss_leaves_the_weights_alone() -> None:
    trainer = build_trainer("logit", DEVICE, amp=False)
    optimizer, batch = trainer.build_optimizer(), make_batch()
    trainer.set_training_mode()
    before = copy.deepcopy(trainer.student.state_dict())
    batch["labels"][0, 0] = torch.inf
    trainer.take_step([batch], optimizer, None, step=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.student.state_dict().items())
    with pytest.raises(Exception, match="step 1"):
        trainer.read_losses()


@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
def test_whole_run_on_the_card_ends_near_the_cpus(tmp_path: Path, amp_dtype: str) -> None:
    model = build_model_folder("bert", "wordpiece", tmp_path / "model", make_texts(80))
    table = make_table(tmp_path / "comments.csv", rows=120)
    scores = {}
    for device in ("cpu", DEVICE):
        run = tmp_path / f"run_{device}"
        flags = f"--dataset_path {table} --teacher_path {model} --student_path {model} --student_layers 1 --kd_method multi_level"
        flags += f" --epochs 3 --teacher_epochs 3 --lr 1e-3 --max_length 24 --allow_weak_teacher --amp_dtype {amp_dtype}"
        flags += f" --device {device} --num_threads 1 --output_dir {run} --cache_dir {tmp_path / device}"
        assert research_main.main(flags.split(), QUICK_EXTRAS) == 0
        scores[device] = json.loads((run / "metrics.json").read_text())["student"]["validation"]["at_0.5"]
    assert scores[DEVICE]["brier"] == pytest.approx(scores["cpu"]["brier"], abs=0.05)
