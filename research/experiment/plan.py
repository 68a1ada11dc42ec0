"""What is said of a run before it begins: where it computes, what the cache holds already, and what is to be computed."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version

import torch

from research.experiment.announce import count
from research.experiment.inputs import Inputs, TeacherSource
from research.experiment.runtime import Runtime, machine_name
from research.experiment.teacher_stage import find_num_processes, identify_checkpoint, identify_entry, teacher_key
from research.experiment.tfidf_teacher import answers_key
from research.experiment.tokenised import token_keys
from research.experiment.view_stage import find_views, has_views, name_views, training_rows
from research.kd.teacher import output_key
from research.names import PARTS
from research.runs.directory import RunDirectory
from research.settings.search import list_trials, settle_search
from research.storage.cache import digest_key
from research_config import PIPELINES, ExperimentConfig, saved_settings
from research_distillation import choose_autocast_dtype


def describe_process(inputs: Inputs, runtime: Runtime) -> dict[str, str]:
    """Return what must be the same in every process of a run, by what it is called."""
    return {
        "--dataset_path": digest_key(inputs.comments.file_sha256)[:12],
        "models": digest_key({side: files.sha256 for side, files in inputs.model_files.items()})[:12],
        "flags": digest_key(saved_settings(inputs.config))[:12],
        "device": f"{runtime.device.type}, {count(torch.get_num_threads(), 'thread')}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy")),
    }


def describe_plan(inputs: Inputs, runtime: Runtime) -> list[str]:
    """Return a line for the machine, one for what is there already and one for what is to be computed."""
    config = inputs.config
    dtype = choose_autocast_dtype(config, runtime.device)
    precision = "float32" if dtype is None else f"{str(dtype).removeprefix('torch.')} mixed precision"
    threads = count(torch.get_num_threads(), "thread")
    machine = f"{runtime.device} ({machine_name(runtime.device)}), {precision}, {threads}"
    if runtime.world.size > 1:
        machine += f" in each of {runtime.world.size} processes"
    steps = list_steps(inputs, runtime)
    there = ", ".join(name for name, is_there in steps if is_there)
    return [
        f"device: {machine}",
        f"there already: {there or 'nothing'}",
        f"to compute: {', '.join(name for name, is_there in steps if not is_there) or 'nothing'}",
    ]


def list_steps(inputs: Inputs, runtime: Runtime) -> list[tuple[str, bool]]:
    """Return what the run needs in the order it is made, and whether it is there already.

    The layers of a teacher are left out: whether they are kept at all is known once the texts are tokens.
    """
    config, split, cache = inputs.config, inputs.split, runtime.cache
    pipeline, steps = PIPELINES[config.pipeline], list[tuple[str, bool]]()
    if has_views(inputs):
        found = find_views(inputs, runtime)
        steps = [(name_views(inputs), found is not None)]
        inputs = inputs if found is None else found
    known = bool(inputs.views) or not steps  # whether all texts are, so that what is made of them can be looked for
    keys = token_keys(inputs)
    distinct = {digest_key(key): (side, key) for side, key in reversed(keys.items())}
    steps += [
        ("tokens" if len(distinct) == 1 else f"the {side}'s tokens", known and cache.find("tokens", key) is not None)
        for side, key in reversed(distinct.values())
    ]
    train = count(len(split.train), "row")
    if inputs.teachers:
        identities = {source.name: find_teacher(source, inputs, runtime) for source in inputs.teachers}
        for source in inputs.teachers:
            name, is_there = source.name.replace("_", " "), identities[source.name] is not None
            told = f"{name} of --teacher_checkpoint" if source.checkpoint is not None else name
            length = describe_length("teacher", config)
            if source is not inputs.teachers[0] and "trials" in length:
                length = "one training"  # with what was found for the first
            steps.append((told if is_there else f"{name} ({length} of {train})", is_there))
        rows = [getattr(split, part) for part in PARTS]
        if pipeline.student:
            rows.append(training_rows(inputs)[0])
        missing = sum(
            len(part)
            for name, identity in identities.items()
            for part in rows
            if not known
            or cache.find("logits", output_key(identity or {}, digest_key(keys.get(name, keys["teacher"])), part, runtime.device))
            is None
        )
        missing += 0 if known else config.augment * len(split.train) * len(identities)
        steps.append((f"teacher outputs of {count(missing, 'row')}" if missing else "teacher outputs", not missing))
    if pipeline.teacher and config.teacher_tfidf:
        fits = known and cache.find("tfidf_teachers", answers_key(inputs)) is not None
        steps.append(("answers of character n-grams", fits))
    return [*steps, *list_trainings(inputs)]


def list_trainings(inputs: Inputs) -> list[tuple[str, bool]]:
    """Return what is trained after the teachers, none of which is kept for another run."""
    config, split, pipeline = inputs.config, inputs.split, PIPELINES[inputs.config.pipeline]
    train, length, trained = len(split.train), describe_length("student", config), []
    if pipeline.student:
        learned = train + (len(split.unlabelled) if pipeline.teacher else 0)
        trained.append(f"student ({length} of {count(learned, 'row')})")
    if pipeline.tfidf:
        trained.append(f"logistic regression on character n-grams of {count(train, 'row')}")
    if config.with_control:
        learned = train + (len(split.unlabelled) if config.control_labels == "pseudo" else 0)
        trained.append(f"control ({length} of {count(learned, 'row')})")
    return [(told, False) for told in trained]


def describe_length(model: str, config: ExperimentConfig) -> str:
    """Return how long a training is at most, as in "at most 8 epochs", or how many trials there are of it."""
    trials = list_trials(config, model)
    if len(trials) > 1:
        return f"{len(trials)} trials"
    settled = settle_search(config, model)
    return f"at most {count(settled.teacher_epochs if model == 'teacher' else settled.epochs, 'epoch')}"


def find_teacher(source: TeacherSource, inputs: Inputs, runtime: Runtime) -> dict[str, object] | None:
    """Return what identifies a teacher of the run, None while it has to be fine-tuned."""
    if source.checkpoint is not None:
        return identify_checkpoint(source, inputs)
    if len(list_trials(inputs.config, "teacher")) > 1:  # which it will be, its search finds out
        return None
    inputs = dataclasses.replace(inputs, config=settle_search(inputs.config, "teacher"))
    num_processes = find_num_processes(source, inputs, runtime, RunDirectory(inputs.config.run_dir), source.name)
    entry = runtime.cache.find("teachers", teacher_key(source, inputs, runtime, num_processes))
    try:
        return None if entry is None else identify_entry(entry)
    except (OSError, json.JSONDecodeError, KeyError):  # a damaged entry, which is made again
        return None
