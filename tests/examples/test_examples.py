"""The examples run as they stand: an exported model without this suite, in Python and JavaScript, as a server and as an image."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.builders import LABELS, ROOT, make_texts
from support.shipping import read_table, train_student, write_texts

import research_predict
from research.shipping import export

ONNX = "exporting and running ONNX needs pip install onnx onnxscript onnxruntime"
pytest.importorskip("onnxruntime", reason=ONNX)
pytest.importorskip("onnxscript", reason=ONNX)
pytest.importorskip("onnx", reason=ONNX)

EXAMPLES = ROOT / "examples"
TEXTS = [*make_texts(12, seed=6), "ভিডিও\u09af\u09bc আজ", "  খুব ", " ".join(["কেন"] * 40)]
# Puts a finder before all others that knows of no package but those named, and runs a script.
ONLY = """
import importlib.abc, os, runpy, sys
allowed = set(sys.argv[1].split(",")) | set(sys.stdlib_module_names)
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed and not name.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as for python script.py
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported student, of a run on 120 rows."""
    run = train_student(tmp_path_factory.mktemp("examples"))
    export.export_model(str(run), int8=True, measure_s=0.01)
    return run / "student_onnx"


@pytest.fixture(scope="module")
def by_the_suite(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What torch and this suite say of TEXTS."""
    folder = tmp_path_factory.mktemp("suite")
    table = write_texts(folder / "in.csv", TEXTS)
    student = exported.with_name("student")
    flags = ["--model", str(student), "--dataset_path", str(table), "--output_path", str(folder / "out.csv")]
    assert research_predict.main(flags) == 0
    rows = read_table(folder / "out.csv")
    assert {row[label] for row in rows for label in LABELS} == {"0", "1"}  # or equal decisions would say little
    return rows


