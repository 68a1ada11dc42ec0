"""The teachers of a run: taken from checkpoints or fine-tuned once, judged, and asked about every row."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from research.errors import TrainingFault, WeakTeacher
from research.evaluation.calibration import sigmoid
from research.evaluation.efficiency import count_parameters
from research.evaluation.metrics import compute_metrics, keep_spoken
from research.evaluation.thresholds import DEFAULT_THRESHOLD
from research.experiment.context import RunContext
from research.experiment.inputs import Inputs, TeacherSource, hash_rows
from research.experiment.runtime import Runtime
from research.experiment.search import Trial, in_trial, search
from research.experiment.seen_texts import read_seen, storing_seen
from research.experiment.tfidf_teacher import get_tfidf_answers
from research.experiment.training import summarize, train
from research.experiment.view_stage import pad_to_views
from research.kd.ensemble import Ensemble, average_logits, logits_of_probs
from research.kd.layers import compare_layers
from research.kd.loop import TrainingResult
from research.kd.targets import KeptTeacher, LiveTeacher, TeacherTargets
from research.kd.teacher import Teacher, estimate_bytes, fetch_layers, fetch_logits
from research.models.classifiers import TeacherModel, TextClassifier
from research.models.cutting import find_layers
from research.models.encoders import load_encoder
from research.models.fingerprint import check_unchanged
from research.models.saved import is_former, load_classifier, save_classifier
from research.names import PARTS, TEACHER_TABLE, TEACHER_TFIDF
from research.runs.directory import RunDirectory
from research.sharding import collect, shard
from research.storage.arrays import release_pages
from research.storage.cache import MANIFEST
from research.storage.checkpoints import CheckpointFolder
from research.storage.files import copy_folder, remove
from research.text.tokens import Tokens, fingerprint_tokenizer
from research_config import ExperimentConfig, settings_that_decide
from research_data import compute_class_weights
from research_distillation import DistillationTrainer, score_teacher

log = logging.getLogger(__name__)
# Part of the cache keys: raise it when the files of an entry change.
TEACHERS_FORMAT = 3
Place = Callable[[TextClassifier], TextClassifier] | None
Model = TypeVar("Model", bound=TextClassifier)


def get_teachers(context: RunContext) -> Ensemble:
    """Return the teachers of --teacher_checkpoint or the fine-tuned ones, with a table's answers and those of n-grams."""
    members: dict[str, Teacher] = {}
    for source in context.inputs.teachers:
        if source.checkpoint is not None or not context.inputs.config.search:
            members[source.name] = get_teacher(source, context)
        elif not members:
            first = search_teacher(source, context)
            members[source.name] = first.model
        else:  # what was found for the first
            members[source.name] = get_teacher(source, in_trial(context, first.settings))
    answers, answering = {}, {}
    if (table := context.inputs.teacher_table) is not None:
        answers[TEACHER_TABLE] = logits_of_probs(pad_to_views(table.probs, context.inputs.comments))
        # Whoever made the table may have seen any text.
        answering[TEACHER_TABLE] = {"source": "table", "training_texts": "unknown"}
    if context.inputs.config.teacher_tfidf:
        answers[TEACHER_TFIDF], answering[TEACHER_TFIDF] = get_tfidf_answers(context)
    return Ensemble(members, answers, answering)


def search_teacher(source: TeacherSource, context: RunContext) -> Trial[Teacher]:
    """Return the teacher that --search chose; each trial is in the cache where a run of its settings would look for it."""

    def try_out(trial: RunContext) -> Trial[Teacher]:
        teacher, rows = get_teacher(source, trial), trial.inputs.split.validation
        probs = sigmoid(compute_logits(teacher, trial.tokens.of_teacher(source.name), rows, trial))
        comments = trial.inputs.comments
        scores = compute_metrics(comments.labels[rows], probs, DEFAULT_THRESHOLD, comments.label_names)
        return Trial(teacher, scores[trial.inputs.config.select_by], teacher.training)

    found = search("teacher", context, try_out)
    found.model.training = found.facts
    return found


def get_teacher(source: TeacherSource, context: RunContext) -> Teacher:
    """Return one teacher, of a checkpoint or fine-tuned."""
    device, num_processes = context.runtime.device, context.runtime.world.size
    place = partial(spread, device=device, num_processes=num_processes) if context.inputs.config.shard_teacher else None
    get = get_fine_tuned if source.checkpoint is None else get_checkpoint
    return get(source, place, context)


