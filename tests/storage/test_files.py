"""Files and folders are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_injection import file_size_limit

from research.storage import files
from research.storage.files import copy_folder, hash_tree, publish_folder, remove, remove_litter, write_atomic


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
    with file_size_limit(1000), pytest.raises(OSError, match="File too large"):
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


def refuse_ranges(*_arguments: object) -> int:
    raise OSError("this file system copies no ranges")


def copy_one_range(*arguments: int) -> int:
    """Copy ten bytes, then refuse, as between two file systems of which one fills up its quota of shared blocks."""
    copied = [] if os.lseek(arguments[0], 0, os.SEEK_CUR) else [real_copy_file_range(arguments[0], arguments[1], 10)]
    return copied[0] if copied else refuse_ranges()


real_copy_file_range = os.copy_file_range


@pytest.mark.parametrize("copy", [real_copy_file_range, refuse_ranges, copy_one_range])
def test_copied_folder_holds_the_same_bytes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: Callable[..., int]
) -> None:
    source = make_folder(tmp_path / "entry", "weights of a model")
    monkeypatch.setattr(files.os, "copy_file_range", copy)
    copy_folder(source, tmp_path / "teacher")
    assert hash_tree(tmp_path / "teacher") == hash_tree(source)
    assert names(tmp_path / "teacher") == ["config.json", "deep", "deep/weights.bin"]
    with open(tmp_path / "teacher" / "config.json", "r+") as file:
        file.write("edited")
    assert (source / "config.json").read_text() == "weights of a model"


def test_copy_that_does_not_fit_on_the_disk_is_an_error(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "entry", "weights" * 1000)
    with file_size_limit(6999), pytest.raises(OSError, match="File too large"):
        copy_folder(source, tmp_path / "teacher")
