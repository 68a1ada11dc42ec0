"""The processes that torchrun starts for one run: what they compute together, and what the first does for all.

A process by itself is a `World` of one, in which everything here is done on the spot. `JoinedWorld` talks to the
others through torch.distributed: gloo for what lies on the CPU, nccl for what lies on cards.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from research.errors import InputError, StoppedElsewhere, list_problems
from research.sharding import exchange_gradients, is_sharded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

Value = TypeVar("Value")
Items = TypeVar("Items", "list[Any]", "NDArray[Any]")
# How long a process waits for another that neither answers nor dies; what the first does alone fits into it.
TIMEOUT = timedelta(hours=1)


class World:
    """One process: its number among those of the run, how many there are, and what they do together.

    Attributes:
        rank: From 0; the first writes the run and speaks for all.
        size: How many processes share the run.
        local_rank: Its number on its own machine, which is that of its card.
    """

    rank, size, local_rank = 0, 1, 0

    def lead(self, function: Callable[[], Value]) -> Value:
        """Let the first process call a function while the others wait, and return what it returned to all.

        Raises:
            StoppedElsewhere: in the others, when the function raised in the first.
        """
        return function()

    def together(self, function: Callable[[], Value]) -> Value:
        """Call a function in every process; what one of them cannot use of the input stops all.

        Raises:
            InputError: in the first, when the function raised one in any process.
            StoppedElsewhere: in the others then.
        """
        return function()

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Make sure that every process found the same.

        Args:
            facts: What was found, by what it is called.

        Raises:
            InputError, StoppedElsewhere: as `together` does.
        """

    def share(self, value: Value) -> Value:
        """Return the first process's value in every process."""
        return value

    def gather(self, value: Value) -> list[Value]:
        """Return every process's value, by rank, in the first process; nothing in the others."""
        return [value]

    def gather_everywhere(self, value: Value) -> list[Value]:
        """Return every process's value, by rank, in all processes."""
        return [value]

    def take_turns(self, items: Iterable[Value]) -> Iterable[Value | None]:
        """Yield this process's items, then None until no process has one left; they ask each other every turn."""
        return items

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether it is up in any process."""
        return flags

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes; on a card the host waits for nothing."""

    def gather_batch(self, rows: Tensor, num_rows: int) -> Tensor:
        """Return the rows of a whole batch, those of other processes without gradient.

        Args:
            rows: (B, K) of this process's part of the batch, as `split` gave it.
            num_rows: Of the whole batch.
        """
        return rows

    def merge_rows(
        self, values: NDArray[np.float32] | None, given: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.bool_]]:
        """Put together, in every process, the rows that each of them has.

        Args:
            values: (N, C), None in a process that has no row.
            given: (N,), which rows a process has; no two have the same.
        """
        return values, given

    def split(self, items: Items) -> Items:
        """Return this process's part of some items: every `size`-th from its rank on."""
        return items

    def replicate(self, module: nn.Module) -> nn.Module:
        """Return a module that averages its parameters' gradients over the processes in each backward pass."""
        return module

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Leave the gradients of a replicated module with each process until the last backward pass of a step."""
        return nullcontext()

    def seed_step(self, seed: int, step: int) -> None:
        """Give each process random numbers of its own for a step, the same whenever the step is taken."""

    def leave(self) -> None:
        """Say goodbye to the other processes."""


class JoinedWorld(World):
    """One of several processes that have found each other.

    Args:
        rank, size, local_rank: As of `World`.
    """

    def __init__(self, rank: int, size: int, local_rank: int) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    def lead(self, function: Callable[[], Value]) -> Value:
        """Let the first process call the function; the others hear what it returned, or that it raised."""
        if self.rank:
            (succeeded, value) = self.share((False, None))
            if not succeeded:
                raise StoppedElsewhere
            return value  # type: ignore[return-value]  # the first one's
        try:
            result = function()
        except Exception:
            self.share((False, None))
            raise
        self.share((True, result))
        return result

    def together(self, function: Callable[[], Value]) -> Value:
        """Call the function; the first process tells what is wrong in any of them."""
        result: Value | None = None
        own: InputError | None = None
        try:
            result = function()
        except InputError as error:
            own = error
        problems = self.gather_everywhere(() if own is None else list_problems(own))
        wrong = [rank for rank, found in enumerate(problems) if found]
        if not wrong:
            return result  # type: ignore[return-value]  # nothing was raised
        if self.rank:
            raise StoppedElsewhere
        if own is not None:
            raise own
        raise InputError(f"process {wrong[0]} of {self.size}: {'; '.join(problems[wrong[0]])}")

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Compare what the processes found with what the first did."""
        of_all = self.gather_everywhere(dict(facts))

        def compare() -> None:
            for rank, found in enumerate(of_all):
                for name, value in found.items():
                    if value != of_all[0][name]:
                        raise InputError(
                            f"{name}: process {rank} of {self.size} has {value}, process 0 has {of_all[0][name]}. Every machine "
                            "of a run needs the same files, flags and libraries."
                        )

        self.lead(compare)

    def share(self, value: Value) -> Value:
        """Broadcast the first process's value."""
        import torch
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Send the value to the first process."""
        from torch import distributed

        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(value, found, dst=0)
        return found or []

    def gather_everywhere(self, value: Value) -> list[Value]:
        """Send the value to all processes."""
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def take_turns(self, items: Iterable[Value]) -> Iterable[Value | None]:
        """Take turns until no process has an item left."""
        left = iter(items)
        while any(self.any((item := next(left, None)) is not None)):
            yield item

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Take the flags' maximum over the processes."""
        import torch
        from torch import distributed

        raised = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(raised, distributed.ReduceOp.MAX)
        return tuple(map(bool, raised.tolist()))

    def add_up(self, tensor: Tensor) -> None:
        """Sum the tensor over the processes, in place."""
        from torch import distributed

        distributed.all_reduce(tensor)

    def gather_batch(self, rows: Tensor, num_rows: int) -> Tensor:
        """Exchange the rows, padded to the longest part; a part may have none."""
        import torch
        from torch import distributed

        counts = [len(range(rank, num_rows, self.size)) for rank in range(self.size)]
        own = counts[self.rank]
        padded = rows.new_zeros((max(counts), rows.shape[1]))
        padded[:own] = rows[:own].detach()
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        parts[self.rank] = rows
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def merge_rows(
        self, values: NDArray[np.float32] | None, given: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.bool_]]:
        """Exchange the rows, so that every process ends with the very same bytes."""
        import numpy as np  # which --help does without

        mine = np.flatnonzero(given)
        parts = self.gather_everywhere((mine, None if values is None else values[mine]))
        merged, present = None, np.zeros_like(given)
        for rows, found in parts:
            if found is None:
                continue
            if merged is None:
                merged = np.empty((len(given), found.shape[1]), dtype=found.dtype)
            merged[rows], present[rows] = found, True
        return merged, present

    def split(self, items: Items) -> Items:
        """Deal the items out one by one, so that neighbours, which are of similar length, go to different processes."""
        return items[self.rank :: self.size]

    def replicate(self, module: nn.Module) -> nn.Module:
        """Wrap the module in DistributedDataParallel; a sharded one averages its gradients by itself.

        Looking for unused parameters, as the pooler of an encoder, also keeps the gradients' buckets as they were
        laid out first, so that a resumed training adds in the same order as an undisturbed one.
        """
        if is_sharded(module):
            return module
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings():
            # Newer versions of torch have another name for it, which older ones do not know.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients in the last backward pass only."""
        if is_sharded(module):
            exchange_gradients(module, wanted=last)
            return nullcontext()
        return nullcontext() if last else module.no_sync()  # type: ignore[operator]

    def seed_step(self, seed: int, step: int) -> None:
        """Seed by step and rank, so that no random state has to be kept of any process."""
        import torch

        digest = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))

    def leave(self) -> None:
        """Close the connections."""
        from torch import distributed

        distributed.destroy_process_group()


