"""A model whose parameters are spread over the processes of a run, for one that is too large for a card.

torch's `fully_shard` (FSDP; Zhao et al. 2023, arXiv:2304.11277) does it: between its uses every parameter is cut into one
piece a process, and a block's parameters are whole on each card only while that block runs. What is done with such a model
is done by all processes together, as often by each.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Module = TypeVar("Module", bound="nn.Module")


def shard(model: Module, blocks: Sequence[nn.Module], device: torch.device, num_processes: int) -> Module:
    """Spread a model, in place, over all processes and put each one's pieces on its device.

    Args:
        model: The same in every process, in the host's memory.
        blocks: Parts of the model that are made whole one at a time; the rest is whole as long as the model runs.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (num_processes,))
    parts: list[nn.Module] = [*blocks, model]
    for block in parts:
        # True for the whole model too: left whole after an evaluation, it would hand its whole parameters to an optimizer.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, or what is in it, is spread over processes."""
    return any(is_piece(parameter) for parameter in model.parameters())


def is_piece(value: Any) -> bool:
    """Whether a tensor is one process's piece of a spread one."""
    # Asked without torch's class, whose import costs a run of one process a second.
    return hasattr(value, "full_tensor")


def own_piece(tensor: Tensor) -> Tensor:
    """Return what a process has of a tensor: its piece of a spread one, which shares its memory, or all of it."""
    own: Tensor = cast(Any, tensor).to_local() if is_piece(tensor) else tensor
    return own


def make_whole(tensor: Tensor) -> Tensor:
    """Return a spread tensor whole, in every process; they ask for it together."""
    whole: Tensor = cast(Any, tensor).full_tensor() if is_piece(tensor) else tensor
    return whole


def answering(model: nn.Module) -> AbstractContextManager[None]:
    """Run a model without gradients.

    The whole parameters of a spread model are written again each time it runs, which torch forbids for tensors that came
    to be in inference mode.
    """
    import torch

    return torch.no_grad() if is_sharded(model) else torch.inference_mode()


def exchange_gradients(model: nn.Module, *, wanted: bool) -> None:
    """Say whether the next backward pass averages the gradients of a spread model over the processes."""
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):
            cast(Any, module).set_requires_gradient_sync(wanted, recurse=False)


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy, in the host's memory, of what this process has of a model's state."""
    return {name: own_piece(tensor).detach().cpu().clone() for name, tensor in model.state_dict().items()}


def put_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a state of `copy_state` back.

    Raises:
        KeyError, RuntimeError: the state is not that of such a model.
    """
    import torch

    own = model.state_dict()
    if own.keys() != state.keys():
        raise KeyError(f"{len(own)} tensors in the model, {len(state)} in the state, or of other names")
    with torch.no_grad():
        for name, tensor in own.items():
            own_piece(tensor).copy_(state[name])


def own_pieces(state: Any) -> Any:
    """Return a nested state with, in place of spread tensors, what this process has of them."""
    if isinstance(state, Mapping):
        return {name: own_pieces(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(own_pieces(value) for value in state)
    return own_piece(state) if is_piece(state) else state


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put back an optimizer's state of which `own_pieces` were kept: what has the size of a piece becomes one again."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = copy.copy(state)
    state["state"] = {
        place: {name: _as_piece(value, parameters[place]) for name, value in entries.items()}
        for place, entries in state["state"].items()
    }
    optimizer.load_state_dict(state)


def _as_piece(value: Any, parameter: Any) -> Any:
    """Return a value as the same process's piece of something like a parameter; numbers, as of steps, stay what they are."""
    if not is_piece(parameter) or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor

    piece = value.to(parameter.device)
    return DTensor.from_local(
        piece, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def collect(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return a spread model's whole state in the host's memory; all processes call it, some only to help.

    One tensor is whole on a card at a time.

    Args:
        keep: Whether this process wants the state; without it, it gets an empty one.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        found = make_whole(tensor)
        if keep:
            whole[name] = found.detach().cpu().clone()
    return whole
