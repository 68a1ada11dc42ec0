"""A tiny student's steps, taken by one process or shared by several."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

from research.components import COMPONENT_NAMES
from research.distributed import World, join_world
from research.evaluation.predict import predict_logits
from research.experiment.teacher_stage import spread
from research.kd.loop import EpochLoop
from research.models.classifiers import StudentModel, TeacherModel
from research.models.encoders import prepare_encoder
from research.sharding import collect, own_piece
from research.storage.checkpoints import CheckpointFolder
from research.text.batches import BatchLoader
from research.text.tokens import Tokens
from research.text.words import WordPairs
from research_config import ExperimentConfig
from research_distillation import DistillationTrainer

VOCABULARY, ROWS, LABELS, STEPS = 40, 13, 3, 10
Case = dict[str, Any]
CASES: dict[str, Case] = {
    "labels alone": {"alone": True},
    "logit": {},
    "an alpha for each label": {"label_alphas": ("a=0.9", "c=0.2")},
    "hidden": {"kd_method": "hidden"},
    "hidden, cosine": {"kd_method": "hidden", "hidden_objective": "cosine"},
    "attention": {"kd_method": "attention"},
    "attention, kl": {"kd_method": "attention", "attention_objective": "kl"},
    "attention, relation": {"kd_method": "attention", "attention_objective": "relation"},
    "multi_level": {"kd_method": "multi_level"},
    "multi_level, two tokenizers": {"kd_method": "multi_level", "two_tokenizers": True},
    "rank, pearson": {"rank_loss_weight": 2.0},
    "rank, pairwise": {"rank_loss_weight": 2.0, "rank_objective": "pairwise"},
    "annealed, averaged, weights undone": {"anneal_labels": True, "ema_decay": 0.9, "undo_class_weights": True},
    "multi_level, accumulated": {"kd_method": "multi_level", "gradient_accumulation": 2},
}


def build_tokens(seed: int) -> Tokens:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, 9, ROWS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = generator.integers(3, VOCABULARY, lengths.sum()).astype(np.int32)
    return Tokens(ids=ids, offsets=offsets, words=None, pad_id=0, key="tiny")


def build_words(tokens: Tokens, shared: np.ndarray) -> np.ndarray:
    """Give the first tokens of each row the numbers of its shared words, one each."""
    rows = [np.where(np.arange(n) < words, np.arange(n), -1) for n, words in zip(tokens.lengths, shared, strict=True)]
    return np.concatenate(rows).astype(np.int16)


def build_loader(world: World, batch: int, two_tokenizers: bool) -> BatchLoader:
    """Return batches whose last is ragged, with unknown labels, and one row that has none."""
    labels = np.random.default_rng(1).integers(0, 2, (ROWS, LABELS)).astype(np.float32)
    labels[::4, 1] = labels[3] = np.nan
    tokens = build_tokens(2)
    extras: dict[str, Any] = {}
    if two_tokenizers:
        other, shared = build_tokens(3), np.arange(ROWS) % 4
        extras["words"] = WordPairs(build_words(tokens, shared), build_words(other, shared), 1.0)
        extras["teacher_tokens"] = other
    return BatchLoader(np.arange(ROWS), tokens, labels, batch, seed=0, world=world, **extras)


def build_encoder(layers: int, width: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
    }
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **shape, **dropout)
    return prepare_encoder(BertModel(config, add_pooling_layer=True))  # the pooler is never used


def take_steps(world: World, case: Case, batch: int) -> dict[str, np.ndarray]:
    """Train a student for STEPS steps; return every step's losses, as read, and the weights at the end."""
    case = dict(case)
    alone, two_tokenizers = case.pop("alone", False), case.pop("two_tokenizers", False)
    config = dataclasses.replace(ExperimentConfig(batch=batch, lr=1e-3), **case)
    teacher = TeacherModel(num_labels=LABELS, encoder=build_encoder(4, 12, seed=1))
    student = StudentModel(num_labels=LABELS, dropout=0.0, classifier_hidden_size=8, encoder=build_encoder(2, 8, seed=2))
    torch.manual_seed(3)  # for the projections
    trainer = DistillationTrainer(None if alone else teacher, student, config, "cpu", label_names=("a", "b", "c"), world=world)
    trainer.set_training_mode()
    loader, optimizer, losses = build_loader(world, batch, two_tokenizers), trainer.build_optimizer(), []
    batches = [found for epoch in range(2 * STEPS) for found in loader.iterate(epoch)]
    group = config.gradient_accumulation
    for step in range(STEPS):
        trainer.objective.progress = step / STEPS
        trainer.take_step(batches[step * group : (step + 1) * group], optimizer, torch.tensor([1.0, 2.0, 3.0]), step + 1)
        sums, rows = trainer.read_losses()
        losses.append([sums[name] / rows for name in (*COMPONENT_NAMES, "grad_norm")])
    with trainer.judged_weights():
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])
    return {"losses": np.array(losses), "weights": weights.numpy()}


