"""Which process may write a place, told by files alone, so that it holds on a network file system too.

A claim is a file that names its owner. It is created by a hard link, which fails when the name is there, and touched by
its owner while that lives. What follows the claim of token T, its end or a takeover by another process, is a file
`<name>.T` created in the same way, so that one process alone can end or take over a claim, whoever else tries. Nothing is
ever renamed or overwritten: a process holds the place when its record is the last of those that can be reached from the
first. Its owner deletes them all, the first one first.

An owner on this machine is gone when its process is. One on another machine is gone when its claim has not been touched
for STALE_S by the clock of the file system, which is that of a file just written there: the clocks of the machines do
not matter.

filelock's SoftFileLease, which is like it, takes a dead owner's lease by exchanging two names. NFS and SMB cannot do that,
and there it would wait for ever for a node that has died.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from research.errors import INTERRUPTED

log = logging.getLogger(__name__)
HEARTBEAT_S = 15.0
STALE_S = 120.0
POLL_S = 0.2
# What a file system says that has no hard links.
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Owner:
    """A process that claims something.

    Attributes:
        machine: What process numbers are counted on: a boot of a machine and a namespace of processes.
        start: When the process began, so that another one with its number is not taken for it.
        token: Names this claim of the process; no other claim ever has it.
    """

    host: str
    machine: str
    pid: int
    start: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "a process that left no name"

    @property
    def is_here(self) -> bool:
        """Whether this machine knows if the process is alive."""
        return self.machine == machine_id()

    @property
    def is_alive(self) -> bool:
        """Whether a process of this machine is alive."""
        return process_start(self.pid) == self.start


def this_process() -> Owner:
    """Return the owner that a new claim of this process names."""
    pid = os.getpid()
    return Owner(socket.gethostname(), machine_id(), pid, process_start(pid) or "", secrets.token_hex(8))


@functools.cache
def machine_id() -> str:
    """Return what process numbers are counted on; host names are not enough, since containers share them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def process_start(pid: int) -> str | None:
    """Return when a process of this machine began, None when it is gone; empty where the system does not say."""
    if Path("/proc/self/stat").exists():
        try:
            # The name, in parentheses, may hold anything.
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    return ""


@dataclass(frozen=True)
class Record:
    """A claim as it lies on the disk, and when its owner touched it last."""

    path: Path
    owner: Owner
    mtime: float

    def is_held(self, now: float, stale_s: float) -> bool:
        """Whether its owner lives.

        Args:
            now: The time by the clock of the file system.
        """
        return self.owner.is_alive if self.owner.is_here else now - self.mtime <= stale_s


def read_record(path: Path) -> Record | None:
    """Return the claim in a file, None when there is no such file."""
    try:
        # Opened, not only asked for: a network file system then answers with what the file is now.
        with open(path, "rb") as file:
            content, status = file.read(), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError):  # of a version before this one, or without hard links still to be written
        owner = Owner("", "", 0, "", f"{status.st_ino:x}-{status.st_mtime_ns:x}")
    return Record(path, owner, status.st_mtime)


def end_process(path: Path, owner: Owner | None) -> None:
    """End this process, which wrote to a place that is another's now: it may not write a byte more."""
    what = f"was taken over by {owner}" if owner is not None else "was removed"
    log.critical("error: the claim %s %s; this process ends, and the work goes on there", path, what)
    os._exit(INTERRUPTED)


