"""Teacher and student: an encoder with a classifier on its text vector, and how they are kept on disk.

Shapes: B batch, L tokens, H width, C labels.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import cached_file

from research_attention import RECORDED_SDPA, record_attention
from research_config import InputError
from research_dropout import BitDropout, replace_dropout
from research_files import hash_file
from research_losses import pick_layers

log = logging.getLogger(__name__)

CLASSIFIER_FILE = "classifier.safetensors"
SETTINGS_FILE = "classifier.json"
HEAD_FILES = (CLASSIFIER_FILE, "head.safetensors", "classifier.pt", "head.pt", "classifier.bin", "head.bin")
# What torch.load and transformers raise for files that are damaged, hold more than tensors, or ask for more packages.
UNREADABLE = (
    OSError, ValueError, LookupError, RuntimeError, EOFError, TypeError, AttributeError, ImportError, pickle.UnpicklingError,
    SafetensorError,
)  # fmt: skip
# Stack of layers, and the part of a layer after which every position is computed by itself, by model type.
POSITIONWISE_PARTS = dict.fromkeys(
    ("bert", "camembert", "electra", "roberta", "xlm-roberta"), ("encoder.layer", "attention.output")
)
POSITIONWISE_PARTS["distilbert"] = ("transformer.layer", "sa_layer_norm")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class TextClassifier(nn.Module):
    """What teacher and student have in common: logits, and on request states and maps.

    Args:
        backbone: The transformers model that runs.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone_config: Any = backbone.config

    @property
    def num_layers(self) -> int:
        return int(self.backbone_config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.backbone_config.hidden_size)

    @property
    def num_heads(self) -> int:
        return int(self.backbone_config.num_attention_heads)

    def run_backbone(self, **inputs: Any) -> tuple[Any, Tensor]:
        """Return the transformers output and the logits (B, C)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        *,
        attention_layers: Collection[int] = (),
        relation_layers: Collection[int] = (),
    ) -> dict[str, Any]:
        """Classify token ids (B, L).

        Args:
            output_hidden_states: Add `hidden_states`, a tuple of (B, L, H): the embeddings, then one
                entry per layer.
            output_attentions: Add `attentions`, a tuple of every layer's map (B, A, L, L).
            attention_layers: Add `attention_maps`, {layer: head-averaged map (B, L, L)}, for these
                layers only; the others keep the fused kernel.
            relation_layers: Add `relations`, {layer: (queries, keys, values)}, (B, L, H) each.

        Raises:
            InputError: maps or relations are asked for and this model's attention gives none.
        """
        keep = "heads" if output_attentions else "relation" if relation_layers else "mean"
        layers = range(1, self.num_layers + 1) if output_attentions else tuple(relation_layers) or tuple(attention_layers)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "output_hidden_states": output_hidden_states}
        # A model with an attention of its own (as DeBERTa's) returns its maps by itself.
        own_attention = bool(layers) and self.backbone_config._attn_implementation != RECORDED_SDPA
        if own_attention:
            inputs["output_attentions"] = True
        with record_attention(layers, keep) as recorder:
            outputs, logits = self.run_backbone(**inputs)
        result: dict[str, Any] = {"logits": logits}
        if output_hidden_states:
            result["hidden_states"] = outputs.hidden_states
        if not layers:
            return result
        if relation_layers:
            self._check_recorded(recorder.relations, layers)
            return result | {"relations": recorder.relations}
        maps = pick_maps(outputs.attentions or (), layers, keep) if own_attention else recorder.maps
        self._check_recorded(maps, layers)
        if output_attentions:
            return result | {"attentions": tuple(maps[layer] for layer in layers)}
        return result | {"attention_maps": maps}

    def _check_recorded(self, found: Mapping[int, object], wanted: Collection[int]) -> None:
        missing = sorted(set(wanted) - set(found))
        if missing:
            raise InputError(
                f"{self.backbone_config.model_type} model: its attention gives nothing for layer "
                f"{', '.join(map(str, missing))} of {self.num_layers}, so the attention loss cannot be computed. "
                "Use --kd_method logit or hidden, or --attention_objective mse."
            )


def pick_maps(maps: Sequence[Tensor | None], layers: Collection[int], keep: str) -> dict[int, Tensor]:
    """Return {layer: map} of the asked layers that are there, whole for "heads", else averaged over the heads."""
    present = {layer: full for layer, full in enumerate(maps, 1) if layer in layers and full is not None}
    return present if keep == "heads" else {layer: full.float().mean(dim=1) for layer, full in present.items()}


class EncoderClassifier(TextClassifier):
    """An encoder, a pooled text vector, and Linear -> ReLU -> Dropout -> Linear on it."""

    def __init__(self, encoder: nn.Module, num_labels: int, dropout: float, classifier_width: int, pooling: str) -> None:
        super().__init__(encoder)
        assert pooling in ("cls", "mean")
        self.encoder = encoder
        self.pooling = pooling
        self.classifier = nn.Sequential(
            nn.Linear(self.hidden_size, classifier_width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(classifier_width, num_labels),
        )

    def run_backbone(self, **inputs: Any) -> tuple[Any, Tensor]:
        first_is_enough = self.pooling == "cls" and not inputs["output_hidden_states"]
        with narrow_to_first_position(self.encoder) if first_is_enough else nullcontext():
            outputs = self.encoder(**inputs)
        return outputs, self.classify(outputs.last_hidden_state, inputs["attention_mask"])

    def classify(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool the last states (B, L, H), of which "cls" reads the first position only, and return logits (B, C)."""
        if self.pooling == "cls":
            return self.classifier(states[:, 0])
        mask = attention_mask.unsqueeze(-1).to(states.dtype)  # (B, L, 1)
        return self.classifier((states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1.0))


