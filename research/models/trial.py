"""Trying the models of a run on a few tokens, so that what one cannot do is said before anything is written.

Transformers has hundreds of architectures; whether one takes plain texts, gives a state for each token or
has room for --max_length tokens is in no configuration, but shows in a forward pass of milliseconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from research.errors import InputError
from research.models.classifiers import EncoderClassifier, StudentModel, TextClassifier
from research.models.cutting import cut_layers, factorise_embeddings, find_layers, keep_pieces, sample_ids
from research.models.encoders import load_encoder
from research.models.fingerprint import list_model_files
from research.models.native import build_native
from research.models.reading import refusing


@dataclass(frozen=True)
class Demands:
    """What a run asks of a model.

    Args:
        layers: Keep that many of the encoder's layers.
        layer_choice: Which those are.
        hidden: Layers whose states are compared.
        attention: Layers whose attention is compared.
        relations: Of the attention, compare queries, keys and values instead of maps.
        pieces: Keep the embeddings of these ids.
        rank: Factorise the embeddings.
        native: Classify with the head of the encoder's architecture.
    """

    max_length: int
    pooling: str
    layers: int | None = None
    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    relations: bool = False
    pieces: tuple[int, ...] | None = None
    rank: int | None = None
    layer_choice: str = "uniform"
    native: bool = False


def try_pretrained(name: str, demands: Demands, *, random_init: bool = False) -> None:
    """Load an encoder and try it as a run will use it; a sweep's process tries each only once.

    Raises:
        InputError: it cannot be loaded or cannot do what is asked of it.
    """
    folder = Path(name).expanduser()
    stats = [path.stat() for path in list_model_files(folder).values()] if folder.is_dir() else []
    _try_pretrained(name, demands, random_init, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@functools.lru_cache(maxsize=16)
def _try_pretrained(name: str, demands: Demands, random_init: bool, _stamps: tuple[Any, ...]) -> None:
    try_encoder(name, load_encoder(name, random_init=random_init), demands)


def try_encoder(where: str, encoder: nn.Module, demands: Demands) -> None:
    """Try an encoder, which is cut if that is asked, with a classifier on it."""
    if demands.layers is not None:
        encoder = cut_layers(encoder, demands.layers, demands.layer_choice)
    if demands.pieces is not None:
        encoder = keep_pieces(encoder, demands.pieces)
    if demands.rank is not None:
        encoder = factorise_embeddings(encoder, demands.rank)
    with refusing(f"{where}: cannot be used"):
        model: TextClassifier
        if demands.native:
            model = build_native(encoder, ("first", "second"), 0.0)
        else:
            model = StudentModel(num_labels=2, classifier_hidden_size=2, pooling=demands.pooling, encoder=encoder)
    try_classifier(where, model, demands)


def try_classifier(where: str, model: TextClassifier, demands: Demands) -> None:
    """Try a classifier, and leave it as it was.

    Raises:
        InputError: it does not take token ids alone, gives no states or maps of the layers asked for, has
            no room for `max_length` tokens, or its text vector would see the first token only.
    """
    config = model.backbone_config
    kind = "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "model"
    training = model.training
    model.eval()
    with torch.no_grad(), refusing(f"{where}: this {config.model_type} {kind} cannot be used as an encoder of texts"):
        check_layers_given(where, model, demands)
        if isinstance(model, EncoderClassifier) and model.pooling == "cls":
            check_first_token(where, model)
        check_length(where, model, demands.max_length)
    model.train(training)


def check_first_token(where: str, model: EncoderClassifier) -> None:
    """Refuse to classify by a first token that no other token reaches, as in models that read left to right."""
    ids, mask = sample_ids(model.backbone_config, rows=1)
    others = torch.cat([ids[:, :1], sample_ids(model.backbone_config, rows=1, start=3)[0][:, 1:]], dim=1)
    first, second = (model.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state[:, 0] for tokens in (ids, others))
    if torch.allclose(first, second, rtol=1e-5, atol=1e-6 * float(first.abs().max())):
        raise InputError(
            f"{where}: in a {model.backbone_config.model_type} model the first token sees no other, so --pooling cls would give "
            "every text the same scores; use --pooling last or mean"
        )


def check_layers_given(where: str, model: TextClassifier, demands: Demands) -> None:
    """Run the model for its logits and for the states and maps that will be compared."""
    ids, mask = sample_ids(model.backbone_config)
    wanted = {"relation_layers" if demands.relations else "attention_layers": demands.attention}
    try:
        model(ids, mask, output_hidden_states=bool(demands.hidden), **wanted)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_length(where: str, model: TextClassifier, wanted: int) -> None:
    """Refuse more tokens than the model has positions for, naming how many it takes.

    Where the configuration names a number of positions, one more decides whether it is a limit: models
    whose positions are relative take more.
    """
    stated = getattr(model.backbone_config, "max_position_embeddings", None)
    length = min(wanted, stated + 1) if isinstance(stated, int) and stated > 0 else min(wanted, 8)
    if takes_tokens(model, length):
        return
    most, too_many = 1, length
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if takes_tokens(model, middle) else (most, middle)
    raise InputError(f"{where}: takes at most {most} tokens, got --max_length {wanted}")


class EnoughSeen(Exception):
    """Raised by a hook to leave a forward pass early."""


def takes_tokens(model: TextClassifier, length: int) -> bool:
    """Whether a text of that many tokens passes the first layer, or all of them where those are not in a list."""
    encoder: Any = model.encoder
    name = find_layers(encoder)

    def leave(*_: Any) -> None:
        raise EnoughSeen

    hook = encoder.get_submodule(name)[0].register_forward_hook(leave) if name is not None else None
    try:
        ids, mask = sample_ids(model.backbone_config, rows=1, length=length)
        encoder(input_ids=ids, attention_mask=mask)
    except EnoughSeen:
        return True
    except (IndexError, RuntimeError, ValueError, AssertionError):  # as models tell a position that they do not have
        return False
    finally:
        if hook is not None:
            hook.remove()
    return True
