"""Which texts a saved model was trained on, so that no run tests a model on what it has learned by heart."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError
from research.models.saved import find_settings
from research.storage.arrays import write_npy
from research_config import ExperimentConfig
from research_data import Comments, Split

log = logging.getLogger(__name__)

SEEN_FILE = "training_texts.npy"
TextHashes = NDArray[np.uint64]
Known = Literal["known", "unknown"]


def write_seen(folder: Path, *hashes: TextHashes) -> None:
    """Leave the hashes of the texts that a model learned from beside it, each once and sorted."""
    write_npy(folder / SEEN_FILE, np.unique(np.concatenate(hashes)))


def read_seen(folder: str | Path) -> TextHashes | None:
    """Return the hashes of the texts that a saved model learned from, None when it does not say.

    Raises:
        InputError: the file is damaged.
    """
    path = Path(folder).expanduser() / SEEN_FILE
    if not path.is_file():
        return None
    try:
        seen = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}. Copy the model's folder again.") from error
    if seen.dtype != np.uint64 or seen.ndim != 1:
        raise InputError(f"{path} holds no hashes of texts. Copy the model's folder again.")
    return seen


@dataclass(frozen=True, eq=False)
class SeenTexts:
    """The texts that a model which a flag names learned labels from.

    `hashes` is None where it does not say, or says it of texts that were normalised in another way.
    """

    flag: str
    name: str
    hashes: TextHashes | None


def seen_by_checkpoint(name: str, settings: dict[str, object], config: ExperimentConfig) -> SeenTexts:
    """Return the texts of a --teacher_checkpoint.

    Args:
        settings: What the checkpoint says of itself.
    """
    # Hashes are of normalised texts, so those of another normalisation cannot be compared.
    comparable = settings.get("text_normalization") == config.text_normalization
    return SeenTexts("teacher_checkpoint", name, read_seen(name) if comparable else None)


def seen_by_start(flag: str, config: ExperimentConfig) -> SeenTexts | None:
    """Return the texts of a model that training starts from, when it is a run's; a pretrained encoder knows no labels."""
    name = getattr(config, flag)
    settings = find_settings(Path(name).expanduser(), name)
    return None if settings is None else dataclasses.replace(seen_by_checkpoint(name, settings, config), flag=flag)


def part_from_seen(seen: SeenTexts, config: ExperimentConfig, comments: Comments, split: Split) -> tuple[Split, Known]:
    """Return a split whose validation and test part hold no text that a model was trained on.

    Raises:
        InputError: there are such texts and --drop_seen_rows was not given, or leaving them out empties a part.
    """
    flag, name = seen.flag, seen.name
    if seen.hashes is None:
        log.warning(
            "warning: --%s %s does not say which texts it was trained on; if texts of the test part were "
            "among them, its scores are too high, and so are the student's",
            flag,
            name,
        )
        return split, "unknown"
    kept: dict[str, NDArray[np.int64]] = {}
    for part in ("validation", "test"):
        rows = getattr(split, part)
        kept[part] = rows[~np.isin(comments.text_hash[rows], seen.hashes)]
    known = {part: len(getattr(split, part)) - len(rows) for part, rows in kept.items()}
    if not any(known.values()):
        return split, "known"
    found = f"was trained on the texts of {known['test']} of {len(split.test)} test rows and {known['validation']} of "
    found += f"{len(split.validation)} validation rows"
    if not config.drop_seen_rows:
        raise InputError(
            f"--{flag}: {name} {found}. Split as its own run did (--split_seed, --val_fraction, --test_fraction), "
            "leave those rows out with --drop_seen_rows, or let --teacher_path fine-tune a teacher for this split."
        )
    if empty := [part for part, rows in kept.items() if not len(rows)]:
        raise InputError(f"--drop_seen_rows: leaves no {empty[0]} rows: {name} {found}. Use another teacher or split.")
    log.warning("warning: --%s %s %s; they are left out", flag, name, found)
    return dataclasses.replace(split, validation=kept["validation"], test=kept["test"]), "known"


def storing_seen(store: Callable[[Path], None], *hashes: TextHashes | None) -> Callable[[Path], None]:
    """Return a function that stores a model and, unless some of it is unknown, the texts it learned from."""

    def store_both(folder: Path) -> None:
        store(folder)
        known = [entry for entry in hashes if entry is not None]
        if len(known) == len(hashes):
            write_seen(folder, *known)

    return store_both