@contextmanager
def narrow_to_first_position(encoder: Any) -> Iterator[None]:
    """Let the last layer finish the first position only, where it is known how; the last states are then (B, 1, H).

    The first position's state and every gradient stay what they are: after attention, a layer computes
    each position by itself, and nothing reads the others'.
    """
    if encoder.config.model_type not in POSITIONWISE_PARTS:
        yield
        return
    stack, part = POSITIONWISE_PARTS[encoder.config.model_type]
    module = encoder.get_submodule(stack)[-1].get_submodule(part)
    hook = module.register_forward_pre_hook(lambda _, states: tuple(state[:, :1] for state in states))
    try:
        yield
    finally:
        hook.remove()


class TeacherModel(EncoderClassifier):
    """The large model: classifier Linear(h, h) -> ReLU -> Dropout -> Linear(h, num_labels).

    Args:
        model_name: Folder or hub name of the pretrained encoder.
        encoder: An encoder that is already loaded, instead of `model_name`.
    """

    def __init__(
        self,
        model_name: str = "csebuetnlp/banglabert",
        num_labels: int = 5,
        dropout: float = 0.1,
        *,
        pooling: str = "cls",
        encoder: nn.Module | None = None,
    ) -> None:
        encoder = load_encoder(model_name) if encoder is None else encoder
        super().__init__(encoder, num_labels, dropout, int(encoder.config.hidden_size), pooling)  # type: ignore[union-attr, arg-type]


class StudentModel(EncoderClassifier):
    """The small model: classifier Linear(h, classifier_hidden_size) -> ReLU -> Dropout -> Linear."""

    def __init__(
        self,
        model_name: str = "distilbert-base-multilingual-cased",
        num_labels: int = 5,
        dropout: float = 0.1,
        classifier_hidden_size: int = 256,
        *,
        pooling: str = "cls",
        encoder: nn.Module | None = None,
    ) -> None:
        encoder = load_encoder(model_name) if encoder is None else encoder
        super().__init__(encoder, num_labels, dropout, classifier_hidden_size, pooling)


class SequenceClassifier(TextClassifier):
    """A fine-tuned AutoModelForSequenceClassification whose labels are put into another order.

    Args:
        model: The loaded model with its own head.
        label_order: For each of our labels, its place among the model's.
    """

    label_order: Tensor

    def __init__(self, model: nn.Module, label_order: Sequence[int]) -> None:
        super().__init__(model)
        self.model = model
        self.register_buffer("label_order", torch.tensor(label_order), persistent=False)

    @property
    def encoder(self) -> nn.Module:
        base = self.model.base_model
        assert isinstance(base, nn.Module)
        return base

    def run_backbone(self, **inputs: Any) -> tuple[Any, Tensor]:
        outputs = self.model(**inputs)
        return outputs, outputs.logits[:, self.label_order]