ALONE = World()


def launched_rank() -> int:
    """Return this process's number among those that torchrun started, 0 without torchrun; needs no torch."""
    return int(os.environ["RANK"]) if _under_torchrun() else 0


def launched_size() -> int:
    """Return how many processes torchrun started for this run, 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if _under_torchrun() else 1


def check_launch(config: Any, smallest_batch: int) -> None:
    """Refuse flags that several processes cannot share.

    Args:
        config: An `ExperimentConfig`.
        smallest_batch: The fewest rows in a batch of any training of the run.

    Raises:
        InputError: there is such a flag.
    """
    size = launched_size()
    if size == 1:
        if config.shard_teacher:
            raise InputError(
                "--shard_teacher: spreads the teacher over the processes of torchrun, and there is one process; start it as "
                "torchrun --nproc_per_node N research_main.py ..., or drop the flag"
            )
        return
    if config.sweep:
        raise InputError(
            "--sweep: torchrun starts several processes for one run; start a sweep without torchrun, with --jobs for several "
            "runs at a time"
        )
    if config.pipeline == "tfidf":
        raise InputError("--pipeline: tfidf has no training that several processes share; start it without torchrun")
    if smallest_batch < size:
        raise InputError(f"--batch: {smallest_batch} rows cannot be shared by the {size} processes that torchrun started")
    if ":" in config.device:
        raise InputError(f"--device: each process takes the card of its own number, got {config.device}; give cuda")


def launch_command() -> list[str]:
    """Return the words that the command line of a run begins with."""
    if launched_size() == 1:
        return ["python", "research_main.py"]
    nodes, processes = (int(os.environ[name]) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    of_nodes = ["--nnodes", str(nodes)] if nodes > 1 else []
    return ["torchrun", *of_nodes, "--nproc_per_node", str(processes), "research_main.py"]


def _under_torchrun() -> bool:
    # Other launchers set RANK and WORLD_SIZE too, for reasons of their own.
    return "TORCHELASTIC_RUN_ID" in os.environ


def join_world(device: str) -> World:
    """Find the other processes that torchrun started; a world of one without it.

    Args:
        device: Of --device: whether the processes will compute on cards.
    """
    if launched_size() == 1:
        return ALONE
    # DistributedDataParallel warns where no parameter is unused; read when torch is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    from torch import distributed

    on_cards = device != "cpu" and torch.cuda.is_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cards else "gloo", timeout=TIMEOUT)
    return JoinedWorld(launched_rank(), launched_size(), int(os.environ["LOCAL_RANK"]))
