"""Several processes that find each other as those of torchrun do, forked from the server that has torch already."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.builders import QUICK_EXTRAS
from support.fault_injection import TIMEOUT_S, fork_server


class Ranks:
    """Processes that run a function of their world, or the command, side by side."""

    def __init__(self, size: int, target: Callable[..., Any], *args: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [fork_server().Process(target=_start, args=(rank, size, port, target, args)) for rank in range(size)]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int | None]:
        """Return how each process ended; minus the signal that killed it."""
        for process in self.processes:
            process.join(TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]


def launch(folder: Path, flags: Sequence[str], size: int = 2) -> Ranks:
    """Start the command in a folder, as torchrun does; each process writes its stderr to a file there."""
    return Ranks(size, run_command, folder, list(flags))


def said(folder: Path, rank: int = 0) -> str:
    """Return what a process of `launch` wrote to stderr."""
    return (folder / f"stderr_{rank}.txt").read_text(encoding="utf-8")


def run_command(folder: Path, flags: list[str]) -> None:
    """Be one process of `launch`."""
    import research_main

    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}_{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.exit(research_main.main(flags, QUICK_EXTRAS))


def _start(rank: int, size: int, port: int, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        TORCHELASTIC_RUN_ID="test",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        GROUP_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    target(*args)
