"""What a cache holds, and what of it can go: no entry that is being built or that a living process works with."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.storage.cache import MANIFEST, USERS, claim_of, list_used
from research.storage.claims import Claim
from research.storage.files import remove

ENTRY = re.compile(r"[0-9a-f]{32}(\.new|\.work)?")
HASH = re.compile(r"[0-9a-f]{32,}")


@dataclass(frozen=True)
class Entry:
    """One entry of a cache.

    Attributes:
        name: Its folder's, below the cache.
        written_s: When it was finished, in seconds since 1970; of one that is not, when its folder changed last.
        key: What it was made from; empty while it is unfinished or when its manifest cannot be read.
        finished: Whether it is one that a run would use.
    """

    path: Path
    name: str
    size: int
    written_s: float
    key: Mapping[str, Any]
    finished: bool

    @property
    def kind(self) -> str:
        """The sort of entry, as "tokens"."""
        return self.path.parent.name

    @property
    def origin(self) -> str:
        """What it was made from in a line, without the hashes."""
        if not self.finished:
            return "unfinished"
        return " ".join(f"{name}={value}" for name, value in _flatten(self.key)) or "unknown"


def list_entries(root: Path) -> list[Entry]:
    """Return every entry of a cache, the oldest first; other folders in it, as the demo's, are none."""
    found = [entry for path in root.glob("*/*") if (entry := _read_entry(path)) is not None]
    return sorted(found, key=lambda entry: (entry.written_s, entry.name))


def choose_entries(
    entries: Sequence[Entry], now_s: float, older_than_days: float | None = None, keep_gb: float | None = None
) -> list[Entry]:
    """Return the entries that are too old, and the oldest of the others until what is left fits into a size.

    Args:
        entries: As `list_entries` returns them.
        keep_gb: In 10^9 bytes; without it and `older_than_days` all are chosen.
    """
    if older_than_days is None and keep_gb is None:
        return list(entries)
    total = sum(entry.size for entry in entries)
    chosen = []
    for entry in entries:
        too_old = older_than_days is not None and now_s - entry.written_s > older_than_days * 86400
        if too_old or (keep_gb is not None and total > keep_gb * 1e9):
            chosen.append(entry)
            total -= entry.size
    return chosen


def delete_entry(entry: Entry, root: Path) -> bool:
    """Delete an entry unless it is in use; say whether it is gone.

    Raises:
        OSError: it cannot be deleted.
    """
    claim = Claim(claim_of(entry.path))
    if not claim.acquire():
        return False
    try:
        if entry.path.with_suffix("").name in _used_names(root, entry.kind):
            return False
        # Out of the way at once, so that nobody finds half of it, and back if a run has just begun to look at it.
        aside = entry.path.with_name(f".{entry.path.name}.old.tmp")
        remove(aside)
        os.replace(entry.path, aside)
        if entry.path.with_suffix("").name in _used_names(root, entry.kind):
            os.replace(aside, entry.path)
            return False
        remove(aside)
    finally:
        claim.release()
    return True


def _used_names(root: Path, kind: str) -> set[str]:
    return {name for used, _, name in (note.partition("/") for note in list_used(root)) if used == kind}


def _read_entry(path: Path) -> Entry | None:
    if path.parent.name == USERS or not ENTRY.fullmatch(path.name):
        return None
    with contextlib.suppress(FileNotFoundError):  # it has just been deleted, or put into place
        manifest = path / MANIFEST
        finished = path.suffix == "" and manifest.is_file()
        written_s = (manifest if finished else path).stat().st_mtime
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        key = _read_key(manifest) if finished else {}
        return Entry(path, f"{path.parent.name}/{path.name}", size, written_s, key, finished)
    return None


def _read_key(manifest: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(manifest.read_text(encoding="ascii"))["key"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # the next run that needs it makes it again
        return {}


def _flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a key and of what is nested in it, but for hashes and what is unset."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value)
        elif value is not None and not HASH.search(str(value)):
            yield name, str(value).replace(" ", "")