def take_all_steps(folder: Path, batch: int) -> None:
    """Be one process that takes the steps of every case."""
    torch.set_num_threads(1)
    world = join_world("cpu")
    for number, case in enumerate(CASES.values()):
        arrays: dict[str, Any] = take_steps(world, case, batch)
        np.savez(folder / f"{number}_{world.rank}.npz", **arrays)
    world.leave()


def take_steps_of_teacher(world: World, folder: Path, sharded: bool) -> dict[str, np.ndarray]:
    """Fine-tune a teacher for half of STEPS steps, put what a checkpoint kept of it into another, and go on with that.

    Returns:
        The losses of every step, the logits of all rows at the end, the weights, and how many of those lay with this process.
    """
    config = dataclasses.replace(ExperimentConfig(batch=5, lr=1e-3, gradient_accumulation=2), shard_teacher=sharded)
    loader = build_loader(world, 5, two_tokenizers=False)
    batches = [found for epoch in range(2 * STEPS) for found in loader.iterate(epoch)]
    losses: list[list[float]] = []
    checkpoints = CheckpointFolder(folder, world=world, of_each=sharded)
    for half in range(2):
        model = TeacherModel(num_labels=LABELS, dropout=0.0, encoder=build_encoder(4, 12, seed=1 + half))
        if sharded:
            spread(model, torch.device("cpu"), world.size)
        trainer = DistillationTrainer(None, model, config, "cpu", world=world)
        loop = EpochLoop(trainer, loader, lambda _: {}, checkpoints=checkpoints)
        loop._resume()
        trainer.set_training_mode()
        for step in range(half * STEPS // 2, (1 + half) * STEPS // 2):
            trainer.take_step(batches[2 * step : 2 * step + 2], loop.optimizer, torch.tensor([1.0, 2.0, 3.0]), step + 1)
            sums, rows = trainer.read_losses()
            losses.append([sums[name] / rows for name in (*COMPONENT_NAMES, "grad_norm")])
        loop._save()
    asked = BatchLoader(np.arange(ROWS), loader.tokens, loader.labels, 8, token_budget=8, world=world)
    return {
        "losses": np.array(losses),
        "logits": predict_logits(model, asked, "cpu", num_rows=ROWS, world=world),
        "weights": torch.cat([tensor.flatten() for tensor in collect(model, keep=True).values()]).numpy(),
        "held": np.array(sum(own_piece(parameter).numel() for parameter in model.parameters())),
    }


def shard_teacher(folder: Path) -> None:
    """Be one process of those that fine-tune a sharded teacher."""
    torch.set_num_threads(1)
    world = join_world("cpu")
    arrays: dict[str, Any] = take_steps_of_teacher(world, folder / "checkpoints", sharded=True)
    np.savez(folder / f"{world.rank}.npz", **arrays)
    world.leave()


def differ(folder: Path) -> None:
    """Be a process whose device is another in the second."""
    world = join_world("cpu")
    try:
        world.check_equal({"libraries": "torch 2", "device": "cuda" if world.rank else "cpu"})
    except Exception as error:
        (folder / f"{world.rank}.txt").write_text(f"{type(error).__name__} {error}")
    world.leave()
