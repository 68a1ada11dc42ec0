"""Pretrained encoders and tokenizers from transformers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from research.errors import InputError
from research.models.attention import RECORDED_SDPA
from research.models.dropout import BitDropout, replace_dropout
from research.models.factors import RANK, put_factors
from research.models.folders import ENCODER_PREFIX, read_encoder_config, read_own_config, read_own_weights
from research.models.reading import check_sizes, refusing

# Ends of names under which older files keep what a model now computes by itself.
FORMER_BUFFERS = ("position_ids", "token_type_ids", "inv_freq", "attn.bias", "masked_bias")


def find_part(name: str, file: str, parts: Collection[str]) -> str:
    """Return where the encoder or the tokenizer of a model is: in a part of the folder that a run saved, or in `name` itself.

    Args:
        name: Folder or hub name.
        file: What the folder looked for holds.
        parts: Folders below `name` where it may be.
    """
    folder = Path(name).expanduser()
    if (folder / file).is_file():
        return name
    return next((str(folder / part) for part in parts if (folder / part / file).is_file()), name)


def find_encoder(name: str) -> str:
    """Return where a model's encoder is; a run's student/ or teacher/ may stand for the encoder in it."""
    return find_part(name, "config.json", ("encoder", "sequence_classifier"))


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer in a folder or on the hub.

    Raises:
        InputError: there is no such tokenizer.
    """
    place = find_part(name, "tokenizer_config.json", ("tokenizer", "encoder", "sequence_classifier"))
    return open_tokenizer(place, f"no tokenizer in '{name}'")


def open_tokenizer(place: Path | str, complaint: str) -> Any:
    """Load a tokenizer that turns texts into ids, and that has a padding token if any will do.

    Raises:
        InputError: the complaint and the reason, on one line.
    """
    with refusing(complaint), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        ordinary = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
        if ordinary:
            check_tokenizer(tokenizer)
    # Where its files are missing, transformers makes one up that knows its special tokens only.
    if not ordinary:
        raise InputError(f"{complaint}: its vocabulary is empty; put the tokenizer's files (tokenizer.json) there")
    return tokenizer


def check_tokenizer(tokenizer: Any) -> None:
    """Try a tokenizer that was read without an error, and let a decoder's, which never pads, pad with its last token.

    Raises:
        Exception: anything that tokenizers raises for files that do not belong together, or TypeError.
    """
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # the attention mask hides it
    if not isinstance(tokenizer.model_max_length, int | float):
        raise TypeError(f"tokenizer_config.json says model_max_length is {tokenizer.model_max_length!r}")
    tokenizer(["a b", ""])


def load_model_config(name: str) -> Any:
    """Load a model's configuration.

    Raises:
        InputError: there is no such model.
    """
    with refusing(f"no model '{name}' in a folder of that name, the Hugging Face cache or the hub"):
        return open_config(find_encoder(name))


def load_encoder(name: str, *, random_init: bool = False, pooler: bool = False) -> nn.Module:
    """Load a pretrained encoder in float32 whose attention can be recorded.

    Args:
        name: Folder or hub name; a run's student/ or teacher/ gives the encoder in it.
        random_init: Take the architecture only, with random weights.
        pooler: Keep a pooler that the files have trained weights of, for a head that reads it.

    Raises:
        InputError: there is no such model, or weights of the encoder are missing.
    """
    with refusing(f"model '{name}': cannot be loaded"):
        place = find_encoder(name)
        config = open_config(place)
        if random_init:
            return build_encoder(config)
        if getattr(config, RANK, None) is not None:
            return load_factorised(place, config)
        encoder, report = load_pretrained(AutoModel, place)
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        raise InputError(
            f"model '{name}': {len(missing)} weights are missing from its file, as {', '.join(missing[:2])}; "
            "they would be random. Give a complete checkpoint."
        )
    check_unexpected(f"model '{name}'", encoder, report["unexpected_keys"])
    return prepare_encoder(encoder, pooler=pooler and not report["missing_keys"])


def build_encoder(config: Any) -> nn.Module:
    """Build the encoder that a configuration describes, with random weights."""
    return prepare_encoder(put_factors(AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)))


def load_factorised(name: str, config: Any) -> nn.Module:
    """Load an encoder with factorised embeddings from a folder of this suite; nobody else knows them.

    Raises:
        RuntimeError: its weights are others than its configuration's.
    """
    encoder = build_encoder(config)
    encoder.load_state_dict(read_own_weights(Path(name).expanduser(), ENCODER_PREFIX))
    return encoder


def check_unexpected(where: str, model: Any, unexpected: Collection[str]) -> None:
    """Refuse weights of the encoder that the model its config.json describes has no place for.

    Heads of other tasks are left aside, as everybody does; but a layer too many means that the file
    holds another model than the one that would run.

    Raises:
        InputError: there are such weights.
    """
    parts = {name for name, _ in model.base_model.named_children()}
    names = sorted(key.removeprefix(f"{model.base_model_prefix}.") for key in unexpected)
    surplus = [name for name in names if name.split(".")[0] in parts and not name.endswith(FORMER_BUFFERS)]
    if surplus:
        raise InputError(
            f"{where}: its file holds {len(surplus)} weights, as {', '.join(surplus[:2])}, that the model of its config.json "
            "does not have, so another model would run. Give a config.json and weights that belong together."
        )


def load_pretrained(auto_class: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """Load a transformers model in float32 and its loading report, running no code that its folder brings or names.

    Raises:
        ValueError: its index of weight files points out of its folder; transformers' own errors beside.
    """
    for index in Path(name).expanduser().glob("*.index.json"):
        for file in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
                raise ValueError(f"{index.name} names {file!r}, which is no file of its folder")
    config, place = open_config(name), cast(str | None, name)
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
    if read_own_config(name) is not None:
        # The class that the configuration means, as only that takes weights in the place of a name.
        with torch.device("meta"):
            auto_class = type(auto_class.from_config(config, trust_remote_code=False))
        del options["trust_remote_code"]
        place, options["state_dict"] = None, read_own_weights(Path(name).expanduser(), ENCODER_PREFIX)
    with quiet_transformers():
        model, report = auto_class.from_pretrained(place, config=config, **options)
    # safetensors maps its file into memory: without a copy, whoever writes into the file changes the weights in use.
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    return model, report


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from warning of what whoever loads judges by itself, or means: not every line is news."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def open_config(name: str) -> Any:
    """Read a model's config.json, which may not choose its attention: that could be code on the hub."""
    own = read_own_config(name)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False) if own is None else read_encoder_config(own)
    check_sizes(config)
    config._attn_implementation = "eager"
    return config


class NoPooler(nn.Module):
    """In the place of a pooler, whose output nobody uses; some models call theirs without looking whether it is there."""

    def forward(self, *_states: Tensor) -> None:
        """Pool nothing."""
        return None


def prepare_encoder(encoder: Any, *, pooler: bool = False) -> nn.Module:
    """Drop the unused pooler unless it is to stay, let the attention of chosen layers be recorded, and make dropout cheap."""
    replace_dropout(encoder, BitDropout)
    if getattr(encoder, "pooler", None) is not None and not pooler:
        # ALBERT's is a bare Linear, whose output it would hand on.
        encoder.pooler = None if isinstance(encoder.pooler, nn.Linear) else NoPooler()
    # Models with an attention of their own (as DeBERTa's) compute their maps in the open anyway.
    if getattr(encoder, "_supports_sdpa", False):
        encoder.set_attn_implementation(RECORDED_SDPA)
    return encoder
