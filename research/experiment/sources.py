"""The models that a run is made from, and whether they are still those of a finished one (no torch)."""

from __future__ import annotations

from research.errors import InputError
from research.models.fingerprint import find_model_folder, read_model_files, read_records
from research.runs.directory import RunDirectory
from research.runs.formats import dig, read_json
from research_config import PIPELINES, ExperimentConfig


def name_models(config: ExperimentConfig) -> dict[str, str]:
    """Return the folder or hub name of each model that a run of this config loads, by side."""
    parts = PIPELINES[config.pipeline]
    names = {}
    if parts.teacher:
        names["teacher"] = config.teacher_checkpoint or config.teacher_path
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
        weights = side == "teacher" or config.student_init == "pretrained"
        changed = read_model_files(name, folder=folder, weights=weights, known=recorded).changed_since(recorded)
        if changed:
            raise InputError(
                f"{run_dir.path} was made from other files of the {side} {name} ({', '.join(changed[:3])}). "
                "Use another --output_dir, or --overwrite to run on the model as it is now."
            )
