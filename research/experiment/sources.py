"""The models that a run is made from, and whether they are still those of a finished one (no torch)."""

from __future__ import annotations

from pathlib import Path

from research.errors import InputError
from research.models.fingerprint import find_model_folder, read_model_files, read_records
from research.runs.directory import RunDirectory, find_teachers, teacher_name
from research.runs.formats import dig, read_json
from research_config import PIPELINES, ExperimentConfig


def list_checkpoints(config: ExperimentConfig) -> list[str]:
    """Return the folder or hub name of each teacher of --teacher_checkpoint; a run's own folder stands for all of its teachers.

    Raises:
        InputError: a run's folder holds no teacher, or a teacher is named twice.
    """
    names: list[str] = []
    for name in config.checkpoints:
        folder = Path(name).expanduser()
        if RunDirectory(folder).status() not in ("unfinished", "finished"):
            names.append(name)
            continue
        found = [str(teacher) for teacher in find_teachers(folder)]
        if not found:
            raise InputError(
                f"--teacher_checkpoint: {name} is the folder of a run without teacher/. Name the folder of a model, as that of "
                "a fold (fold_1/teacher), or a run's student/."
            )
        names += found
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--teacher_checkpoint: {repeated[0]} is given twice")
    return names


def name_models(config: ExperimentConfig) -> dict[str, str]:
    """Return the folder or hub name of each model that a run of this config loads, by side."""
    parts = PIPELINES[config.pipeline]
    names = {}
    if parts.teacher and config.checkpoints:
        names = {teacher_name(number): name for number, name in enumerate(list_checkpoints(config), 1)}
    elif parts.teacher and config.num_fine_tuned:
        names["teacher"] = config.teacher_path
    if parts.student and config.student_init != "teacher":
        names["student"] = config.student_path
    return names


def check_models(run_dir: RunDirectory, config: ExperimentConfig) -> None:
    """Refuse to take a finished run for one of the models as they are now.

    A model that is not on this machine any more is no change: the run may have been copied here.

    Raises:
        InputError: a model of the run had other files, by the records in its environment.json.
    """
    models = dig(read_json(run_dir.path / "environment.json"), "models")
    for side, name in name_models(config).items():
        recorded, folder = read_records(dig(models, side)), find_model_folder(name)
        if not recorded or folder is None:
            continue
        weights = side != "student" or config.student_init == "pretrained"
        changed = read_model_files(name, folder=folder, weights=weights, known=recorded).changed_since(recorded)
        if changed:
            raise InputError(
                f"{run_dir.path} was made from other files of the {side} {name} ({', '.join(changed[:3])}). "
                "Use another --output_dir, or --overwrite to run on the model as it is now."
            )