def load_tokenizer(flag: str, name: str, max_length: int) -> Any:
    """Load a tokenizer, saying which flag named it when it is not there.

    Raises:
        InputError: there is no such tokenizer, or it takes fewer tokens than `max_length`.
    """
    tokenizer = open_tokenizer(name, f"--{flag}: no tokenizer in '{name}'")
    if tokenizer.model_max_length < max_length:
        raise InputError(f"--max_length: {name} takes at most {tokenizer.model_max_length} tokens, got {max_length}")
    return tokenizer


def open_tokenizer(place: Path | str, complaint: str) -> Any:
    """Load a tokenizer.

    Raises:
        InputError: the complaint and the reason, on one line.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{complaint}: {first_line(error)}") from error
    # Where its files are missing, transformers makes one up that knows its special tokens only.
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise InputError(f"{complaint}: its vocabulary is empty; put the tokenizer's files (tokenizer.json) there")
    return tokenizer


def load_model_config(flag: str, name: str) -> Any:
    """Load a model's configuration, saying which flag named it when it is not there."""
    try:
        return open_config(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--{flag}: no model '{name}' in a folder of that name, the Hugging Face cache or the hub: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_encoder(name: str, *, random_init: bool = False) -> nn.Module:
    """Load a pretrained encoder in float32 whose attention can be recorded.

    Args:
        name: Folder or hub name.
        random_init: Take the architecture only, with random weights.

    Raises:
        InputError: there is no such model, or weights of the encoder are missing.
    """
    try:
        if random_init:
            config = open_config(name)
            return prepare_encoder(AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False))
        encoder, report = load_pretrained(AutoModel, name)
    except UNREADABLE as error:
        raise InputError(f"model '{name}': cannot be loaded: {first_line(error)}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        raise InputError(
            f"model '{name}': {len(missing)} weights are missing from its file, as {', '.join(missing[:2])}; "
            "they would be random. Give a complete checkpoint."
        )
    return prepare_encoder(encoder)


