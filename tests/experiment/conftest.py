"""The folder in which runs of tiny models are done; a file whose runs need something else has fixtures of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_lab import TinyLab, build_materials


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture
def lab(tmp_path: Path, materials: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> TinyLab:
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(materials / name)
    monkeypatch.chdir(tmp_path)
    return TinyLab(tmp_path, lambda: tuple(capsys.readouterr()))  # type: ignore[return-value, arg-type]
