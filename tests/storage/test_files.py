"""Files and folders are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from research.storage import files
from research.storage.files import hash_tree, link_folder, publish_folder, remove, remove_litter, write_atomic


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Make every file end after `room` bytes: a write past it fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def make_folder(folder: Path, content: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights.bin").write_text(content)
    (folder / "config.json").write_text(content)
    return folder


def test_write_replaces_the_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_atomic(path, b"old")
    write_atomic(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["metrics.json"]


def test_full_disk_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_atomic(path, b"old")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_atomic(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["metrics.json"]


def test_bytes_reach_the_disk_before_their_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def record(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(*arguments: object) -> None:
            events.append(name)
            real(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, record(name))
    write_atomic(tmp_path / "metrics.json", b"content")
    assert events == ["fsync", "replace", "fsync"]


def test_published_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    final = make_folder(tmp_path / "student", "old")
    (final / "stale.txt").write_text("old")
    publish_folder(make_folder(tmp_path / ".student.tmp", "new"), final)
    assert names(tmp_path) == ["student", "student/config.json", "student/deep", "student/deep/weights.bin"]
    assert (final / "deep" / "weights.bin").read_text() == "new"


def test_publishing_copes_with_what_a_killed_one_left(tmp_path: Path) -> None:
    final = make_folder(tmp_path / "student", "old")
    make_folder(tmp_path / ".student.old.tmp", "older")
    publish_folder(make_folder(tmp_path / ".student.tmp", "new"), final)
    assert (final / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_publishing_replaces_a_file_that_stands_where_the_folder_goes(tmp_path: Path) -> None:
    (tmp_path / "student").write_text("a file")
    publish_folder(make_folder(tmp_path / ".student.tmp", "new"), tmp_path / "student")
    assert (tmp_path / "student" / "config.json").read_text() == "new"


@pytest.mark.parametrize("steps", [0, 1])
def test_publishing_interrupted_before_any_rename_never_shows_half_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    final = make_folder(tmp_path / "student", "old")
    whole = hash_tree(final)
    make_folder(tmp_path / ".student.tmp", "new")
    real, left = os.replace, [steps]

    def replace(source: Path, target: Path) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            publish_folder(tmp_path / ".student.tmp", final)
    assert (hash_tree(final) if final.exists() else whole) == whole
    publish_folder(tmp_path / ".student.tmp", final)
    assert names(tmp_path) == ["student", "student/config.json", "student/deep", "student/deep/weights.bin"]


def test_litter_of_killed_processes_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".metrics.json.123.tmp").write_text("half")
    make_folder(tmp_path / ".student.tmp", "half")
    make_folder(tmp_path / "student", "whole")
    (tmp_path / "notes.tmp").write_text("the user's own")
    remove_litter(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"student", "notes.tmp"}


def test_removing_a_link_keeps_what_it_points_to(tmp_path: Path) -> None:
    target = make_folder(tmp_path / "outside", "kept")
    (tmp_path / "link").symlink_to(target)
    remove(tmp_path / "link")
    remove(tmp_path / "absent")
    assert (target / "config.json").read_text() == "kept"
    assert not (tmp_path / "link").is_symlink()


def test_tree_hash_changes_with_a_byte_and_with_a_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "weights")
    before = hash_tree(folder)
    assert list(before) == ["config.json", "deep/weights.bin"]
    (folder / "config.json").write_text("weightS")
    assert hash_tree(folder) != before
    (folder / "config.json").write_text("weights")
    assert hash_tree(folder) == before
    (folder / "config.json").rename(folder / "config2.json")
    assert hash_tree(folder) != before


@pytest.mark.parametrize("links_work", [True, False])
def test_linked_folder_holds_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links_work: bool) -> None:
    source = make_folder(tmp_path / "entry", "weights")
    if not links_work:

        def refuse(*_arguments: object) -> None:
            raise OSError("no hard links here")

        monkeypatch.setattr(files.os, "link", refuse)
    link_folder(source, tmp_path / "teacher")
    assert names(tmp_path / "teacher") == ["config.json", "deep", "deep/weights.bin"]
    assert os.path.samefile(source / "config.json", tmp_path / "teacher" / "config.json") is links_work
