"""A student with fewer layers than its encoder, that stays the same model when it is saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from research.errors import InputError
from research.models.encoders import prepare_encoder
from research.models.mapping import LAYER_CHOICES
from research.models.reading import refusing

# Fields of a configuration that hold one entry a layer.
LAYER_FIELDS = ("layer_types", "mlp_layer_types", "attention_window")


def cut_layers(encoder: Any, wanted: int, choice: str = "uniform") -> nn.Module:
    """Keep `wanted` of an encoder's layers.

    Args:
        choice: Which, by a name of LAYER_CHOICES: "uniform" is evenly spread, the last one included.

    Raises:
        InputError: the encoder has fewer layers, keeps them in a way this does not know, or would be
            another model after saving, as where one layer is built unlike the others.
    """
    total = int(encoder.config.num_hidden_layers)
    if wanted > total:
        raise InputError(f"{encoder.config.model_type} has {total} layers, got {wanted}")
    if wanted == total:
        return encoder
    complaint = f"the layers of a {encoder.config.model_type} model cannot be cut; choose another student"
    name = find_layers(encoder)
    if name is None:
        raise InputError(complaint)
    with refusing(complaint):
        keep_layers(encoder, name, [layer - 1 for layer in LAYER_CHOICES[choice](total, wanted)])
        check_rebuilt(encoder)
    return encoder


def find_layers(encoder: Any) -> str | None:
    """Return the name of the list that holds an encoder's layers, None when there is none of their number."""
    total = int(encoder.config.num_hidden_layers)
    lists = (name for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total)
    return next(lists, None)


def keep_layers(encoder: Any, name: str, kept: Sequence[int]) -> None:
    """Drop all layers but `kept`, from 0, of the list `name`, and tell configuration and layers their new places."""
    stack = encoder.get_submodule(name)
    parent_name, _, attribute = name.rpartition(".")
    setattr(encoder.get_submodule(parent_name), attribute, nn.ModuleList(stack[place] for place in kept))
    encoder.config.num_hidden_layers = len(kept)
    for field in LAYER_FIELDS:
        if isinstance(values := getattr(encoder.config, field, None), list) and len(values) == len(stack):
            setattr(encoder.config, field, [values[place] for place in kept])
    for place, layer in enumerate(encoder.get_submodule(name)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place


def check_rebuilt(encoder: Any) -> None:
    """Check that the model transformers builds from the configuration is this one, as it will when it loads it.

    The other model gets the very tensors of this one, so that nothing is copied or initialised.

    Raises:
        ValueError: it computes other states.
        Exception: it takes other weights, or either does not run.
    """
    config = type(encoder.config).from_dict(copy.deepcopy(encoder.config.to_dict()))
    config._attn_implementation = "eager"
    with torch.device("meta"):
        rebuilt: Any = prepare_encoder(AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False))
    weights = {name: weight for name, weight in encoder.state_dict().items() if not name.startswith("pooler.")}
    rebuilt.load_state_dict(weights, assign=True)
    for name, buffer in encoder.named_buffers():
        parent_name, _, attribute = name.rpartition(".")
        setattr(rebuilt.get_submodule(parent_name), attribute, buffer)
    ids, mask = sample_ids(config)
    training = encoder.training
    with torch.no_grad():
        states = [model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state for model in (encoder, rebuilt)]
    encoder.train(training)
    if not torch.equal(*states):
        raise ValueError("saved and loaded again, it would compute something else")


def sample_ids(config: Any, rows: int = 2, length: int = 7, start: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids of ordinary tokens (rows, length) and their mask; every row but the first ends in two padded cells.

    Args:
        start: Which of the ordinary tokens comes first.
    """
    vocabulary = getattr(config, "vocab_size", None) or 64
    named = {name: getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos", "cls", "sep", "unk", "mask")}
    special = {name: token for name, token in named.items() if isinstance(token, int) and 0 <= token < vocabulary}
    padding, end = special.get("pad", 0), special.get("eos")
    ordinary = [token for token in range(min(vocabulary, 64)) if token not in special.values()] or [0]
    places = range(start, start + length)
    ids = torch.tensor([[ordinary[(7 * row + place) % len(ordinary)] for place in places] for row in range(rows)])
    mask = torch.ones_like(ids)
    ids[1:, length - 2 :], mask[1:, length - 2 :] = padding, 0
    if end is not None:
        # BART's classifier reads the state of the one token that ends the text.
        ids[:1, -1] = ids[1:, length - 3] = end
    return ids, mask
