"""research_cache.py lists what runs keep, deletes what it is told to and nothing else, and refuses in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.builders import ROOT

import research_cache
from research.storage import inventory
from research.storage.cache import Cache

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inventory, "list_used", lambda root: set())
    monkeypatch.setattr(research_cache, "list_used", lambda root: set())
    for kind, days in (("tokens", 40), ("teachers", 20), ("logits", 0)):
        entry = Cache(tmp_path / "cache").fetch(kind, {"days": days}, lambda folder, _scratch: (folder / "data").touch())
        then = entry.stat().st_mtime - days * 86400
        os.utime(entry / "manifest.json", (then, then))
    return tmp_path / "cache"


def kinds(cache: Path) -> list[str]:
    return sorted(path.parts[-3] for path in cache.glob("*/*/manifest.json"))


def test_list_says_what_there_is_and_changes_nothing(cache: Path, capsys: Capture) -> None:
    assert research_cache.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4].split("/")[0] for line in lines[:-1]] == ["tokens", "teachers", "logits"]
    assert "40.0 days" in lines[0] and lines[0].endswith("days=40")
    assert lines[-1] == "cache  3 entries, 0.000 GB"
    assert research_cache.main(["list", "--kind", "teachers"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert kinds(cache) == ["logits", "teachers", "tokens"]


def test_prune_deletes_what_its_flags_choose(cache: Path, capsys: Capture) -> None:
    assert research_cache.main(["prune", "--older_than", "30", "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("cache  1 entries would be deleted")
    assert len(kinds(cache)) == 3
    assert research_cache.main(["prune", "--older_than", "30"]) == 0
    assert kinds(cache) == ["logits", "teachers"]
    assert research_cache.main(["prune", "--kind", "logits"]) == 0
    assert kinds(cache) == ["teachers"]
    assert research_cache.main(["prune", "--keep_gb", "0"]) == 0
    assert kinds(cache) == []


def test_what_is_in_use_is_named_and_stays(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    (logits,) = (entry.name for entry in inventory.list_entries(cache) if entry.kind == "logits")
    for room in (inventory, research_cache):
        monkeypatch.setattr(room, "list_used", lambda root: {logits})
    assert research_cache.main(["prune", "--keep_gb", "0"]) == 0
    assert f"{logits}: in use, left alone" in capsys.readouterr().err
    assert kinds(cache) == ["logits"]
    assert research_cache.main(["list"]) == 0
    assert f"{logits}  in use" in capsys.readouterr().out
    (cache / f"{logits}.work").mkdir()  # what its builder keeps meanwhile
    assert research_cache.main(["list"]) == 0
    assert f"{logits}.work  in use  unfinished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("list --cache_dir absent", "--cache_dir: no such folder: absent. Give the --cache_dir of your runs."),
        ("list --kind token", "--kind: cache holds no token; there are logits, teachers, tokens."),
        ("prune", "prune: say what may go: --older_than, --keep_gb or --kind"),
    ],
)
def test_mistake_is_one_line_and_deletes_nothing(cache: Path, flags: str, problem: str, capsys: Capture) -> None:
    assert research_cache.main(flags.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {problem}") and errors.count("\n") == 1
    assert len(kinds(cache)) == 3


@pytest.mark.parametrize("value", ["-1", "nan", "x"])
def test_limit_that_is_none_is_refused(cache: Path, value: str) -> None:
    with pytest.raises(SystemExit) as caught:
        research_cache.main(["prune", "--keep_gb", value])
    assert caught.value.code == 2


def test_command_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, research_cache; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
