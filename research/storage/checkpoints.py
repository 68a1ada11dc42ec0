"""Training checkpoints that survive a kill at any moment: self-checking files, the last two kept, and one in the end."""

from __future__ import annotations

import io
import logging
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from research.distributed import ALONE, World
from research.errors import first_line
from research.storage.files import is_as_written, remove_litter, write_checked

log = logging.getLogger(__name__)
KEPT = 2
# What torch.load and the unpickler under it raise for bytes that are no checkpoint, or not of this torch.
UNREADABLE = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, EOFError, struct.error, pickle.UnpicklingError,
)  # fmt: skip


class CheckpointFolder:
    """A folder of `step-<global step>.<SHA-256>.ckpt` files in torch's format, used by one process at a time.

    Args:
        identity: Names what is trained on what. A checkpoint of another identity, as of a table that was
            edited since, is not used.
        world: The processes that train together: the first writes, all read.
        of_each: Whether every process has a state of its own, as pieces of a sharded model: each writes and reads a
            folder of its own then, below this one.
    """

    def __init__(self, folder: Path, identity: str = "", world: World = ALONE, *, of_each: bool = False) -> None:
        self.folder = folder / f"process_{world.rank}" if of_each else folder
        self.identity = identity
        self.world = world
        self.of_each = of_each

    def save(self, state: dict[str, Any], step: int, *, last: bool = False) -> None:
        """Write the state of `step`; older files go only once the new one is safely on the disk.

        Processes do not wait for each other here, as one may have been interrupted alone.

        Args:
            last: Whether none is to follow; then no older one stays either, but for one of each process, which the
                others may need.

        Raises:
            OSError: it could not be written, as on a full disk; the older checkpoints are as they were.
        """
        if self.world.rank and not self.of_each:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_litter(self.folder)
        # Through memory, since torch turns the OSError of a full disk into an error of its own.
        buffer = io.BytesIO()
        torch.save(state | {"identity": self.identity}, buffer)
        path = write_checked(self.folder, f"step-{step:010d}", ".ckpt", buffer.getbuffer())
        others = [other for other in self._newest_first() if other != path]
        for old in others[0 if last and not self.of_each else KEPT - 1 :]:
            old.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Return the newest intact state, None when there is none; of each process's, the newest that all have.

        A damaged file is named in a warning, set aside as `*.damaged`, and the one before it is used.
        """
        if not self.of_each:
            found = self.world.lead(lambda: next(self._find_intact(), None))
            return None if found is None else _read(found, self.identity)
        intact = {path.name.split(".")[0]: path for path in self._find_intact()}
        common = set.intersection(*map(set, self.world.gather_everywhere(sorted(intact))))
        # A process that was interrupted alone may be one ahead of the others; it would count as newer than what comes.
        for step in intact.keys() - common:
            intact[step].unlink()
        return _read(intact[max(common)], self.identity) if common else None

    def _find_intact(self) -> Iterator[Path]:
        for path in self._newest_first():
            try:
                _read(path, self.identity)
                yield path
            except UNREADABLE as error:
                log.warning("checkpoint %s cannot be used (%s): going back to the one before it", path, first_line(error))
                # Out of the way, or it would count as the newest when the next save drops the oldest.
                path.rename(path.with_suffix(".damaged"))

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.ckpt"), reverse=True)


def _read(path: Path, identity: str) -> dict[str, Any]:
    """Return a checkpoint's state; whatever is wrong with the file raises."""
    if not is_as_written(path):
        raise ValueError("its bytes changed since it was written")
    # weights_only: a checkpoint from a hostile hand must not be able to run code.
    state = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not the state of a training")
    if state.pop("identity", None) != identity:
        raise ValueError("it belongs to other data, another teacher or other library versions")
    return state
