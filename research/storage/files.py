"""Files and folders that are whole or absent: written aside, flushed to the disk, then renamed into place.

What stands aside is named `.*.tmp`, so what a killed process leaves is known for what it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from research.errors import InputError

COPY_BYTES = 1 << 24


class Stamp(NamedTuple):
    """What changes when a file does, and can be had without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def check_working_folder() -> None:
    """Make sure that the folder which relative paths start from is there.

    Raises:
        InputError: it was deleted.
    """
    try:
        os.getcwd()
    except OSError:
        raise InputError("the working directory is not there any more; change to another one (cd) first") from None


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Replace `path` by `content` so that a reader, or a crash, sees the old bytes or the new ones.

    Raises:
        OSError: as for any write, a full disk included; `path` is as it was and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A failed write itself names no file.
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def write_checked(folder: Path, stem: str, suffix: str, content: bytes | memoryview) -> Path:
    """Write a file with its bytes' SHA-256 in its name, `<stem>.<SHA-256><suffix>`, as `write_atomic` does; return its path.

    The checksum is part of the name, so no second file can disagree with it.
    """
    path = folder / f"{stem}.{hashlib.sha256(content).hexdigest()}{suffix}"
    write_atomic(path, content)
    return path


def is_as_written(path: Path) -> bool:
    """Whether a file of `write_checked` still has the bytes that its name tells of."""
    return hash_file(path) == path.name.split(".")[1]


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut (a rename is only as durable as its folder)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(root))


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place, replacing what stands there.

    The old one is renamed away before it is deleted: a reader finds it whole, or finds nothing for a
    moment, or finds the new one, but never a half of either.
    """
    flush_tree(temporary)
    displaced = final.with_name(f".{final.name}.old.tmp")
    remove(displaced)
    if os.path.lexists(final):
        os.replace(final, displaced)
    os.replace(temporary, final)
    flush_folder(final.parent)
    remove(displaced)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all it holds; what is not there needs no deleting."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_litter(folder: Path) -> None:
    """Delete what killed processes left aside in a folder that no other process is writing to."""
    for path in folder.glob(".*.tmp"):
        remove(path)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_file(path: Path) -> Stamp:
    """Return a file's stamp, that of its target for a link."""
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def stamp_tree(folder: Path) -> dict[str, Stamp]:
    """Return {relative path: stamp} of every file below `folder`."""
    stamps = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just replaced the folder
            if path.is_file():
                stamps[path.relative_to(folder).as_posix()] = stamp_file(path)
    return stamps


def hash_tree(folder: Path) -> dict[str, str]:
    """Return {relative path: SHA-256} of every file below `folder`, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}


def copy_folder(source: Path, target: Path) -> None:
    """Write copies of a folder's files to another, so that editing one in place leaves the other as it is."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if not path.is_dir():
            copy.parent.mkdir(parents=True, exist_ok=True)
            _copy_file(path, copy)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes; file systems that share blocks until they are written (Btrfs, XFS) take no space for them."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        with contextlib.suppress(OSError, AttributeError):  # this file system, or this system, copies no ranges
            while os.copy_file_range(reader.fileno(), writer.fileno(), COPY_BYTES):
                pass
        # Whatever is left, from where the copying of ranges came to.
        shutil.copyfileobj(reader, writer, COPY_BYTES)
