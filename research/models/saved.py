"""Classifiers on disk, in the forms that users have them."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from research.errors import InputError
from research.models.attention import RECORDED_SDPA
from research.models.classifiers import EncoderClassifier, SequenceClassifier, TextClassifier
from research.models.cutting import sample_ids
from research.models.encoders import check_unexpected, load_encoder, load_model_config, load_pretrained, open_tokenizer
from research.models.folders import (
    CONFIG_FILE,
    HEAD_PREFIX,
    NATIVE,
    NGRAMS,
    NGRAMS_PREFIX,
    SETTINGS_KEY,
    WEIGHTS_FILE,
    is_plausible,
    read_own_config,
    read_own_weights,
    restore_tokenizer,
    write_own,
    write_stock,
    write_tokenizer,
)
from research.models.ngrams import NgramBranch
from research.models.reading import refusing

log = logging.getLogger(__name__)
SETTINGS_FILE = "classifier.json"
HEAD_FILES = ("classifier.safetensors", "head.safetensors", "classifier.pt", "head.pt", "classifier.bin", "head.bin")


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier read back from disk, with what is needed to use it."""

    model: TextClassifier
    tokenizer: Any
    settings: dict[str, Any]


def save_classifier(model: TextClassifier, tokenizer: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write a model as a folder of the Hugging Face hub (`research.models.folders`).

    One with its architecture's own head loads in transformers alone. One with this suite's head loads by
    `load_classifier`, and transformers refuses it.

    Args:
        settings: Kept in config.json beside the model's own: labels, thresholds, max_length,
            text_normalization.

    Raises:
        OSError: it could not be written, as on a full disk.
        InputError: what was written is another model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with raising_os_errors(folder):
        _write_classifier(model, tokenizer, folder, settings)
    check_saved(model, folder, settings["labels"])


def check_saved(model: TextClassifier, folder: Path, labels: Sequence[str]) -> None:
    """Load what was just saved and compare logits, since transformers may build another model of its files.

    Raises:
        InputError: it cannot be loaded, or gives other logits.
    """
    # Loading initialises what is not in the files, as the pooler, which must not change what is drawn later.
    with torch.random.fork_rng():
        loaded = load_classifier(str(folder), labels).model
    weight = next(model.parameters())
    ids, mask = (tensor.to(weight.device) for tensor in sample_ids(model.backbone_config))
    training = model.training
    with torch.no_grad():
        expected, found = (entry.eval()(ids, mask)["logits"] for entry in (model, loaded.to(weight.device, weight.dtype)))
    model.train(training)
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise InputError(
            f"{folder}: the {model.backbone_config.model_type} model saved there gives other logits (by "
            f"{float((found - expected).abs().max()):.2g}) than the one that was trained; use another model or --student_layers"
        )


def _write_classifier(model: TextClassifier, tokenizer: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    write_tokenizer(tokenizer, folder, settings)
    if isinstance(model, EncoderClassifier):
        first, dropout = model.classifier[0], model.classifier[2]
        assert isinstance(first, nn.Linear) and isinstance(dropout, nn.Dropout)
        own: dict[str, Any] = {"classifier_width": first.out_features, "dropout": dropout.p, "pooling": model.pooling}
        if (ngrams := model.ngrams) is not None:
            own[NGRAMS] = {"longest": ngrams.longest, "vocabulary": ngrams.vocabulary}
        write_own(model, folder, own | {"labels": list(settings["labels"])} | dict(settings))
    else:
        assert isinstance(model, SequenceClassifier)
        write_stock(model.model, folder, ({"pooling": NATIVE} if model.first_is_enough else {}) | dict(settings))


@contextmanager
def raising_os_errors(folder: Path) -> Iterator[None]:
    """Turn the system's errors that safetensors and tokenizers hide in errors of their own back into OSError."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing more exact; what tells is the number in its text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def load_classifier(name: str, labels: Sequence[str] | None = None, *, pooling: str = "cls") -> SavedClassifier:
    """Load a fine-tuned classifier, its outputs in the order of `labels`, or in its own without them.

    Args:
        name: A folder written by `save_classifier`, of this version or one before, a folder with `encoder/` and a
            head file, or a folder or hub name of a fine-tuned AutoModelForSequenceClassification.
        pooling: Of an encoder and a head without settings beside them.

    Raises:
        InputError: the head is missing or of another size, or its labels are others.
    """
    folder = Path(name).expanduser()
    if (own := read_own_config(folder)) is not None:
        return load_own(folder, own, labels, name)
    if (folder / "sequence_classifier").is_dir():
        return load_sequence_classifier(str(folder / "sequence_classifier"), labels, name, folder / "tokenizer")
    if (folder / "encoder").is_dir():
        return load_encoder_and_head(folder, labels, name, pooling)
    return load_sequence_classifier(name, labels, name, None)


def is_former(folder: Path) -> bool:
    """Whether a version before this one wrote a classifier's folder, with its parts in folders below."""
    return not (folder / CONFIG_FILE).is_file()


def load_own(folder: Path, own: Mapping[str, Any], labels: Sequence[str] | None, where: str) -> SavedClassifier:
    """Load an encoder with the suite's own head from one file."""
    settings = own.get(SETTINGS_KEY)
    if not is_plausible(settings):
        raise InputError(f"{where}: {CONFIG_FILE} does not describe a classifier under {SETTINGS_KEY}")
    assert isinstance(settings, dict)
    with refusing(f"{where}: {WEIGHTS_FILE} cannot be read"):
        head = read_own_weights(folder, HEAD_PREFIX)
    check_head(head, where, WEIGHTS_FILE)
    model = join_head(load_encoder(str(folder)), head, settings, labels, where, "cls")
    if NGRAMS in settings:
        order = match_labels(head_labels(settings, len(head["3.bias"]), labels, where), labels, where)
        model.ngrams = load_ngrams(folder, settings[NGRAMS], order, where)
    tokenizer = open_tokenizer(folder, f"{where}: no tokenizer beside its weights")
    restore_tokenizer(tokenizer, settings)
    return SavedClassifier(model, tokenizer, settings)


def load_ngrams(folder: Path, sizes: Mapping[str, int], order: Sequence[int], where: str) -> NgramBranch:
    """Load the n-grams beside an encoder and a head, their outputs in this order.

    Raises:
        InputError: they are not there, or not of the sizes that the settings say.
    """
    with refusing(f"{where}: {WEIGHTS_FILE} does not hold the n-grams that its {CONFIG_FILE} tells of"):
        state = read_own_weights(folder, NGRAMS_PREFIX)
        branch = NgramBranch(len(state["codes"]), len(order), **sizes)
        branch.load_state_dict(state | {"weights": state["weights"][:, list(order)], "bias": state["bias"][list(order)]})
    return branch


def load_encoder_and_head(folder: Path, labels: Sequence[str] | None, where: str, pooling: str) -> SavedClassifier:
    """Load an encoder's folder with a head beside it, as versions before this one wrote them."""
    settings = read_settings(folder, where)
    head = read_head(folder, where)
    model = join_head(load_encoder(str(folder / "encoder")), head, settings, labels, where, pooling)
    places = (folder / "tokenizer", folder / "encoder", folder)
    tokenizer_folder = next((place for place in places if (place / "tokenizer_config.json").is_file()), folder)
    return SavedClassifier(model, open_tokenizer(tokenizer_folder, f"{where}: no tokenizer beside its weights"), settings)


def join_head(
    encoder: Any,
    head: dict[str, Tensor],
    settings: Mapping[str, Any],
    labels: Sequence[str] | None,
    where: str,
    pooling: str,
) -> EncoderClassifier:
    """Put a head's tensors on an encoder, its outputs in the order of `labels`.

    Args:
        pooling: Where the settings name none.
    """
    width = int(encoder.config.hidden_size)
    if head["0.weight"].shape[1] != width:
        raise InputError(f"{where}: its head takes vectors of {head['0.weight'].shape[1]}, its encoder gives {width}")
    order = match_labels(head_labels(settings, len(head["3.bias"]), labels, where), labels, where)
    head = head | {name: head[name][order] for name in ("3.weight", "3.bias")}
    pooling = settings.get("pooling", pooling)
    model = EncoderClassifier(encoder, len(order), settings.get("dropout", 0.1), len(head["0.bias"]), pooling)
    model.classifier.load_state_dict(head)
    return model


def head_labels(settings: Mapping[str, Any], outputs: int, labels: Sequence[str] | None, where: str) -> list[str]:
    """Return the label of each output of a head: as its settings say, else, with a warning, as `labels` do."""
    found = settings.get("labels")
    if found is None and labels is not None and len(labels) == outputs:
        log.warning("%s: its head names no labels; they are taken to be %s, in this order", where, ", ".join(labels))
        return list(labels)
    if found is None or len(found) != outputs:
        raise InputError(f"{where}: its head has {outputs} outputs for {len(found or labels or ())} labels")
    return list(found)


def find_settings(folder: Path, where: str) -> dict[str, Any] | None:
    """Return what a folder that a version of this suite wrote says of its classifier; None for any other folder.

    Raises:
        InputError: it says what cannot be.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # what is wrong with it, whoever loads the model tells
        config = None
    if not isinstance(config, dict) or SETTINGS_KEY not in config:
        return read_settings(folder, where) if (folder / SETTINGS_FILE).is_file() else None
    settings = config[SETTINGS_KEY]
    if not is_plausible(settings):
        raise InputError(f"{where}: {CONFIG_FILE} does not describe a classifier under {SETTINGS_KEY}")
    assert isinstance(settings, dict)
    return settings


def read_settings(folder: Path, where: str) -> dict[str, Any]:
    """Return what classifier.json says of a checkpoint, nothing when there is none."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return {}
    with refusing(f"{where}: {SETTINGS_FILE} cannot be read"):
        settings = json.loads(path.read_text(encoding="utf-8"))
    if not is_plausible(settings):
        raise InputError(f"{where}: {SETTINGS_FILE} does not describe a classifier")
    assert isinstance(settings, dict)
    return settings


def read_head(folder: Path, where: str) -> dict[str, Tensor]:
    """Read a head file: the tensors of Linear -> ReLU -> Dropout -> Linear, with or without a common prefix."""
    path = next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(
            f"{where}: no head beside encoder/ (looked for {', '.join(HEAD_FILES[:3])}, ...); a random one would be "
            "useless. Give the head, or use --teacher_path to fine-tune this encoder."
        )
    with refusing(f"{where}: {path.name} cannot be read"):
        head = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(head, dict) or not all(isinstance(tensor, Tensor) for tensor in head.values()):
        raise InputError(f"{where}: {path.name} holds no tensors by name; save the state_dict() of the head")
    head = {name.removeprefix("classifier.").removeprefix("head."): tensor for name, tensor in head.items()}
    check_head(head, where, path.name)
    return {name: tensor.float() for name, tensor in head.items()}


def check_head(head: Mapping[str, Tensor], where: str, file: str) -> None:
    """Check that tensors are those of Linear -> ReLU -> Dropout -> Linear.

    Raises:
        InputError: they are others, or do not fit each other.
    """
    expected = {"0.weight", "0.bias", "3.weight", "3.bias"}
    if set(head) != expected:
        raise InputError(
            f"{where}: {file} holds {', '.join(sorted(head)[:6]) or 'no head'}; expected {', '.join(sorted(expected))} "
            "(Linear, ReLU, Dropout, Linear)"
        )
    sizes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    first, last = sizes["0.weight"], sizes["3.weight"]
    fits = len(first) == len(last) == 2 and last[1] == first[0]
    if not (fits and sizes["0.bias"] == first[:1] and sizes["3.bias"] == last[:1]):
        raise InputError(f"{where}: {file}: the sizes of its tensors do not fit each other: {sizes}")


def load_sequence_classifier(
    name: str, labels: Sequence[str] | None, where: str, tokenizer_folder: Path | None
) -> SavedClassifier:
    """Load a classifier that transformers saved, with the outputs of the wanted labels."""
    config = load_model_config(name)
    settings = getattr(config, SETTINGS_KEY, {})
    if not is_plausible(settings):
        raise InputError(f"{where}: {CONFIG_FILE} does not describe a classifier under {SETTINGS_KEY}")
    with refusing(f"{where}: cannot be loaded as a fine-tuned classifier"):
        found = [str(config.id2label[place]) for place in sorted(config.id2label)]
        model, report = load_pretrained(AutoModelForSequenceClassification, name)
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{where}: has no trained head ({', '.join(missing[:3])} missing); a random one would be useless. "
            "Use --teacher_path to fine-tune this encoder."
        )
    if report["mismatched_keys"]:
        raise InputError(f"{where}: its head is of another size than its config.json says")
    check_unexpected(where, model, report["unexpected_keys"])
    order = match_labels(found, labels, where)
    if model._supports_sdpa:
        model.set_attn_implementation(RECORDED_SDPA)
    tokenizer = open_tokenizer(tokenizer_folder or name, f"{where}: no tokenizer beside its weights")
    restore_tokenizer(tokenizer, settings)
    # What a run has written brings the suite's own speed along; of a foreign model every position is computed, as it always was.
    return SavedClassifier(
        SequenceClassifier(model, order, first_is_enough=bool(settings)), tokenizer, settings | {"labels": found}
    )


def match_labels(found: Sequence[str], wanted: Sequence[str] | None, where: str) -> list[int]:
    """Return, for each wanted label, its place among those found: by exact name, else ignoring case; all without any.

    Raises:
        InputError: a wanted label is not there, or two would share one output; outputs of the model for other
            labels are ignored.
    """
    if wanted is None:
        return list(range(len(found)))
    exact = {label: place for place, label in enumerate(found)}
    folded = {label.casefold(): place for place, label in enumerate(found)}
    order = [exact.get(label, folded.get(label.casefold())) for label in wanted]
    missing = [label for label, place in zip(wanted, order, strict=True) if place is None]
    if missing:
        raise InputError(
            f"{where}: its labels are {', '.join(found)}; no {', '.join(missing)}. Set id2label in its config.json to the "
            "names of the label columns, or --label_columns to its labels."
        )
    places = [place for place in order if place is not None]
    for place in places:
        sharing = [other for other, its_place in zip(wanted, places, strict=True) if its_place == place]
        if len(sharing) > 1:
            raise InputError(
                f"{where}: its output for {found[place]} would stand for {' and '.join(sharing)}. Set id2label in its "
                "config.json to the names of the label columns, or leave one out of --label_columns."
            )
    return places
