"""Scripts that are part of no package, as modules."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from support.builders import ROOT


def load_benchmark(name: str) -> ModuleType:
    """Return benchmarks/<name>.py under a name of its own, so that it hides no module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
