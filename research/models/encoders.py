"""Pretrained encoders and tokenizers from transformers: loaded and cut."""

from __future__ import annotations

import json
import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from research.errors import InputError, first_line
from research.models.attention import RECORDED_SDPA
from research.models.dropout import BitDropout, replace_dropout
from research.models.mapping import pick_layers

# What torch.load and transformers raise for files that are damaged, hold more than tensors, or ask for more packages.
UNREADABLE = (
    OSError, ValueError, LookupError, RuntimeError, EOFError, TypeError, AttributeError, ImportError, pickle.UnpicklingError,
    SafetensorError,
)  # fmt: skip


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer in a folder or on the hub.

    Raises:
        InputError: there is no such tokenizer.
    """
    return open_tokenizer(name, f"no tokenizer in '{name}'")


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


def load_model_config(name: str) -> Any:
    """Load a model's configuration.

    Raises:
        InputError: there is no such model.
    """
    try:
        return open_config(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no model '{name}' in a folder of that name, the Hugging Face cache or the hub: {first_line(error)}"
        ) from error


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
    model, report = auto_class.from_pretrained(name, config=open_config(name), **options)
    # safetensors maps its file into memory: without a copy, whoever writes into the file changes the weights in use.
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    return model, report


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


def cut_layers(encoder: Any, wanted: int) -> nn.Module:
    """Keep `wanted` of an encoder's layers, evenly spread, the last one included.

    Raises:
        InputError: the encoder has fewer layers, or keeps them in a way this does not know.
    """
    total = int(encoder.config.num_hidden_layers)
    if wanted > total:
        raise InputError(f"{encoder.config.model_type} has {total} layers, got {wanted}")
    if wanted == total:
        return encoder
    stacks = [
        (name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not stacks:
        raise InputError(f"the layers of a {encoder.config.model_type} model cannot be cut; choose another student")
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