def run_alone(script: Path, packages: str, *arguments: str, cwd: Path, text: str | None = None) -> str:
    """Run a script that can import the standard library, its own folder and some packages only; return its output."""
    command = [sys.executable, "-I", "-c", ONLY, packages, str(script), *arguments]
    done = subprocess.run(command, cwd=cwd, input=text, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probabilities(answers: list[dict[str, float]]) -> np.ndarray:
    return np.array([[answer[label] for label in LABELS] for answer in answers])


def expected_probabilities(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([[float(row[f"p_{label}"]) for label in LABELS] for row in rows])


def test_an_exported_folder_needs_three_packages(exported: Path, by_the_suite: list[dict[str, str]], tmp_path: Path) -> None:
    alone = tmp_path / "classify.py"
    shutil.copy(EXAMPLES / "classify.py", alone)
    shutil.copytree(exported, tmp_path / "model")
    lines = run_alone(alone, "numpy,onnxruntime,tokenizers", "model", *TEXTS, "  ", cwd=tmp_path).splitlines()
    answers = [json.loads(line) for line in lines]
    assert answers.pop() == {"labels": [], "probs": {}}
    found = probabilities([answer["probs"] for answer in answers])
    assert np.abs(found - expected_probabilities(by_the_suite)).max() < 1e-5
    assert [answer["labels"] for answer in answers] == [[label for label in LABELS if row[label] == "1"] for row in by_the_suite]


def test_what_the_other_test_refuses_is_really_refused(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import torch")
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        run_alone(tmp_path / "script.py", "numpy", cwd=tmp_path)


def find_transformers_js() -> str | None:
    """Say why the JavaScript check cannot run, None when it can: Node, and the package where Node would look for it."""
    if shutil.which("node") is None:
        return "needs Node"
    code = "import('@huggingface/transformers').catch(() => process.exit(1))"
    done = subprocess.run(["node", "--input-type=module", "-e", code], cwd=EXAMPLES, capture_output=True, check=False, timeout=60)
    return None if done.returncode == 0 else "needs npm install @huggingface/transformers in a folder above examples/"


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("q8", 0.05)])
def test_transformers_js_gives_the_same_probabilities(
    exported: Path, by_the_suite: list[dict[str, str]], dtype: str, tolerance: float
) -> None:
    if reason := find_transformers_js():
        pytest.skip(reason)
    command = ["node", str(EXAMPLES / "classify.mjs"), str(exported), dtype, *TEXTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = probabilities([json.loads(line) for line in done.stdout.splitlines()])
    assert np.abs(found - expected_probabilities(by_the_suite)).max() < tolerance


@pytest.fixture
def server(exported: Path) -> Iterator[str]:
    """The address of serve.py, started as its docstring says."""
    pytest.importorskip("fastapi", reason="serving needs pip install fastapi uvicorn")
    pytest.importorskip("uvicorn", reason="serving needs pip install fastapi uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "serve:app", "--app-dir", str(EXAMPLES), "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "error"], env=os.environ | {"MODEL": str(exported)})
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        assert process.poll() is None
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_the_server_answers_as_the_suite_and_can_be_loaded(
    server: str, by_the_suite: list[dict[str, str]], tmp_path: Path
) -> None:
    import http.client

    connection = http.client.HTTPConnection(server, timeout=30)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/classify", json.dumps({"texts": [*TEXTS, ""]}), headers)
    answers = json.loads(connection.getresponse().read())
    assert answers.pop() == {"labels": [], "probs": {}}
    found = probabilities([answer["probs"] for answer in answers])
    assert np.abs(found - expected_probabilities(by_the_suite)).max() < 1e-5
    connection.request("POST", "/classify", json.dumps({"texts": ["x"] * 300}), headers)
    assert connection.getresponse().status == 422
    table = write_texts(tmp_path / "in.csv", TEXTS)
    command = [sys.executable, str(EXAMPLES / "load_test.py"), str(table), "--address", server, "--requests", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["requests"] == 40
    assert 0 < measured["p50_ms"] <= measured["p99_ms"] and measured["rows_per_s"] > 0


INSTRUCTIONS = {"FROM", "ARG", "WORKDIR", "RUN", "COPY", "USER", "ENTRYPOINT", "CMD"}


def read_dockerfile() -> list[tuple[str, str]]:
    """Return (instruction, arguments) of each line of the Dockerfile."""
    lines = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8").splitlines()
    parts = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return [(word, rest) for word, rest in parts]


def test_the_dockerfile_is_one_of_known_instructions() -> None:
    found = read_dockerfile()
    assert found[0] == ("FROM", "python:3.11-slim")
    assert {word for word, _ in found} == INSTRUCTIONS
    assert all(isinstance(json.loads(rest), list) for word, rest in found if word in ("ENTRYPOINT", "CMD"))
    pinned = re.findall(r"^pip install --no-cache-dir (.*)$", dict(found[::-1])["RUN"]) or [""]
    assert pinned[0] and all("==" in package for package in pinned[0].split())
    copied = [source for word, rest in found if word == "COPY" for source in rest.split()[:-1] if "$" not in source]
    assert copied and all((ROOT / source).exists() for source in copied)
    assert [word for word, _ in found].index("USER") < [word for word, _ in found].index("ENTRYPOINT")


def test_what_the_image_holds_is_enough_to_label_a_table(
    exported: Path, by_the_suite: list[dict[str, str]], tmp_path: Path
) -> None:
    found = read_dockerfile()
    image = tmp_path / "suite"
    image.mkdir()
    for word, rest in found:
        for source in rest.split()[:-1] if word == "COPY" else ():
            if "$" in source:
                shutil.copytree(exported, tmp_path / "model")
            elif (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, image / source, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, image)
    (install,) = [rest for word, rest in found if rest.startswith("pip install")]
    packages = [package.partition("==")[0] for package in install.split() if "==" in package]
    own = [path.stem for path in image.iterdir()]
    (entry,) = [json.loads(rest) for word, rest in found if word == "ENTRYPOINT"]
    flags = [str(tmp_path / "model") if word == "/model" else word for word in entry[2:]]
    write_texts(tmp_path / "in.csv", TEXTS)
    table = (tmp_path / "in.csv").read_text(encoding="utf-8")
    flags += ["--dataset_path", "-", "--output_path", "-"]
    (tmp_path / "out.csv").write_text(
        run_alone(image / entry[1], ",".join([*packages, *own]), *flags, cwd=image, text=table), encoding="utf-8"
    )
    rows = read_table(tmp_path / "out.csv")
    assert np.abs(expected_probabilities(rows) - expected_probabilities(by_the_suite)).max() < 1e-5
