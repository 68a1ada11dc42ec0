"""A student with fewer layers, pieces or embeddings than its encoder, that stays the same model when it is saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from research.errors import InputError
from research.models.encoders import build_encoder
from research.models.factors import RANK, FactorisedEmbedding
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


def keep_pieces(encoder: Any, kept: Sequence[int]) -> nn.Module:
    """Keep the embeddings of some ids, which are numbered from 0 in their order; every text of them is read as before.

    Raises:
        InputError: the encoder has no such ids, does not keep them in one matrix, or would read them in another
            way, as where positions are counted from the padding token's id and that is another one now.
    """
    complaint = f"the vocabulary of a {encoder.config.model_type} model cannot be trimmed; leave --trim_student_vocab out"
    table = encoder.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise InputError(complaint)
    if kept[-1] >= table.num_embeddings:
        raise InputError(f"its tokenizer has ids up to {kept[-1]}, its model {table.num_embeddings} embeddings")
    new_ids = {old: new for new, old in enumerate(kept)}
    config = copy.deepcopy(encoder.config)
    config.vocab_size = len(kept)
    for name, value in vars(config).items():
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, new_ids.get(value))
    ids, mask = sample_ids(config)
    training = encoder.training
    with torch.no_grad(), refusing(complaint):
        before = encoder.eval()(input_ids=torch.tensor(kept)[ids], attention_mask=mask).last_hidden_state
        table.weight = nn.Parameter(table.weight[torch.tensor(kept)].clone())
        table.num_embeddings = len(kept)
        if table.padding_idx is not None:
            table.padding_idx = new_ids[table.padding_idx]
        for name in ("vocab_size", *(name for name in vars(config) if name.endswith("_token_id"))):
            setattr(encoder.config, name, getattr(config, name))
        after = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        if not torch.equal(before, after):
            raise ValueError("it would read the same texts in another way")
        check_rebuilt(encoder)
    return encoder.train(training)


def factorise_embeddings(encoder: Any, rank: int) -> nn.Module:
    """Replace an encoder's token embeddings (V, E) by (V, rank) and (rank, E), at first their closest product.

    That is the truncated singular value decomposition (Eckart and Young, 1936).

    Raises:
        InputError: the rank is over V or E, or the encoder does not run with them.
    """
    complaint = f"the embeddings of a {encoder.config.model_type} model cannot be factorised; leave --embedding_rank out"
    table = encoder.get_input_embeddings()
    if type(table) is not nn.Embedding:  # one that scales its vectors would lose that
        raise InputError(complaint)
    weight = table.weight.detach().double()
    if rank > min(weight.shape):
        raise InputError(f"{encoder.config.model_type} has embeddings of rank {min(weight.shape)}, got --embedding_rank {rank}")
    # The right singular vectors, of the largest values, each with its largest entry positive: any sign would do.
    directions = torch.linalg.eigh(weight.T @ weight).eigenvectors.flip(1)[:, :rank]
    directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    factors = FactorisedEmbedding(len(weight), rank, weight.shape[1], table.padding_idx)
    factors.pieces.weight.data.copy_(weight @ directions)
    factors.widen.weight.data.copy_(directions)
    with refusing(complaint):
        encoder.set_input_embeddings(factors)
        setattr(encoder.config, RANK, rank)
        check_rebuilt(encoder)
    return encoder


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
        rebuilt: Any = build_encoder(config)
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
