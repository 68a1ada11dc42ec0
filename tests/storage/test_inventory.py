"""What a cache holds is listed as it was made, and only what nobody uses is deleted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.builders import ROOT

from research.storage import inventory
from research.storage.cache import Cache, digest_key, list_used
from research.storage.claims import Claim
from research.storage.inventory import choose_entries, delete_entry, list_entries

DAY_S = 86400.0
# Fetches an entry, says so, and works with it until it is killed.
WORKER = """
import sys, time
from pathlib import Path
from research.storage.cache import Cache

Cache(Path(sys.argv[1])).fetch("tokens", {"max_length": 32}, lambda folder, scratch: None)
print("fetched", flush=True)
time.sleep(60)
"""


def make_entry(root: Path, kind: str, size: int, age_days: float = 0.0, **key: object) -> Path:
    def write(folder: Path, _scratch: Path) -> None:
        (folder / "data.bin").write_bytes(bytes(size))

    entry = Cache(root).fetch(kind, key, write)
    then = entry.stat().st_mtime - age_days * DAY_S
    os.utime(entry / "manifest.json", (then, then))
    return entry


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has fetched is not in use."""
    monkeypatch.setattr(inventory, "list_used", lambda root: set())


def test_entries_are_listed_with_size_age_and_origin(tmp_path: Path) -> None:
    hashes = {"text": "ab" * 32, "nested": {"teacher_epochs": 3, "model": {"weights": "cd" * 32}}, "unset": None}
    teacher = make_entry(tmp_path, "teachers", 5000, age_days=3, lr=0.001, **hashes)
    tokens = make_entry(tmp_path, "tokens", 100, max_length=32)
    (tmp_path / "demo" / "teacher").mkdir(parents=True)
    (tmp_path / "logits" / f"{'0' * 32}.work").mkdir(parents=True)
    entries = list_entries(tmp_path)
    assert [entry.path for entry in entries[:2]] == [teacher, tokens]
    assert [entry.origin for entry in entries] == ["lr=0.001 teacher_epochs=3", "max_length=32", "unfinished"]
    assert entries[0].size == 5000 + (teacher / "manifest.json").stat().st_size
    assert entries[1].written_s - entries[0].written_s == pytest.approx(3 * DAY_S, abs=60)
    assert [entry.kind for entry in entries] == ["teachers", "tokens", "logits"]


def test_entry_whose_manifest_cannot_be_read_is_listed_all_the_same(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "tokens", 1, max_length=32)
    (entry / "manifest.json").write_bytes(b"\xff[")
    assert [found.origin for found in list_entries(tmp_path)] == ["unknown"]


def test_the_old_go_and_then_the_oldest_until_the_rest_fits(tmp_path: Path) -> None:
    for days in (30, 20, 10, 0):
        make_entry(tmp_path, "logits", 1_000_000, age_days=days, days=days)
    entries = list_entries(tmp_path)
    now_s = entries[-1].written_s + 1

    def chosen(**limits: float) -> list[str]:
        return [entry.origin for entry in choose_entries(entries, now_s, **limits)]

    assert chosen() == ["days=30", "days=20", "days=10", "days=0"]
    assert chosen(older_than_days=15) == ["days=30", "days=20"]
    assert chosen(keep_gb=0.0031) == ["days=30"]
    assert chosen(older_than_days=25, keep_gb=0.0021) == ["days=30", "days=20"]
    assert chosen(keep_gb=1) == []
    assert len(chosen(keep_gb=0)) == 4


def test_entry_that_a_living_process_works_with_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "fetched\n"
        (entry,) = list_entries(tmp_path)
        assert list_used(tmp_path) == {entry.name}
        assert not delete_entry(entry, tmp_path)
        assert entry.path.is_dir()
        worker.kill()
    assert list_used(tmp_path) == set()
    assert delete_entry(entry, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_process_that_has_ended_by_itself_uses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER.replace("time.sleep(60)", ""), str(tmp_path)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert list((tmp_path / ".users").iterdir()) == []


def test_entry_that_is_being_built_stays(tmp_path: Path, unused: None) -> None:
    make_entry(tmp_path, "tokens", 1, max_length=32)
    (entry,) = list_entries(tmp_path)
    claim = Claim(entry.path.with_suffix(".lock"))
    assert claim.acquire()
    assert not delete_entry(entry, tmp_path)
    claim.release()
    assert delete_entry(entry, tmp_path)


def test_entry_that_a_run_begins_to_use_while_it_is_deleted_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_entry(tmp_path, "tokens", 1, max_length=32)
    (entry,) = list_entries(tmp_path)
    answers = iter([set(), {entry.name}])
    monkeypatch.setattr(inventory, "list_used", lambda root: next(answers))
    assert not delete_entry(entry, tmp_path)
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [digest_key({"max_length": 32})[:32]]


def test_scratch_of_a_killed_builder_can_be_deleted(tmp_path: Path, unused: None) -> None:
    scratch = tmp_path / "teachers" / f"{'0' * 32}.work"
    scratch.mkdir(parents=True)
    (scratch / "step-1.ckpt").touch()
    (entry,) = list_entries(tmp_path)
    assert delete_entry(entry, tmp_path)
    assert not scratch.exists()


def test_cache_that_cannot_be_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = make_entry(tmp_path, "tokens", 1, max_length=32)

    def refuse(*_arguments: object) -> bool:
        raise PermissionError("read-only")

    monkeypatch.setattr(Claim, "acquire", refuse)
    assert Cache(tmp_path).fetch("tokens", {"max_length": 32}, lambda folder, scratch: pytest.fail("built")) == entry
