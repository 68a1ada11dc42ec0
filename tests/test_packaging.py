"""What pip installs: every file of the product, every command, and the packages that it imports; one version everywhere."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.builders import ROOT

from research.names import TRACKERS
from research.version import VERSION

# Imported by us, required by a package that we require.
COMES_WITH = {"tokenizers": "transformers", "huggingface_hub": "transformers", "fontTools": "matplotlib"}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "iterstrat": "iterative-stratification"}


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def product_files() -> list[Path]:
    return [*ROOT.glob("research_*.py"), *(path for path in ROOT.glob("research/**/*") if path.is_file())]


def requirement_names(lines: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", line.strip())[0].lower() for line in lines if line.strip() and line[0] not in "#-"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of what it is made of, and return it unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "project"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "research", copy / "research", ignore=ignored)
    for path in [*ROOT.glob("research_*.py"), *(ROOT / name for name in ("pyproject.toml", "requirements.txt"))]:
        shutil.copy(path, copy)
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=copy, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_every_file_of_the_product(wheel: Path) -> None:
    wanted = {path.relative_to(ROOT) for path in product_files() if "__pycache__" not in path.parts}
    found = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    assert {path for path in found if not path.parts[0].endswith(".dist-info")} == wanted


def test_the_wheel_names_the_version_and_what_it_needs(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert f"Version: {VERSION}" in lines
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert requirement_names([line for line in needed if "extra ==" not in line]) == requirement_names(required)


@pytest.mark.parametrize("command", ["research-main", "research-compare", "research-predict", "research-export"])
def test_an_installed_command_answers_away_from_the_clone(wheel: Path, command: str, tmp_path: Path) -> None:
    module, function = read_project()["project"]["scripts"][command].split(":")
    code = f"import sys, {module}; assert {module}.__file__.startswith({str(wheel)!r}); sys.exit({module}.{function}(['--help']))"
    environment = {"PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout.lower()


def test_every_package_that_is_imported_is_required_or_an_extra() -> None:
    imported: set[str] = set()
    for path in (path for path in product_files() if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            imported |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    tops = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    packages = {COMES_WITH.get(top, DISTRIBUTIONS.get(top, top)).lower() for top in tops if not top.startswith("research")}
    extras = [line for lines in read_project()["project"]["optional-dependencies"].values() for line in lines]
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert packages - requirement_names([*required, *extras]) == set()


def test_every_tracker_is_an_extra() -> None:
    assert set(TRACKERS) <= set(read_project()["project"]["optional-dependencies"])


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = changelog.index("\n## ")
    section = changelog[newest : changelog.index("\n## ", newest + 1)]
    assert VERSION in section
    assert "**Numbers**" in section
