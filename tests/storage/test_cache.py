"""A cache entry is whole, right and built once, whatever happens to it and whoever else wants it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from research.errors import InputError
from research.storage.cache import MANIFEST, Cache, digest_key, find_fault

ROOT = Path(__file__).resolve().parents[2]
KEY = {"text": "a5c1", "max_length": 128, "words": {"student": "x", "teacher": "y"}}
FILES = {"ids.bin": bytes(range(64)), "model/offsets.bin": b"\x00\x01"}

# Builds KEY's entry, saying when it has begun, and goes on once its standard input is closed.
BUILDER = f"""
import logging, sys
from pathlib import Path
from research.storage.cache import Cache

logging.basicConfig(level=logging.INFO, format="%(message)s")

def build(folder, scratch):
    (scratch / "checkpoint").write_text("half way")
    (folder / "ids.bin").write_bytes({FILES["ids.bin"]!r})
    print("building", flush=True)
    sys.stdin.read()
    (folder / "model").mkdir()
    (folder / "model" / "offsets.bin").write_bytes({FILES["model/offsets.bin"]!r})

print(Cache(Path(sys.argv[1])).fetch("tokens", {KEY!r}, build))
"""


class Counting:
    """A build that writes FILES and remembers the scratch content it was given."""

    def __init__(self) -> None:
        self.scratch: list[list[str]] = []

    def __call__(self, folder: Path, scratch: Path) -> None:
        self.scratch.append(sorted(path.name for path in scratch.iterdir()))
        for name, content in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def start_builder(root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(root)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_line(stream: Any) -> str:
    assert stream is not None
    return stream.readline().strip()


def assert_whole(entry: Path) -> None:
    assert {name: (entry / name).read_bytes() for name in FILES} == FILES
    assert find_fault(entry, KEY) is None


def litter(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "tokens").iterdir() if path.suffix in (".new", ".work", ".tmp"))


def flip_first_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def truncate_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def append_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\x00")


def swap_for_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [flip_first_byte, truncate_to_half, append_byte, Path.unlink, swap_for_folder]


def test_entry_is_built_once_and_then_found(tmp_path: Path) -> None:
    build = Counting()
    entry = Cache(tmp_path).fetch("tokens", KEY, build)
    assert Cache(tmp_path).fetch("tokens", KEY, build) == entry
    assert_whole(entry)
    assert len(build.scratch) == 1
    assert litter(tmp_path) == []


def test_order_of_the_keys_fields_does_not_matter() -> None:
    shuffled = {"words": {"teacher": "y", "student": "x"}, "max_length": 128, "text": "a5c1"}
    assert digest_key(shuffled) == digest_key(KEY)


@pytest.mark.parametrize(
    "change", [{"max_length": 129}, {"max_length": "128"}, {"words": {"student": "y", "teacher": "x"}}, {"extra": None}]
)
def test_any_changed_field_of_the_key_is_another_entry(tmp_path: Path, change: dict[str, Any]) -> None:
    cache = Cache(tmp_path)
    assert cache.fetch("tokens", KEY, Counting()) != cache.fetch("tokens", KEY | change, Counting())


def test_key_may_hold_a_path_that_is_no_utf8(tmp_path: Path) -> None:
    key = {"model": os.fsdecode(b"models/\xff")}
    entry = Cache(tmp_path).fetch("tokens", key, Counting())
    assert find_fault(entry, key) is None


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_rebuilt_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    entry = Cache(tmp_path).fetch("tokens", KEY, Counting())
    damage(entry / name)
    build = Counting()
    with caplog.at_level(logging.WARNING):
        assert Cache(tmp_path).fetch("tokens", KEY, build) == entry
    assert_whole(entry)
    assert len(build.scratch) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(entry) in caplog.text
    assert Path(name).name in caplog.text
    assert litter(tmp_path) == []


def test_every_flipped_bit_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    entry = Cache(tmp_path).fetch("tokens", KEY, Counting())
    whole = (entry / MANIFEST).read_bytes()
    for position in range(len(whole)):
        flipped = bytes([whole[position] ^ (1 << position % 8)])
        (entry / MANIFEST).write_bytes(whole[:position] + flipped + whole[position + 1 :])
        assert find_fault(entry, KEY) is not None, f"byte {position}"


def test_added_file_is_noticed(tmp_path: Path) -> None:
    entry = Cache(tmp_path).fetch("tokens", KEY, Counting())
    (entry / "stranger.bin").write_bytes(b"")
    assert find_fault(entry, KEY) == "stranger.bin changed since it was written"


def test_entry_of_another_key_under_the_right_name_is_refused(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    right, other = cache.fetch("tokens", KEY, Counting()), cache.fetch("tokens", {"text": "b"}, Counting())
    (other / "ids.bin").write_bytes(b"of another text")
    right.rename(tmp_path / "aside")
    other.rename(right)
    assert_whole(Cache(tmp_path).fetch("tokens", KEY, Counting()))


def test_file_in_the_place_of_an_entry_is_replaced(tmp_path: Path) -> None:
    entry = tmp_path / "tokens" / digest_key(KEY)[:32]
    entry.parent.mkdir()
    entry.write_text("not a folder")
    assert_whole(Cache(tmp_path).fetch("tokens", KEY, Counting()))


def test_entry_deleted_under_a_running_process_is_rebuilt(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entry = cache.fetch("tokens", KEY, Counting())
    for path in sorted(entry.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    entry.rmdir()
    assert_whole(cache.fetch("tokens", KEY, Counting()))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_build_leaves_its_scratch_folder_and_no_half_entry(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path, scratch: Path) -> None:
        (folder / "ids.bin").write_bytes(b"half")
        (scratch / "checkpoint").write_bytes(b"step 100")
        raise error

    with pytest.raises(type(error)):
        Cache(tmp_path).fetch("tokens", KEY, fail)
    assert [Path(name).suffix for name in litter(tmp_path)] == [".work"]
    build = Counting()
    assert_whole(Cache(tmp_path).fetch("tokens", KEY, build))
    assert build.scratch == [["checkpoint"]]
    assert litter(tmp_path) == []


def test_failed_build_without_scratch_files_leaves_nothing(tmp_path: Path) -> None:
    def fail(_folder: Path, _scratch: Path) -> None:
        raise ValueError("a fault in the text")

    with pytest.raises(ValueError, match="a fault in the text"):
        Cache(tmp_path).fetch("tokens", KEY, fail)
    assert litter(tmp_path) == []


def refuse_short_ids(folder: Path) -> None:
    """A reader that knows how many ids there have to be."""
    if (size := (folder / "ids.bin").stat().st_size) != 64:
        raise ValueError(f"{size} ids")


def test_entry_that_its_reader_cannot_use_is_built_again_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def build_torn(folder: Path, scratch: Path) -> None:
        Counting()(folder, scratch)
        truncate_to_half(folder / "ids.bin")

    entry = Cache(tmp_path).fetch("tokens", KEY, build_torn)
    assert find_fault(entry, KEY) is None, "its manifest is that of the torn file"
    build = Counting()
    for _ in range(2):
        assert Cache(tmp_path).fetch("tokens", KEY, build, refuse_short_ids) == entry
    assert_whole(entry)
    assert len(build.scratch) == 1
    assert [record.getMessage() for record in caplog.records] == [f"cache entry {entry} is damaged (32 ids): building it again"]


def test_entry_that_cannot_be_read_back_is_never_put_into_place(tmp_path: Path) -> None:
    def build_nothing(_folder: Path, _scratch: Path) -> None:
        pass

    with pytest.raises(OSError, match=r"cannot be read back \(.*ids\.bin") as caught:
        Cache(tmp_path).fetch("tokens", KEY, build_nothing, refuse_short_ids)
    assert caught.value.filename == str(tmp_path / "tokens" / digest_key(KEY)[:32])
    assert litter(tmp_path) == []
    assert not Path(caught.value.filename).exists()


def test_entry_altered_while_this_process_lives_is_noticed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entry = cache.fetch("tokens", KEY, Counting())
    cache.check_unchanged(entry)
    flip_first_byte(entry / "ids.bin")
    with pytest.raises(InputError, match=f"cache entry {entry} was changed while it was in use"):
        cache.check_unchanged(entry)
    build = Counting()
    assert cache.fetch("tokens", KEY, build) == entry
    assert_whole(entry)
    cache.check_unchanged(entry)


def test_second_process_waits_and_uses_what_the_first_one_built(tmp_path: Path) -> None:
    with start_builder(tmp_path) as builder:
        assert read_line(builder.stdout) == "building"
        with start_builder(tmp_path) as waiter:
            assert "waiting for another process" in read_line(waiter.stderr)
            built, _ = builder.communicate(timeout=20)
            found, _ = waiter.communicate(timeout=20)
    assert builder.returncode == waiter.returncode == 0
    assert found == built, "the second process built the entry again"
    assert_whole(Path(found.strip()))


def test_killed_builder_leaves_nothing_that_looks_finished_and_its_lock_is_free(tmp_path: Path) -> None:
    with start_builder(tmp_path) as killed:
        assert read_line(killed.stdout) == "building"
        killed.kill()
    assert not (tmp_path / "tokens" / digest_key(KEY)[:32]).exists()
    build = Counting()
    assert_whole(Cache(tmp_path).fetch("tokens", KEY, build))
    assert build.scratch == [["checkpoint"]]
    assert litter(tmp_path) == []


def test_half_entry_of_a_killed_builder_goes_with_the_next_build_and_its_scratch_stays(tmp_path: Path) -> None:
    with start_builder(tmp_path) as killed:
        assert read_line(killed.stdout) == "building"
        killed.kill()
    assert [Path(name).suffix for name in litter(tmp_path)] == [".new", ".work"]
    Cache(tmp_path).fetch("tokens", {"text": "another"}, Counting())
    assert [Path(name).suffix for name in litter(tmp_path)] == [".work"]


def test_half_entry_of_a_living_builder_is_left_alone(tmp_path: Path) -> None:
    with start_builder(tmp_path) as builder:
        assert read_line(builder.stdout) == "building"
        Cache(tmp_path).fetch("tokens", {"text": "another"}, Counting())
        entry, _ = builder.communicate(timeout=20)
    assert builder.returncode == 0
    assert_whole(Path(entry.strip()))