def get_checkpoint(source: TeacherSource, place: Place, context: RunContext) -> Teacher:
    """Return a teacher of --teacher_checkpoint."""
    inputs, checkpoint = context.inputs, source.checkpoint
    assert checkpoint is not None
    return Teacher(
        identify_checkpoint(source, inputs),
        source.shape,
        # A copy where it is sharded in place: the one that was opened is saved.
        lambda: copy.deepcopy(checkpoint.model) if inputs.config.shard_teacher else checkpoint.model,
        storing_seen(
            lambda folder: save_classifier(checkpoint.model.cpu(), checkpoint.tokenizer, folder, inputs.model_settings),
            read_seen(source.files.name),
        ),
        {"source": "checkpoint", "training_texts": source.seen},
        count_parameters(checkpoint.model)["parameters_total"],
        place,
    )


def get_fine_tuned(source: TeacherSource, place: Place, context: RunContext) -> Teacher:
    """Return a teacher that the run fine-tunes, from the cache when it is there."""
    inputs = context.inputs

    def build(folder: Path, scratch: Path) -> None:
        try:
            tuned = fine_tune(source, context, scratch)
        except (TrainingFault, FloatingPointError) as fault:
            if context.trial and fault.__cause__ is None:  # as `search` leaves it out: nobody will look into its checkpoints
                remove(scratch)
            raise
        store_teacher(*tuned, source, context, folder)

    runtime = context.runtime
    name = context.name_training(source.name)
    num_processes = find_num_processes(source, inputs, runtime, context.run_dir, name)
    key = teacher_key(source, inputs, runtime, num_processes)
    folder = runtime.cache.fetch("teachers", key, build, join=lambda scratch: fine_tune(source, context, scratch))
    if not inputs.config.prepare_only:
        runtime.world.lead(lambda: context.run_dir.keep_num_processes(name, num_processes))

    def load() -> TextClassifier:
        model = load_classifier(str(folder / "model"), inputs.comments.label_names).model
        context.runtime.cache.check_unchanged(folder)
        return model

    def store(target: Path) -> None:
        if is_former(folder / "model"):  # of a cache that was filled before folders had this form
            storing_seen(
                lambda place: save_classifier(load(), source.tokenizer, place, inputs.model_settings),
                read_seen(folder / "model"),
            )(target)
        else:
            copy_folder(folder / "model", target)

    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return Teacher(
        identify_entry(folder),
        source.shape,
        load,
        store,
        facts["training"],
        facts["parameters"],
        place,
    )


def spread(model: Model, device: torch.device, num_processes: int) -> Model:
    """Shard a teacher over the processes of a run, layer by layer where its layers are in a list."""
    encoder: Any = model.encoder
    name = find_layers(encoder)
    if name is None:
        log.warning(
            "warning: --shard_teacher: the layers of a %s model are in no list of their number, so each process holds all of "
            "its parameters while it runs",
            encoder.config.model_type,
        )
    blocks = [encoder.get_input_embeddings(), *(() if name is None else encoder.get_submodule(name))]
    return shard(model, blocks, device, num_processes)


def identify_checkpoint(source: TeacherSource, inputs: Inputs) -> dict[str, Any]:
    """Return what identifies a teacher of --teacher_checkpoint."""
    assert source.checkpoint is not None
    return {
        "files": source.files.sha256,
        "labels": list(inputs.comments.label_names),
        # That of the flag, where the files do not say.
        "pooling": getattr(source.checkpoint.model, "pooling", None),
    }


def identify_entry(folder: Path) -> dict[str, Any]:
    """Return what identifies a fine-tuned teacher, by its folder in the cache."""
    return {"files": json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]}


def find_num_processes(source: TeacherSource, inputs: Inputs, runtime: Runtime, run_dir: RunDirectory, name: str) -> int:
    """Return on how many processes a teacher of the run is fine-tuned.

    Those of now, but a run that goes on with others keeps the teacher it began with.

    Args:
        name: What its training is known by.
    """

    def find() -> int:
        kept = run_dir.kept_num_processes(name)
        if kept is None or runtime.cache.find("teachers", teacher_key(source, inputs, runtime, kept)) is None:
            return runtime.world.size
        return kept

    return runtime.world.lead(find)


def seeded_config(source: TeacherSource, config: ExperimentConfig) -> ExperimentConfig:
    """Return the config by which a teacher is fine-tuned: as the only one and only trial, with its seed as --split_seed."""
    assert source.seed is not None
    return dataclasses.replace(config, split_seed=source.seed, search=())


