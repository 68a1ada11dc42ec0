"""The floor plan holds: who may import whom, what an import inside a function is for, and how long a file may grow.

The rooms and their order are read from import-linter's contract in pyproject.toml. Here stands what import-linter
cannot see: the files at the top, and what an import statement inside a function says of itself.
"""

from __future__ import annotations

import ast
import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.builders import ROOT

LONGEST_FILE, LONGEST_FUNCTION = 560, 50
# Each stands right below the room it serves; the commands stand on top of everything.
BELOW_ROOM = {"research_config": "runs", "research_data": "kd", "research_distillation": "experiment"}
COMMANDS = ("research_main", "research_compare", "research_predict", "research_export", "research_cache")
# What costs start-up time, or comes with an extra: the reason for importing it inside a function is known.
SLOW = {"torch", "transformers", "tokenizers", "sklearn", "scipy", "iterstrat", "safetensors", "huggingface_hub"}
SLOW |= {"matplotlib", "fontTools", "jinja2", "difflib"}
SLOW |= {"openpyxl", "pyarrow", "onnx", "onnxruntime", "wandb", "mlflow", "shtab"}
# What does not keep the rules yet; a name that does must leave its list.
UNEXPLAINED_IMPORTS: set[str] = set()
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


@functools.cache
def product_files() -> dict[str, Path]:
    """Return the path of every module of the product, by its dotted name."""
    paths = [*ROOT.glob("research_*.py"), *ROOT.glob("research/**/*.py")]
    return {name_of(path.relative_to(ROOT)): path for path in paths if path.name != "__init__.py"}


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(node: ast.AST) -> list[str]:
    """Return what one statement imports; `from a import b` may mean the module a.b, so it gives that and a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [name for alias in node.names for name in (f"{node.module}.{alias.name}", str(node.module))]
    return []


def imports_in_functions(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    for function in ast.walk(parse(path)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom))


def line_above_imports(lines: list[str], line_number: int) -> str:
    """Return the line above the imports that the line of that number, counted from 1, is one of."""
    above = line_number - 2
    while lines[above].lstrip().startswith(("from ", "import ")):
        above -= 1
    return lines[above].lstrip()


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Return the product's modules that each module imports, at any depth of its code."""
    files = product_files()
    return {
        name: {found for node in ast.walk(parse(path)) for found in imported_names(node) if found in files}
        for name, path in files.items()
    }


@functools.cache
def floors() -> dict[str, int]:
    """Return the floor of every room and every file at the top, counted from the ground."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = (found for found in settings["contracts"] if found["type"] == "layers")
    plan: list[list[str]] = []
    for layer in reversed(contract["layers"]):
        rooms = [room.strip() for room in layer.split("|")]
        plan += [[top] for top, room in BELOW_ROOM.items() if room in rooms]
        plan.append([f"research.{room}" for room in rooms])
    return {box: floor for floor, boxes in enumerate([*plan, COMMANDS]) for box in boxes}


def box_of(module: str) -> str:
    """Return the room a module is in, or the file at the top that it is."""
    return ".".join(module.split(".")[:2])


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules left when those that import nothing left are taken away, again and again."""
    left = {module: set(imported) for module, imported in graph.items()}
    while done := {module for module, imported in left.items() if not imported & set(left)}:
        left = {module: imported for module, imported in left.items() if module not in done}
    return sorted(left)


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the dotted name of each function and method, and its lines."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}"
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                assert child.end_lineno is not None
                yield name, child.end_lineno - child.lineno + 1
            yield from walk(child, name)

    yield from walk(parse(path), name_of(path.relative_to(ROOT)))


def test_every_room_and_every_file_at_the_top_has_a_floor() -> None:
    assert {box_of(module) for module in product_files()} == set(floors())


@pytest.mark.parametrize("module", sorted(product_files()))
def test_a_file_imports_only_from_floors_below_its_own(module: str) -> None:
    own = box_of(module)
    wrong = {name for name in import_graph()[module] if box_of(name) != own and floors()[box_of(name)] >= floors()[own]}
    assert not wrong


def test_only_the_experiment_imports_files_at_the_top_other_than_the_config() -> None:
    allowed = {"research.experiment": set(floors()) - set(COMMANDS), "research.*": {"research_config"}}
    for module, imported in import_graph().items():
        if module.startswith("research."):
            at_the_top = {name for name in imported if "." not in name}
            assert at_the_top <= allowed.get(box_of(module), allowed["research.*"]), module


def test_no_two_files_import_each_other_in_a_circle() -> None:
    assert find_cycle(import_graph()) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_package_files_are_empty() -> None:
    """A package that imported its files would bring torch into --help."""
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("research/**/__init__.py") if path.read_text().strip()} == set()
    rooms = {path.parent for path in product_files().values()} - {ROOT}
    assert [room.name for room in rooms if not (room / "__init__.py").is_file()] == []


def test_an_import_inside_a_function_is_of_a_slow_library_or_says_why() -> None:
    unexplained: dict[str, list[int]] = {}
    for module, path in product_files().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in imports_in_functions(path):
            said = "#" in lines[node.lineno - 1] or line_above_imports(lines, node.lineno).startswith("#")
            if not said and not {name.split(".")[0] for name in imported_names(node)} <= SLOW:
                unexplained.setdefault(module, []).append(node.lineno)
    assert set(unexplained) == UNEXPLAINED_IMPORTS, unexplained


def test_only_the_listed_files_are_longer_than_the_limit() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in product_files().items()}
    assert {name for name, length in lengths.items() if length > LONGEST_FILE} == LONG_FILES


def test_only_the_listed_functions_are_longer_than_the_limit() -> None:
    lengths = dict(function for path in product_files().values() for function in functions_of(path))
    assert {name for name, length in lengths.items() if length > LONGEST_FUNCTION} == LONG_FUNCTIONS


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.name)
def test_benchmarks_import_no_test(path: Path) -> None:
    tests = {found.stem for found in ROOT.glob("tests/**/test_*.py")}
    assert not {name.split(".")[-1] for node in ast.walk(parse(path)) for name in imported_names(node)} & tests


def test_the_product_imports_neither_tests_nor_benchmarks() -> None:
    beside = {"tests", "support", "benchmarks", "pytest", *(path.stem for path in ROOT.glob("benchmarks/*.py"))}
    for path in product_files().values():
        assert not {name.split(".")[0] for node in ast.walk(parse(path)) for name in imported_names(node)} & beside