class Claim:
    """The right to write a place, held from `acquire` to `release`.

    Args:
        path: The file that stands for it.
        on_loss: Called in a thread of its own when another process has taken the claim over, as it may when this one
            stood still for longer than `stale_s`; with the new owner, None when the files are gone.
        heartbeat_s: Seconds between two touches.
        stale_s: Seconds without a touch after which an owner on another machine counts as gone.
    """

    def __init__(
        self,
        path: Path,
        on_loss: Callable[[Path, Owner | None], None] = end_process,
        heartbeat_s: float = HEARTBEAT_S,
        stale_s: float = STALE_S,
    ) -> None:
        self.path = path
        self.on_loss = on_loss
        self.heartbeat_s = heartbeat_s
        self.stale_s = stale_s
        self._record: Record | None = None
        self._released = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> bool:
        """Take the place unless another process holds it; say whether it is held now.

        Raises:
            OSError: the folder cannot be written.
        """
        assert self._record is None, "it is held already"
        owner = this_process()
        with self._written_aside(owner) as (temporary, now):
            while True:
                chain = self.chain()
                if chain and chain[-1].is_held(now, self.stale_s):
                    return False
                self._record = Record(self._follower(chain[-1].owner) if chain else self.path, owner, now)
                if not create_exclusively(temporary, self._record.path):
                    self._record = None  # another process was faster
                    return False
                if any(record.owner == owner for record in self.chain()):
                    break
                self._record.path.unlink(missing_ok=True)  # what it follows has been released meanwhile
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(self._record, self._released), daemon=True)
        self._heart.start()
        return True

    def release(self) -> None:
        """Let others have the place; harmless when it is not held."""
        record, self._record = self._record, None
        if record is None:
            return
        self._released.set()
        if self._heart is not None and self._heart is not threading.current_thread():
            self._heart.join()
        with contextlib.suppress(OSError), self._written_aside(this_process()) as (temporary, _):
            if not create_exclusively(temporary, self._follower(record.owner)):
                return  # it was taken over
        with contextlib.suppress(OSError):
            for passed in self.chain():
                passed.path.unlink(missing_ok=True)

    def holder(self) -> Owner | None:
        """Return who holds the place, this process included, None when it is free or its owner is gone.

        Raises:
            OSError: the folder cannot be written, as it must be to read its clock.
        """
        chain = self.chain()
        if not chain:
            return None
        if chain[-1].owner.is_here:
            return chain[-1].owner if chain[-1].owner.is_alive else None
        with self._written_aside(this_process()) as (_, now):
            return chain[-1].owner if chain[-1].is_held(now, self.stale_s) else None

    def chain(self) -> list[Record]:
        """Return the first record and all that follow it; the last one's owner holds the place."""
        found: list[Record] = []
        path = self.path
        while (record := read_record(path)) is not None:
            found.append(record)
            path = self._follower(record.owner)
        return found

    def _follower(self, owner: Owner) -> Path:
        return self.path.with_name(f"{self.path.name}.{owner.token}")

    @contextlib.contextmanager
    def _written_aside(self, owner: Owner) -> Iterator[tuple[Path, float]]:
        """Write a record to a file that no one looks at, and give its path and the time by the file system's clock."""
        temporary = self.path.with_name(f".{self.path.name.lstrip('.')}.{owner.token}.tmp")
        try:
            try:
                temporary.write_bytes(json.dumps(asdict(owner)).encode())
            except OSError as error:
                error.filename = str(self.path)  # a failed write names no file
                raise
            yield temporary, temporary.stat().st_mtime
        finally:
            temporary.unlink(missing_ok=True)

    def _beat(self, record: Record, released: threading.Event) -> None:
        """Touch the claim until it is released, and notice when it is another's."""
        while not released.wait(self.heartbeat_s):
            try:
                chain = self.chain()
                if chain and chain[-1].owner == record.owner:
                    os.utime(record.path)
                    continue
            except OSError:  # a file system that is away for a while; whether the claim still stands is seen afterwards
                continue
            if not released.is_set():
                self.on_loss(self.path, chain[-1].owner if chain else None)
            return


def create_exclusively(temporary: Path, place: Path) -> bool:
    """Give a written file a second name; False when that name is there already, or the file is gone.

    Raises:
        OSError: for anything else.
    """
    try:
        os.link(temporary, place)
    except FileExistsError:
        # Where the answer to a link that was made is lost, a network file system asks for it again.
        with contextlib.suppress(FileNotFoundError):
            return temporary.stat().st_nlink == 2
        return False
    except FileNotFoundError:  # whoever holds the place has cleared it of what killed processes left
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with contextlib.suppress(FileExistsError), open(place, "xb") as file:
            file.write(temporary.read_bytes())
            return True
        return False
    return True


@contextlib.contextmanager
def waiting_claim(path: Path, what: str) -> Iterator[None]:
    """Hold a claim inside, saying once that another process has it while there is one to wait for."""
    claim = Claim(path)
    if not claim.acquire():
        log.info("waiting for another process to finish %s", what)
        while not claim.acquire():
            time.sleep(POLL_S)
    try:
        yield
    finally:
        claim.release()


def remove_dead_claims(folder: Path) -> None:
    """Delete the claims in a folder that processes which have died left there, and what they wrote aside for them."""
    with contextlib.suppress(OSError):
        for path in folder.glob("*.lock"):
            claim = Claim(path)
            if claim.acquire():
                claim.release()
        # Beside what was written aside, records that nothing leads to any more.
        orphans = (path for path in folder.glob("*.lock.*") if not path.with_suffix("").exists())
        for path in (*folder.glob(".*lock.*.tmp"), *orphans):
            record = read_record(path)
            if record is not None and not record.is_held(time.time(), STALE_S):
                path.unlink(missing_ok=True)