def teacher_key(source: TeacherSource, inputs: Inputs, runtime: Runtime, num_processes: int) -> dict[str, Any]:
    """Return everything a fine-tuned teacher's bytes depend on."""
    comments, split, start = inputs.comments, inputs.split, inputs.start_seen.get("teacher")
    # A start that has seen labels hands its texts on; a pretrained one leaves the key as it is.
    seen = {} if start is None or start.hashes is None else {"seen": hashlib.sha256(start.hashes.tobytes()).hexdigest()}
    # Sums of several processes end in other last digits; of one process the key says nothing.
    together = {"processes": num_processes} if num_processes > 1 else {}
    return (
        seen
        | together
        | {
            "model": source.files.sha256,
            "tokenizer": fingerprint_tokenizer(source.tokenizer),
            "settings": inputs.model_settings,
            "rows": {part: hash_rows(comments, getattr(split, part)) for part in ("train", "validation")},
            "training": settings_that_decide(seeded_config(source, inputs.config), "teacher"),
            "device": runtime.device.type,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "format": TEACHERS_FORMAT,
        }
    )


def fine_tune(source: TeacherSource, context: RunContext, scratch: Path) -> tuple[TeacherModel, TrainingResult]:
    """Fine-tune a teacher on the labels; it ends with the weights of its best epoch. Its checkpoints go to `scratch`.

    The model is whole in the first process; in the others of a run with --shard_teacher it has no use.
    """
    inputs, tokens = context.inputs, context.tokens.of_teacher(source.name)
    config = seeded_config(source, inputs.config)
    config = dataclasses.replace(config, epochs=config.teacher_epochs, seed=config.split_seed, freeze_student_encoder=False)
    which = f" as {source.name}, seed {config.seed}," if len(inputs.teachers) > 1 else ""
    log.info("fine-tuning the teacher %s%s on %d rows", config.teacher_path, which, len(inputs.split.train))
    encoder = load_encoder(config.teacher_path)
    check_unchanged(source.files)
    torch.manual_seed(config.seed)
    num_labels = len(inputs.comments.label_names)
    model = TeacherModel(num_labels=num_labels, dropout=config.dropout, pooling=config.pooling, encoder=encoder)
    world = context.runtime.world
    whole = copy.deepcopy(model) if config.shard_teacher and world.rank == 0 else model
    if config.shard_teacher:
        spread(model, context.runtime.device, world.size)
    trainer = DistillationTrainer(None, model, config, context.runtime.device, world=world)
    loader = context.training_batches(inputs.split.train, tokens, config.seed)
    checkpoints = CheckpointFolder(scratch, world=world, of_each=config.shard_teacher)
    result = train(source.name, trainer, loader, checkpoints, context)
    if config.shard_teacher and (state := collect(model, keep=world.rank == 0)):
        whole.load_state_dict(state)
    return whole, result


def store_teacher(model: TeacherModel, result: TrainingResult, source: TeacherSource, context: RunContext, folder: Path) -> None:
    """Leave a fine-tuned teacher and the facts of its training in a folder of the cache."""
    inputs = context.inputs
    start = inputs.start_seen.get("teacher")
    store = storing_seen(
        lambda target: save_classifier(model.cpu(), source.tokenizer, target, inputs.model_settings),
        inputs.comments.text_hash[inputs.split.train],
        *([] if start is None else [start.hashes]),
    )
    store(folder / "model")
    facts = {"training": summarize(result), "parameters": count_parameters(model)["parameters_total"]}
    (folder / "training.json").write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def compute_logits(teacher: Teacher, tokens: Tokens, rows: NDArray[np.int64], context: RunContext) -> NDArray[np.float32]:
    """Return a teacher's logits of some rows, (N, C) in their order, from its own tokens."""
    return fetch_logits(teacher, context.evaluation_batches(rows, tokens), context.runtime.device, context.runtime.cache)


def ask_teachers(teachers: Ensemble, rows: NDArray[np.int64], context: RunContext) -> dict[str, NDArray[np.float32]]:
    """Return each teacher's logits of some rows by its name, (N, C), nan where it says nothing."""
    logits = {
        name: compute_logits(member, context.tokens.of_teacher(name), rows, context) for name, member in teachers.members.items()
    }
    return logits | {name: answers[rows] for name, answers in teachers.answers.items()}


