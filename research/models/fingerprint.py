"""A model's files: where they are, what they hold, and whether they are still what they were (no torch).

Weights are large, so files are hashed once. As long as their sizes, times and inodes stay, they count as
unchanged; a file where any of these moved is hashed again, and only another hash is a change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from research.errors import InputError, first_line
from research.storage.files import Stamp, hash_file, stamp_file

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt"})
SUFFIXES = WEIGHT_SUFFIXES | {".json", ".txt", ".model"}
# Where loading looks below a model's folder; other folders, as a trainer's checkpoints, are no part of it.
SUBFOLDERS = ("", "encoder", "sequence_classifier", "tokenizer")
# What the trainer of transformers leaves beside a model and loading never reads.
TRAINER_FILES = frozenset({"optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", "trainer_state.json"})
LOADS = 3
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class FileRecord:
    """The hash of a file, and its stamp from just before it was hashed."""

    sha256: str
    stamp: Stamp


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model that decide what it says.

    Args:
        name: The folder or hub name.
        weights: Whether its weights are among them; random ones need the configuration and tokenizer only.
        files: By path below the model's folder.
    """

    name: str
    weights: bool = True
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    @property
    def sha256(self) -> dict[str, str]:
        """Each file's digest by its name."""
        return {file: record.sha256 for file, record in self.files.items()}

    def changed_since(self, earlier: Mapping[str, FileRecord]) -> list[str]:
        """Return the files that hold other bytes than before, are gone, or are new."""
        # The hub's cache gains files of the same model as they are asked for.
        compared = self.files.keys() | earlier.keys() if Path(self.name).expanduser().is_dir() else earlier.keys()
        before = {file: record.sha256 for file, record in earlier.items()}
        return sorted(file for file in compared if self.sha256.get(file) != before.get(file))

    def describe(self) -> dict[str, Any]:
        """Return it as JSON values, to be read by `read_records`."""
        files = {file: {"sha256": record.sha256, **record.stamp._asdict()} for file, record in self.files.items()}
        return {"name": self.name, "files": files}


def read_records(described: Any) -> dict[str, FileRecord]:
    """Return the files of what `ModelFiles.describe` gave; none when it holds something else."""
    try:
        return {
            file: FileRecord(values["sha256"], Stamp(**{name: values[name] for name in Stamp._fields}))
            for file, values in described["files"].items()
        }
    except (AttributeError, LookupError, TypeError):
        return {}


def find_model_folder(name: str) -> Path | None:
    """Return the folder that holds a model's files on this machine, None when there is none; asks no network."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    # Takes a tenth of a second, which nobody with a folder has to pay.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path of a folder that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


def resolve_model_folder(name: str, *, weights: bool = True) -> Path:
    """Return the folder that holds a model's files, fetching them from the hub when need be.

    Raises:
        InputError: there is no such model, or it has no weights and they are asked for.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from transformers.utils import cached_file  # as slow as the hub's library

    wanted = WEIGHT_FILES if weights else ("config.json",)
    for file in wanted:
        try:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise InputError(f"model '{name}': {first_line(error)}") from error
        if found is not None:
            return Path(found).parent
    raise InputError(f"model '{name}': no weights found (looked for {', '.join(wanted)})")


def list_model_files(folder: Path, *, weights: bool = True) -> dict[str, Path]:
    """Return the files that loading a model may read, by path below its folder; links are followed."""
    suffixes = SUFFIXES if weights else SUFFIXES - WEIGHT_SUFFIXES
    paths = (path for name in SUBFOLDERS if (folder / name).is_dir() for path in (folder / name).iterdir())
    chosen = (path for path in paths if path.suffix in suffixes and path.name not in TRAINER_FILES and path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in sorted(chosen)}


def read_model_files(
    name: str, *, folder: Path | None = None, weights: bool = True, known: Mapping[str, FileRecord] | None = None
) -> ModelFiles:
    """Hash a model's files.

    Args:
        folder: Where they are, when that is known; else they are looked for, on the hub too.
        known: Hashes of earlier; taken over while the files' stamps are the same.

    Raises:
        InputError: there is no such model, or a file of it cannot be read.
    """
    folder = folder or resolve_model_folder(name, weights=weights)
    files = {}
    try:
        for file, path in list_model_files(folder, weights=weights).items():
            stamp, earlier = stamp_file(path), (known or {}).get(file)
            files[file] = earlier if earlier and earlier.stamp == stamp else FileRecord(_hash_once(path, stamp), stamp)
    except OSError as error:
        raise InputError(f"model '{name}': {error.filename} cannot be read: {error.strerror}") from error
    return ModelFiles(name, weights, files)


@functools.lru_cache(maxsize=256)
def _hash_once(path: Path, _stamp: Stamp) -> str:
    """Hash a file; a process that runs many trainings on one model hashes it for the first only."""
    return hash_file(path)


def check_unchanged(files: ModelFiles) -> None:
    """Make sure that what was just loaded of a model is what was hashed before.

    Raises:
        InputError: its files have changed since.
    """
    changed = read_model_files(files.name, weights=files.weights).changed_since(files.files)
    if changed:
        raise _changing(files.name, changed)


def load_settled(name: str, load: Callable[[], Loaded]) -> tuple[Loaded, ModelFiles]:
    """Load something of a model and hash its files, again when they changed in between, so that both belong together.

    Raises:
        InputError: they go on changing.
    """
    folder = find_model_folder(name)
    # What the hub's cache does not hold yet is fetched by loading it.
    files = None if folder is None else read_model_files(name, folder=folder)
    changed: list[str] = []
    for _ in range(LOADS):
        loaded = load()
        before, files = files, read_model_files(name)
        changed = [] if before is None else files.changed_since(before.files)
        if not changed:
            return loaded, files
    raise _changing(name, changed)


def _changing(name: str, changed: list[str]) -> InputError:
    return InputError(
        f"model '{name}': {', '.join(changed[:3])} changed while the run was reading it. Run the same command again when "
        "nothing writes to it any more."
    )
