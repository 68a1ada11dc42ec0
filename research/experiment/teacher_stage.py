"""The teacher of a run: taken from a checkpoint or fine-tuned once, judged, and asked about every row."""

from __future__ import annotations

import dataclasses
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from research.errors import WeakTeacher
from research.evaluation.calibration import sigmoid
from research.evaluation.efficiency import count_parameters
from research.experiment.context import RunContext
from research.experiment.inputs import Inputs, hash_rows
from research.experiment.runtime import Runtime
from research.experiment.seen_texts import read_seen, storing_seen, write_seen
from research.experiment.training import summarize, train
from research.kd.layers import compare_layers
from research.kd.loop import TrainingResult
from research.kd.targets import KeptTeacher, LiveTeacher, TeacherTargets
from research.kd.teacher import Teacher, estimate_bytes, fetch_layers, fetch_logits
from research.models.classifiers import TeacherModel, TextClassifier
from research.models.encoders import load_encoder
from research.models.fingerprint import check_unchanged
from research.models.saved import load_classifier, save_classifier
from research.names import PARTS
from research.runs.directory import RunDirectory
from research.storage.arrays import release_pages
from research.storage.cache import MANIFEST
from research.storage.checkpoints import CheckpointFolder
from research.storage.files import copy_folder
from research.text.tokens import fingerprint_tokenizer
from research_config import settings_that_decide
from research_distillation import DistillationTrainer, score_teacher

log = logging.getLogger(__name__)
# Part of the cache keys: raise it when the files of an entry change.
TEACHERS_FORMAT = 3


def get_teacher(context: RunContext) -> Teacher:
    """Return the teacher of --teacher_checkpoint, or the fine-tuned one, from the cache when it is there."""
    inputs = context.inputs
    checkpoint, shape = inputs.checkpoint, inputs.shapes["teacher"]
    if checkpoint is not None:
        return Teacher(
            identify_checkpoint(inputs),
            shape,
            lambda: checkpoint.model,
            storing_seen(
                lambda folder: save_classifier(checkpoint.model.cpu(), checkpoint.tokenizer, folder, inputs.model_settings),
                read_seen(str(inputs.config.teacher_checkpoint)),
            ),
            {"source": "checkpoint", "training_texts": inputs.teacher_texts},
            count_parameters(checkpoint.model)["parameters_total"],
        )

    def build(folder: Path, scratch: Path) -> None:
        store_teacher(*fine_tune(context, scratch), context, folder)

    num_processes = find_num_processes(inputs, context.runtime, context.run_dir)
    key = teacher_key(inputs, context.runtime, num_processes)
    folder = context.runtime.cache.fetch("teachers", key, build, join=lambda scratch: fine_tune(context, scratch))
    context.runtime.world.lead(lambda: context.run_dir.keep_num_processes(num_processes))

    def load() -> TextClassifier:
        model = load_classifier(str(folder / "model"), inputs.comments.label_names).model
        context.runtime.cache.check_unchanged(folder)
        return model

    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return Teacher(
        identify_entry(folder),
        shape,
        load,
        lambda target: copy_folder(folder / "model", target),
        facts["training"],
        facts["parameters"],
    )


def identify_checkpoint(inputs: Inputs) -> dict[str, Any]:
    """Return what identifies the teacher of --teacher_checkpoint."""
    assert inputs.checkpoint is not None
    return {
        "files": inputs.model_files["teacher"].sha256,
        "labels": list(inputs.comments.label_names),
        # That of the flag, where the files do not say.
        "pooling": getattr(inputs.checkpoint.model, "pooling", None),
    }


def identify_entry(folder: Path) -> dict[str, Any]:
    """Return what identifies a fine-tuned teacher, by its folder in the cache."""
    return {"files": json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]}


def find_num_processes(inputs: Inputs, runtime: Runtime, run_dir: RunDirectory) -> int:
    """Return on how many processes the run's teacher is fine-tuned.

    Those of now, but a run that goes on with others keeps the teacher it began with.
    """

    def find() -> int:
        kept = run_dir.kept_num_processes()
        if kept is None or runtime.cache.find("teachers", teacher_key(inputs, runtime, kept)) is None:
            return runtime.world.size
        return kept

    return runtime.world.lead(find)


def teacher_key(inputs: Inputs, runtime: Runtime, num_processes: int) -> dict[str, Any]:
    """Return everything the fine-tuned teacher's bytes depend on."""
    comments, split = inputs.comments, inputs.split
    # Sums of several processes end in other last digits. Of one, the key says nothing, as it always did.
    together = {"processes": num_processes} if num_processes > 1 else {}
    return together | {
        "model": inputs.model_files["teacher"].sha256,
        "tokenizer": fingerprint_tokenizer(inputs.teacher_tokenizer),
        "settings": inputs.model_settings,
        "rows": {part: hash_rows(comments, getattr(split, part)) for part in ("train", "validation")},
        "training": settings_that_decide(inputs.config, "teacher"),
        "device": runtime.device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "format": TEACHERS_FORMAT,
    }