@dataclass(frozen=True, eq=False)
class TeacherAnswers:
    """What the teachers say of validation and test, as logits (N, C) by part.

    Attributes:
        single: Those of each teacher, by its name.
        together: Those of the mean of their probabilities; nan where none says anything.
        softened: Those whose softened probabilities are the mean of the softened ones, at --kd_temperature.
    """

    single: Mapping[str, Mapping[str, NDArray[np.float32]]]
    together: Mapping[str, NDArray[np.float32]]
    softened: Mapping[str, NDArray[np.float32]]

    @property
    def complete(self) -> bool:
        """Whether there is an answer to every cell, so that the teachers can be scored as other models are."""
        return not any(np.isnan(logits).any() for logits in self.together.values())


def judge_teachers(teachers: Ensemble, context: RunContext) -> TeacherAnswers:
    """Return the teachers' answers on validation and test.

    Validation comes first: teachers too weak to learn from are told before they have been asked about anything else.

    Raises:
        WeakTeacher: macro-F1 at 0.5 of all together is under --min_teacher_f1 and --allow_weak_teacher was not given.
    """
    single: dict[str, dict[str, NDArray[np.float32]]] = {}
    together, softened = {}, {}
    for part in PARTS:
        with context.runtime.timed("teacher_outputs"):
            kept = ask_teachers(teachers, getattr(context.inputs.split, part), context)
        for name, logits in kept.items():
            single.setdefault(name, {})[part] = np.array(logits)
            release_pages(logits)
        of_part = [parts[part] for parts in single.values()]
        together[part] = average_logits(of_part, 1.0)
        softened[part] = soften_together(of_part, context.inputs)
        if part == "validation":
            verify_teacher(sigmoid(together[part]), context.inputs)
    return TeacherAnswers(single, together, softened)


def soften_together(logits: Sequence[NDArray[np.float32]], inputs: Inputs) -> NDArray[np.float32]:
    """Return the logits, (N, C), whose softened probabilities are the mean of the teachers' at --kd_temperature."""
    config, comments = inputs.config, inputs.comments
    shift: NDArray[np.float32] | float = 0.0
    if config.undo_class_weights:
        shift = np.log(compute_class_weights(comments.labels[inputs.split.train], comments.label_names)[0])
    return average_logits(logits, config.kd_temperature, shift)


def verify_teacher(probs: NDArray[np.float64], inputs: Inputs) -> None:
    """Stop before any distillation when the teacher is too weak to learn from.

    Args:
        probs: (N, C) of the validation part, nan where a table says nothing: those cells are left out.

    Raises:
        WeakTeacher: macro-F1 at 0.5 is under --min_teacher_f1 and --allow_weak_teacher was not given.
    """
    config = inputs.config
    if np.isnan(probs).all():
        log.warning("warning: the teacher has no probabilities of validation rows, so --min_teacher_f1 cannot judge it")
        return
    labels, spoken = keep_spoken(inputs.comments.labels[inputs.split.validation], probs)
    strong_enough, scores = score_teacher(labels, spoken, config.min_teacher_f1)
    log.info("teacher: validation macro-F1 %.4f", scores["f1"])
    if not strong_enough and not config.allow_weak_teacher and "student" in inputs.shapes:
        raise WeakTeacher(
            f"the teacher is too weak to distil: validation macro-F1 {scores['f1']:.4f} is under --min_teacher_f1 "
            f"{config.min_teacher_f1:g}. Train it longer (--teacher_epochs, --lr), or go on with --allow_weak_teacher."
        )


def prepare_targets(teachers: Ensemble, rows: NDArray[np.int64], context: RunContext) -> tuple[TeacherTargets, dict[str, Any]]:
    """Return what answers for the teachers while the student trains on some rows, and what its batches must carry.

    Layers are the first teacher's. They are read from the cache while they fit --cache_budget_gb; past it that
    teacher runs live.
    """
    config, tokens, runtime = context.inputs.config, context.tokens, context.runtime
    voices = list(ask_teachers(teachers, rows, context).values())
    # A single model's stay where they are, on the disk.
    logits = voices[0] if len(voices) == 1 else soften_together(voices, context.inputs)
    comparison = compare_layers(config, teachers.shape, context.inputs.shapes["student"])
    if comparison is None:
        partial = not teachers.members and bool(np.isnan(logits).any())
        return KeptTeacher(teachers.shape, logits, device=runtime.device, partial=partial), {}
    teacher, layers = teachers.first, comparison.teacher
    assert teacher is not None and tokens.teacher is not None and tokens.student is not None
    carried = {"words": tokens.words}
    for_teacher = carried | {"teacher_tokens": None if tokens.words is None else tokens.teacher}
    # A word has at least one token, so the tokens bound the positions of both paths from above.
    size_gb = estimate_bytes(layers, tokens.teacher.lengths_of(rows), teacher.shape.hidden_size) / 1e9
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
