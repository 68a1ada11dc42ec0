"""The files of a classifier's folder, laid out as the Hugging Face hub has them.

    config.json         architecture, labels, and under "classifier_settings" what using the model takes
    model.safetensors   every weight, float32
    tokenizer.json ...  the tokenizer; a fast one brings a text into the form of training by itself

A model with the classification head of its architecture is a stock folder: transformers loads it. One with the
suite's own head is none, and must not pass for one: transformers would put a random head on the encoder and say
so in a warning. So its configuration has a model type that transformers refuses.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_model
from tokenizers import normalizers
from torch import Tensor
from transformers import CONFIG_MAPPING

from research.models.ngram_table import is_countable
from research.models.pooling import POOLINGS

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
SETTINGS_KEY = "classifier_settings"
OWN_TYPE = "research_kd_classifier"
# A type of its own, since versions that know no n-grams would leave them out without a word.
OWN_NGRAMS_TYPE = "research_kd_classifier_with_ngrams"
OWN_TYPES = (OWN_TYPE, OWN_NGRAMS_TYPE)
# A class named by hand, as BertModel, reads a configuration of any type and builds a random model from the defaults
# of its own; a width that is no number stops it.
NO_WIDTH = "that of the encoder below; load this folder with research.models.saved.load_classifier"
# How the weights of the suite's own classifier are told apart by their names.
ENCODER_PREFIX, HEAD_PREFIX, NGRAMS_PREFIX = "encoder.", "classifier.", "ngrams."
NGRAMS = "ngrams"  # what the settings say of the n-grams: the most pieces in one, and of how many pieces
NATIVE = "native"  # said in place of a pooling of a student whose architecture's own head decides it
# What a configuration keeps of the machine it was made on.
LOCAL_KEYS = frozenset({"_name_or_path", "name_or_path", "auto_map", "is_local", "local_files_only"})
FORMS = {"nfc": "NFC", "nfkc": "NFKC"}


def read_own_config(name: str | Path) -> dict[str, Any] | None:
    """Return the config.json of a folder whose head is the suite's own, None for anything else."""
    try:
        config = json.loads((Path(name).expanduser() / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # what is wrong with it, transformers tells
        return None
    return config if isinstance(config, dict) and config.get("model_type") in OWN_TYPES else None


def read_encoder_config(own: Mapping[str, Any]) -> Any:
    """Return the transformers configuration of the encoder in such a config.json.

    Raises:
        ValueError: there is none; whatever transformers raises for wrong values beside.
    """
    kind, values = own.get("encoder_type"), own.get("encoder")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or not isinstance(values, dict):
        raise ValueError(f"config.json names no encoder that transformers has (encoder_type {kind!r})")
    return CONFIG_MAPPING[kind].from_dict(values)


def read_own_weights(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of encoder or head of a folder with the suite's own head, by their names in it."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  # it is no dict
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def write_own(model: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write configuration and weights of an encoder with the suite's own head.

    Args:
        model: Its `state_dict` names the weights by `encoder.`, `classifier.` and, where the settings say so, `ngrams.`.
        settings: With `labels`.
    """
    config = model.encoder.config
    encoder = {name: value for name, value in json.loads(config.to_json_string()).items() if name not in LOCAL_KEYS}
    # With a model type in it, that type's class would take it for a configuration of its own.
    kind = encoder.pop("model_type")
    own = {
        "model_type": OWN_NGRAMS_TYPE if NGRAMS in settings else OWN_TYPE,
        "architectures": ["EncoderClassifier"],
        "hidden_size": NO_WIDTH,
        "encoder_type": kind,
        "encoder": encoder | {"dtype": "float32"},
    }
    write_json(folder / CONFIG_FILE, own | describe_labels(settings["labels"]) | {SETTINGS_KEY: dict(settings)})
    save_model(model, str(folder / WEIGHTS_FILE), {"format": "pt"})


def write_stock(model: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write configuration and weights of a transformers classifier, as transformers does; its labels stay its own."""
    model.save_pretrained(folder)
    own = {"problem_type": "multi_label_classification", SETTINGS_KEY: dict(settings)}
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")) | own
    write_json(folder / CONFIG_FILE, {name: value for name, value in config.items() if name not in LOCAL_KEYS})


def add_settings(folder: Path, **settings: Any) -> None:
    """Add to what a folder's config.json says of the classifier's use."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config[SETTINGS_KEY] = config[SETTINGS_KEY] | settings
    write_json(folder / CONFIG_FILE, config)


def describe_labels(labels: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a configuration that name the outputs, each of which is a yes or no of its own."""
    names = list(labels)
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {label: place for place, label in enumerate(names)},
        "problem_type": "multi_label_classification",
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(content, sort_keys=True, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def is_plausible(settings: Any) -> bool:
    """Whether what a folder says of the use of its classifier, if it says it, can be true."""
    if not isinstance(settings, dict):
        return False
    labels, dropout = settings.get("labels", []), settings.get("dropout", 0.0)
    named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    drops = isinstance(dropout, int | float) and 0 <= dropout < 1
    known = settings.get("pooling", "cls") in (*POOLINGS, NATIVE) and isinstance(settings.get("text_normalization", ""), str)
    return named and drops and known and (NGRAMS not in settings or _are_plausible_ngrams(settings[NGRAMS]))


def _are_plausible_ngrams(sizes: Any) -> bool:
    if not isinstance(sizes, dict) or sizes.keys() != {"longest", "vocabulary"}:
        return False
    longest, vocabulary = sizes["longest"], sizes["vocabulary"]
    return type(longest) is type(vocabulary) is int and 1 <= longest < 64 and vocabulary > 0 and is_countable(vocabulary, longest)


def write_tokenizer(tokenizer: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write a tokenizer that gives a raw text the ids which it has in training, where it is a fast one.

    Training brings texts into a Unicode form and strips them before any tokenizer sees them; here that comes first
    in the tokenizer itself. `truncation=True` cuts at the run's length. A class of its own, as BertTokenizer, would
    rebuild itself from the vocabulary and drop what was put before, so tokenizer.json is read as it is.
    """
    written = copy.deepcopy(tokenizer)
    if "max_length" in settings:
        written.model_max_length = settings["max_length"]
    if written.is_fast:
        backend = written.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        former = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([getattr(normalizers, name)() for name in cleaning_steps(settings)] + former)
    written.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {name: value for name, value in json.loads(path.read_text(encoding="utf-8")).items() if name not in LOCAL_KEYS}
    write_json(path, config | ({"tokenizer_class": "PreTrainedTokenizerFast"} if written.is_fast else {}))


def restore_tokenizer(tokenizer: Any, settings: Mapping[str, Any]) -> None:
    """Take out of a tokenizer what `write_tokenizer` put first.

    The suite cleans texts itself, as whole ones, where a tokenizer does it between the special tokens in them; and the
    ids it keeps in its cache are those of the tokenizer that was saved.
    """
    normalizer, steps = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None, cleaning_steps(settings)
    if not steps or normalizer is None:
        return
    found = [entry["type"] for entry in json.loads(normalizer.__getstate__()).get("normalizers", [])]
    if found[: len(steps)] != steps:
        return
    former = [normalizer[place] for place in range(len(steps), len(found))]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(former) if len(former) > 1 else (former or [None])[0]


def cleaning_steps(settings: Mapping[str, Any]) -> list[str]:
    """Return the normalizers of tokenizers that do what training did to a text, nothing where that is not known."""
    if "text_normalization" not in settings:
        return []
    form = FORMS.get(settings["text_normalization"])
    return ["Strip"] if form is None else [form, "Strip"]
