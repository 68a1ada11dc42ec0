"""What a sweep shares on disk: entries named by the hash of what they were made from.

An entry is a folder `<cache>/<kind>/<hash>/` with a manifest of its key and its files' checksums. It is
built under a claim in a folder of its own and renamed into place, so other processes see it whole or not
at all. Deleting the cache loses nothing but time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from research.distributed import ALONE, World
from research.errors import InputError, first_line
from research.storage.claims import Claim, remove_dead_claims, waiting_claim
from research.storage.files import Stamp, hash_tree, publish_folder, remove, stamp_tree, write_atomic

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
POLL_S = 0.2
# How long a network's file system may take to show one machine what another has written.
VISIBLE_S = 60.0
# What opening an entry raises when its files, though they are those that were written, do not fit each other.
UNUSABLE = (OSError, ValueError, LookupError, TypeError)
Build = Callable[[Path, Path], None]
Join = Callable[[Path], object]
Check = Callable[[Path], object]


def digest_key(key: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a key, independent of the order of its fields."""
    return hashlib.sha256(_canonical(key)).hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    # ASCII, since a path in a key may hold bytes that are no UTF-8.
    return json.dumps(value, sort_keys=True).encode("ascii")


class Cache:
    """A folder of content-addressed entries shared by any number of processes.

    Args:
        root: The folder.
        world: The processes of one run. The first looks for an entry and writes it; all return it together.
    """

    def __init__(self, root: Path, world: World = ALONE) -> None:
        self.root = root
        self.world = world
        self._verified: dict[Path, dict[str, Stamp]] = {}

    def fetch(self, kind: str, key: Mapping[str, Any], build: Build, check: Check = Path.stat, join: Join | None = None) -> Path:
        """Return the entry's folder, building it when it is missing or damaged.

        Args:
            kind: The sort of entry, a folder name such as "tokens".
            key: Everything the entry's bytes depend on, as JSON values.
            build: Called as build(folder, scratch) to fill `folder`. `scratch` outlives a killed
                process until the entry is finished, so a long build can resume from it.
            check: Opens a folder as its reader will and raises one of UNUSABLE when it cannot be used. An
                entry is checked before it is put into place, and one that fails counts as damaged.
            join: Called as join(scratch) by the other processes of the run when the first calls `build`, for what
                they compute together; None when it builds alone.

        Raises:
            OSError: the entry cannot be written, as on a full disk.
        """
        entry = self.root / kind / digest_key(key)[:32]
        if self.world.size == 1:
            return self._fetch(entry, key, build, check)
        if self.world.rank:
            self._follow(entry, join)
        else:

            def build_together(folder: Path, scratch: Path) -> None:
                self.world.share(True)
                build(folder, scratch)

            self._fetch(entry, key, build_together, check)
            self.world.share(False)
        return entry

    def _follow(self, entry: Path, join: Join | None) -> None:
        """Wait until the first process has the entry, and join in whenever it builds."""
        while self.world.share(True):
            if join is not None:
                join(entry.with_suffix(".work"))
        until_s = time.monotonic() + VISIBLE_S
        while not entry.is_dir():
            if time.monotonic() > until_s:
                raise InputError(f"--cache_dir: {self.root} on this machine is not the one that the first process writes")
            time.sleep(POLL_S)
        self._verified[entry] = stamp_tree(entry)

    def _fetch(self, entry: Path, key: Mapping[str, Any], build: Build, check: Check) -> Path:
        if self.is_unchanged(entry):
            return entry
        scratch = entry.with_suffix(".work")
        # Looked at before locking, so the runs of a sweep check a large entry side by side. Stamped before it is
        # looked at, so that a change in between is seen the next time.
        stamps = stamp_tree(entry)
        if find_fault(entry, key, check) is not None or scratch.exists():
            entry.parent.mkdir(parents=True, exist_ok=True)
            with waiting_claim(_claim_path(entry), str(entry)):
                stamps = stamp_tree(entry)
                fault = find_fault(entry, key, check)
                if fault is None:
                    remove(scratch)  # its builder was killed after finishing the entry
                else:
                    if entry.exists():
                        log.warning("cache entry %s is damaged (%s): building it again", entry, fault)
                    _build(entry, key, build, check)
                    stamps = stamp_tree(entry)
        self._verified[entry] = stamps
        return entry

    def find(self, kind: str, key: Mapping[str, Any]) -> Path | None:
        """Return an entry's folder when there is one; whether it is whole, `fetch` finds out."""
        entry = self.root / kind / digest_key(key)[:32]
        return entry if entry.is_dir() else None

    def is_unchanged(self, entry: Path) -> bool:
        """Whether this process has verified an entry and its files have not been touched since."""
        return entry in self._verified and entry.is_dir() and self._verified[entry] == stamp_tree(entry)

    def check_unchanged(self, entry: Path) -> None:
        """Make sure that what was just read of an entry is what was verified.

        Raises:
            InputError: its files were touched in between.
        """
        if not self.is_unchanged(entry):
            raise InputError(f"cache entry {entry} was changed while it was in use. Run the same command again.")


def _build(entry: Path, key: Mapping[str, Any], build: Build, check: Check) -> None:
    """Fill a new entry and put it into place; the caller holds its claim."""
    temporary, scratch = entry.with_suffix(".new"), entry.with_suffix(".work")
    remove(temporary)
    _remove_abandoned(entry.parent)
    try:
        temporary.mkdir()
        scratch.mkdir(exist_ok=True)
        build(temporary, scratch)
        if reason := _reason_against(temporary, check):
            raise OSError(errno.EIO, f"it was written, but cannot be read back ({reason})", str(entry))
        write_atomic(temporary / MANIFEST, _render_manifest(key, hash_tree(temporary)))
        publish_folder(temporary, entry)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(entry)  # a failed write names no file
        # Half an entry would only help to keep a full disk full; the scratch folder stays unless nothing is in it.
        remove(temporary)
        with contextlib.suppress(OSError):
            scratch.rmdir()
        raise
    remove(scratch)


def _claim_path(entry: Path) -> Path:
    """Return the file that stands for the right to build an entry."""
    return entry.with_suffix(".lock")


def _remove_abandoned(folder: Path) -> None:
    """Delete the half-built entries of processes that are gone, and their claims."""
    for temporary in folder.glob("*.new"):
        claim = Claim(_claim_path(temporary))
        if claim.acquire():
            remove(temporary)
            claim.release()
    remove_dead_claims(folder)


def _render_manifest(key: Mapping[str, Any], files: Mapping[str, str]) -> bytes:
    return _canonical({"key": key, "files": files})


def _reason_against(entry: Path, check: Check) -> str | None:
    """Say why an entry cannot be used by its reader, None when it can."""
    try:
        check(entry)
    except UNUSABLE as error:
        return first_line(error)
    return None


def find_fault(entry: Path, key: Mapping[str, Any], check: Check = Path.stat) -> str | None:
    """Say what is wrong with an entry, None when its bytes are those that were written for the key, and fit."""
    if not entry.is_dir():
        return "missing"
    try:
        stored = (entry / MANIFEST).read_bytes()
        present = hash_tree(entry)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    present.pop(MANIFEST, None)
    # Compared as bytes: an altered manifest has no way to be read as the right one.
    if stored == _render_manifest(key, present):
        return _reason_against(entry, check)
    try:
        listed = dict(json.loads(stored)["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} was altered"
    changed = sorted(name for name in {*present, *listed} if present.get(name) != listed.get(name))
    return f"{', '.join(changed[:3]) or MANIFEST} changed since it was written"