def fine_tune(context: RunContext, scratch: Path) -> tuple[TeacherModel, TrainingResult]:
    """Fine-tune the teacher on the labels; it ends with the weights of its best epoch. Its checkpoints go to `scratch`."""
    inputs, tokens = context.inputs, context.tokens.teacher
    assert tokens is not None
    config = dataclasses.replace(
        inputs.config, epochs=inputs.config.teacher_epochs, seed=inputs.config.split_seed, freeze_student_encoder=False
    )
    log.info("fine-tuning the teacher %s on %d rows", config.teacher_path, len(inputs.split.train))
    encoder = load_encoder(config.teacher_path)
    check_unchanged(inputs.model_files["teacher"])
    torch.manual_seed(config.seed)
    num_labels = len(inputs.comments.label_names)
    model = TeacherModel(num_labels=num_labels, dropout=config.dropout, pooling=config.pooling, encoder=encoder)
    world = context.runtime.world
    trainer = DistillationTrainer(None, model, config, context.runtime.device, world=world)
    loader = context.training_batches(inputs.split.train, tokens, config.seed)
    return model, train("teacher", trainer, loader, CheckpointFolder(scratch, world=world), context)


def store_teacher(model: TeacherModel, result: TrainingResult, context: RunContext, folder: Path) -> None:
    """Leave the fine-tuned teacher and the facts of its training in a folder of the cache."""
    inputs = context.inputs
    save_classifier(model.cpu(), inputs.teacher_tokenizer, folder / "model", inputs.model_settings)
    write_seen(folder / "model", inputs.comments.text_hash[inputs.split.train])
    facts = {"training": summarize(result), "parameters": count_parameters(model)["parameters_total"]}
    (folder / "training.json").write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def compute_logits(teacher: Teacher, rows: NDArray[np.int64], context: RunContext) -> NDArray[np.float32]:
    """Return the teacher's logits of some rows, (N, C) in their order."""
    assert context.tokens.teacher is not None
    loader = context.evaluation_batches(rows, context.tokens.teacher)
    return fetch_logits(teacher, loader, context.runtime.device, context.runtime.cache)


def judge_teacher(teacher: Teacher, context: RunContext) -> dict[str, NDArray[np.float32]]:
    """Return the teacher's logits on validation and test, (N, C) each.

    Validation comes first: a teacher too weak to learn from is told before it has been asked about anything else.

    Raises:
        WeakTeacher: macro-F1 at 0.5 is under --min_teacher_f1 and --allow_weak_teacher was not given.
    """
    logits = {}
    for part in PARTS:
        with context.runtime.timed("teacher_outputs"):
            kept = compute_logits(teacher, getattr(context.inputs.split, part), context)
        logits[part] = np.array(kept)
        release_pages(kept)
        if part == "validation":
            verify_teacher(sigmoid(logits[part]), context.inputs)
    return logits


def verify_teacher(probs: NDArray[np.float64], inputs: Inputs) -> None:
    """Stop before any distillation when the teacher is too weak to learn from.

    Args:
        probs: (N, C) of the validation part.

    Raises:
        WeakTeacher: macro-F1 at 0.5 is under --min_teacher_f1 and --allow_weak_teacher was not given.
    """
    config = inputs.config
    strong_enough, scores = score_teacher(inputs.comments.labels[inputs.split.validation], probs, config.min_teacher_f1)
    log.info("teacher: validation macro-F1 %.4f", scores["f1"])
    if not strong_enough and not config.allow_weak_teacher and "student" in inputs.shapes:
        raise WeakTeacher(
            f"the teacher is too weak to distil: validation macro-F1 {scores['f1']:.4f} is under --min_teacher_f1 "
            f"{config.min_teacher_f1:g}. Train it longer (--teacher_epochs, --lr), or go on with --allow_weak_teacher."
        )


def prepare_targets(teacher: Teacher, rows: NDArray[np.int64], context: RunContext) -> tuple[TeacherTargets, dict[str, Any]]:
    """Return what answers for the teacher while the student trains on some rows, and what its batches must carry.

    Layers are read from the cache while they fit --cache_budget_gb; past it the teacher runs live.
    """
    config, shapes, tokens, runtime = context.inputs.config, context.inputs.shapes, context.tokens, context.runtime
    assert tokens.teacher is not None and tokens.student is not None
    logits = compute_logits(teacher, rows, context)
    comparison = compare_layers(config, shapes["teacher"], shapes["student"])
    if comparison is None:
        return KeptTeacher(teacher.shape, logits, device=runtime.device), {}
    layers = comparison.teacher
    carried = {"words": tokens.words}
    for_teacher = carried | {"teacher_tokens": None if tokens.words is None else tokens.teacher}
    # A word has at least one token, so the tokens bound the positions of both paths from above.
    size_gb = estimate_bytes(layers, tokens.teacher.lengths[rows], teacher.shape.hidden_size) / 1e9
    if size_gb > config.cache_budget_gb:
        log.info(
            "the teacher runs live: its layers would take %.2f GB of cache, over --cache_budget_gb %g",
            size_gb,
            config.cache_budget_gb,
        )
        return LiveTeacher(teacher.model, runtime.device, layers, logits), for_teacher
    loader = context.evaluation_batches(rows, tokens.student, **for_teacher)
    store = fetch_layers(teacher, layers, loader, runtime.device, runtime.cache)
    return KeptTeacher(teacher.shape, logits, store, runtime.device), carried