def load_pretrained(auto_class: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """Load a transformers model in float32 and its loading report, running no code that its folder brings or names.

    Raises:
        ValueError: its index of weight files points out of its folder; transformers' own errors beside.
    """
    for index in Path(name).expanduser().glob("*.index.json"):
        for file in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
                raise ValueError(f"{index.name} names {file!r}, which is no file of its folder")
    options = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
    return auto_class.from_pretrained(name, config=open_config(name), **options)


def open_config(name: str) -> Any:
    """Read a model's config.json, which may not choose its attention: that could be code on the hub."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    config._attn_implementation = "eager"
    return config


def prepare_encoder(encoder: Any) -> nn.Module:
    """Drop the unused pooler, let the attention of chosen layers be recorded, and make dropout cheap."""
    replace_dropout(encoder, BitDropout)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    # Models with an attention of their own (as DeBERTa's) compute their maps in the open anyway.
    if getattr(encoder, "_supports_sdpa", False):
        encoder.set_attn_implementation(RECORDED_SDPA)
    return encoder


def cut_layers(encoder: Any, wanted: int, flag: str = "student_layers") -> nn.Module:
    """Keep `wanted` of an encoder's layers, evenly spread, the last one included.

    Raises:
        InputError: the encoder has fewer layers, or keeps them in a way this does not know.
    """
    total = int(encoder.config.num_hidden_layers)
    if wanted > total:
        raise InputError(f"--{flag}: {encoder.config.model_type} has {total} layers, got {wanted}")
    if wanted == total:
        return encoder
    stacks = [
        (name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not stacks:
        raise InputError(f"--{flag}: the layers of a {encoder.config.model_type} model cannot be cut; choose another student")
    name, stack = stacks[0]
    kept = [layer - 1 for layer in pick_layers(total, wanted)]
    parent_name, _, attribute = name.rpartition(".")
    setattr(encoder.get_submodule(parent_name), attribute, nn.ModuleList(stack[place] for place in kept))
    encoder.config.num_hidden_layers = wanted
    if isinstance(layer_types := getattr(encoder.config, "layer_types", None), list) and len(layer_types) == total:
        encoder.config.layer_types = [layer_types[place] for place in kept]
    for place, layer in enumerate(getattr(encoder.get_submodule(parent_name), attribute)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place
    return encoder


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier read back from disk, with what is needed to use it."""

    model: TextClassifier
    tokenizer: Any
    settings: dict[str, Any]


def save_classifier(model: TextClassifier, tokenizer: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write a model so that this suite, and transformers for its encoder, can load it again.

    Args:
        settings: Kept in classifier.json beside the model's own: labels, thresholds, max_length,
            text_normalization.

    Raises:
        OSError: it could not be written, as on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with raising_os_errors(folder):
        _write_classifier(model, tokenizer, folder, settings)


def _write_classifier(model: TextClassifier, tokenizer: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    tokenizer.save_pretrained(folder / "tokenizer")
    own: dict[str, Any] = {"labels": list(settings["labels"])}
    if isinstance(model, EncoderClassifier):
        model.encoder.save_pretrained(folder / "encoder")  # type: ignore[operator]
        first, dropout = model.classifier[0], model.classifier[2]
        assert isinstance(first, nn.Linear) and isinstance(dropout, nn.Dropout)
        own |= {"classifier_width": first.out_features, "dropout": dropout.p, "pooling": model.pooling}
        save_file({name: tensor.contiguous() for name, tensor in model.classifier.state_dict().items()}, folder / CLASSIFIER_FILE)
    else:
        assert isinstance(model, SequenceClassifier)
        model.model.save_pretrained(folder / "sequence_classifier")  # type: ignore[operator]
    text = json.dumps(own | dict(settings), sort_keys=True, ensure_ascii=False, indent=2)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


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


def load_classifier(
    name: str, labels: Sequence[str] | None = None, *, flag: str = "teacher_checkpoint", dropout: float = 0.1
) -> SavedClassifier:
    """Load a fine-tuned classifier, its outputs in the order of `labels`, or in its own without them.

    Args:
        name: A folder written by `save_classifier`, a folder with `encoder/` and a head file, or a
            folder or hub name of a fine-tuned AutoModelForSequenceClassification.

    Raises:
        InputError: the head is missing or of another size, or its labels are others.
    """
    folder = Path(name).expanduser()
    where = f"--{flag}: {name}"
    if (folder / "sequence_classifier").is_dir():
        return load_sequence_classifier(str(folder / "sequence_classifier"), labels, where, folder / "tokenizer")
    if (folder / "encoder").is_dir():
        return load_encoder_and_head(folder, labels, where, dropout)
    return load_sequence_classifier(name, labels, where, None)


def load_encoder_and_head(folder: Path, labels: Sequence[str] | None, where: str, dropout: float) -> SavedClassifier:
    settings = read_settings(folder, where)
    head = read_head(folder, where)
    encoder = load_encoder(str(folder / "encoder"))
    width = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
    if head["0.weight"].shape[1] != width:
        raise InputError(f"{where}: its head takes vectors of {head['0.weight'].shape[1]}, its encoder gives {width}")
    order = match_labels(head_labels(settings, len(head["3.bias"]), labels, where), labels, where)
    head |= {name: head[name][order] for name in ("3.weight", "3.bias")}
    model = EncoderClassifier(
        encoder, len(order), settings.get("dropout", dropout), len(head["0.bias"]), settings.get("pooling", "cls")
    )
    model.classifier.load_state_dict(head)
    places = (folder / "tokenizer", folder / "encoder", folder)
    tokenizer_folder = next((place for place in places if (place / "tokenizer_config.json").is_file()), folder)
    return SavedClassifier(model, open_tokenizer(tokenizer_folder, f"{where}: no tokenizer beside its weights"), settings)


def head_labels(settings: Mapping[str, Any], outputs: int, labels: Sequence[str] | None, where: str) -> list[str]:
    """Return the label of each output of a head: as its settings say, else, with a warning, as `labels` do."""
    found = settings.get("labels")
    if found is None and labels is not None and len(labels) == outputs:
        log.warning("%s: its head names no labels; they are taken to be %s, in this order", where, ", ".join(labels))
        return list(labels)
    if found is None or len(found) != outputs:
        raise InputError(f"{where}: its head has {outputs} outputs for {len(found or labels or ())} labels")
    return list(found)


def read_settings(folder: Path, where: str) -> dict[str, Any]:
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {SETTINGS_FILE} cannot be read: {first_line(error)}") from error
    if not (isinstance(settings, dict) and is_plausible(settings)):
        raise InputError(f"{where}: {SETTINGS_FILE} does not describe a classifier")
    return settings


def is_plausible(settings: Mapping[str, Any]) -> bool:
    """Whether what a classifier.json says of the model, if it says it, can be true."""
    labels, dropout = settings.get("labels", []), settings.get("dropout", 0.0)
    named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    drops = isinstance(dropout, int | float) and 0 <= dropout < 1
    return named and drops and settings.get("pooling", "cls") in ("cls", "mean")


def read_head(folder: Path, where: str) -> dict[str, Tensor]:
    """Read a head file: the tensors of Linear -> ReLU -> Dropout -> Linear, with or without a common prefix."""
    path = next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(
            f"{where}: no head beside encoder/ (looked for {', '.join(HEAD_FILES[:3])}, ...); a random one would be "
            "useless. Give the head, or use --teacher_path to fine-tune this encoder."
        )
    try:
        head = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        raise InputError(f"{where}: {path.name} cannot be read: {first_line(error)}") from error
    if not isinstance(head, dict) or not all(isinstance(tensor, Tensor) for tensor in head.values()):
        raise InputError(f"{where}: {path.name} holds no tensors by name; save the state_dict() of the head")
    head = {name.removeprefix("classifier.").removeprefix("head."): tensor for name, tensor in head.items()}
    expected = {"0.weight", "0.bias", "3.weight", "3.bias"}
    if set(head) != expected:
        raise InputError(
            f"{where}: {path.name} holds {', '.join(sorted(head)[:6])}; expected {', '.join(sorted(expected))} "
            "(Linear, ReLU, Dropout, Linear)"
        )
    sizes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    first, last = sizes["0.weight"], sizes["3.weight"]
    fits = len(first) == len(last) == 2 and last[1] == first[0]
    if not (fits and sizes["0.bias"] == first[:1] and sizes["3.bias"] == last[:1]):
        raise InputError(f"{where}: {path.name}: the sizes of its tensors do not fit each other: {sizes}")
    return {name: tensor.float() for name, tensor in head.items()}


def load_sequence_classifier(
    name: str, labels: Sequence[str] | None, where: str, tokenizer_folder: Path | None
) -> SavedClassifier:
    config = load_model_config(where.split(":", 1)[0].removeprefix("--"), name)
    found = [config.id2label[place] for place in sorted(config.id2label)]
    try:
        model, report = load_pretrained(AutoModelForSequenceClassification, name)
    except UNREADABLE as error:
        raise InputError(f"{where}: cannot be loaded as a fine-tuned classifier: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{where}: has no trained head ({', '.join(missing[:3])} missing); a random one would be useless. "
            "Use --teacher_path to fine-tune this encoder."
        )
    if report["mismatched_keys"]:
        raise InputError(f"{where}: its head is of another size than its config.json says")
    order = match_labels(found, labels, where)
    if model._supports_sdpa:
        model.set_attn_implementation(RECORDED_SDPA)
    tokenizer = open_tokenizer(tokenizer_folder or name, f"{where}: no tokenizer beside its weights")
    return SavedClassifier(SequenceClassifier(model, order), tokenizer, {"labels": found})


def match_labels(found: Sequence[str], wanted: Sequence[str] | None, where: str) -> list[int]:
    """Return, for each wanted label, its place among those found: by exact name, else ignoring case; all without any.

    Raises:
        InputError: a wanted label is not there; outputs of the model for other labels are ignored.
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
    return [place for place in order if place is not None]


def resolve_model_folder(name: str) -> Path:
    """Return the folder that holds a model's files, fetching them from the hub when need be."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    for file in WEIGHT_FILES:
        try:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise InputError(f"model '{name}': {first_line(error)}") from error
        if found is not None:
            return Path(found).parent
    raise InputError(f"model '{name}': no weights found (looked for {', '.join(WEIGHT_FILES)})")


def fingerprint_model(name: str) -> dict[str, str]:
    """Return {file: SHA-256} of a model's own files: weights, configuration, tokenizer, head."""
    folder = resolve_model_folder(name)
    suffixes = {".json", ".safetensors", ".bin", ".pt", ".txt", ".model"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}
