"""Every command prints what lets a shell complete its flags, and shows examples in its help."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.builders import ROOT

COMMANDS = ("research_main", "research_compare", "research_predict", "research_export", "research_cache")
needs_shtab = pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="shtab is not installed")


def call(command: str, *flags: str) -> int:
    main: Callable[[Sequence[str]], int] = importlib.import_module(command).main
    try:
        return main(flags)
    except SystemExit as ended:
        return int(ended.code or 0)


@needs_shtab
@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_prints_the_completion_of_its_installed_name(
    command: str, shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command, "--print_completion", shell) == 0
    printed = capsys.readouterr()
    assert command.replace("_", "-") in printed.out and "--print_completion" in printed.out and printed.err == ""


@needs_shtab
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--label_l"], {"--label_list_column"}),
        (["--student_kind", "st"], {"static"}),
        (["--threshold_rule", ""], {"best_f1", "half_f1", "shrunk"}),
        (["--dataset_path", "tex"], {"texts.csv"}),
        (["--amp", "--no-am"], {"--no-amp"}),
    ],
)
def test_bash_completes_flags_choices_and_paths(tmp_path: Path, typed: list[str], expected: set[str]) -> None:
    (tmp_path / "texts.csv").touch()
    script = subprocess.run(
        [sys.executable, str(ROOT / "research_main.py"), "--print_completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    words = " ".join(f"'{word}'" for word in ("research-main", *typed))
    asked = f"{script}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed)}; _shtab_research_main; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_without_its_package_the_flag_says_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "shtab", raising=False)
    assert call(command, "--print_completion", "bash") == 2
    assert "pip install shtab" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert f"  python {command}.py " in capsys.readouterr().out
