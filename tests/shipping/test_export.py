"""What is exported gives torch's answers in any batch, carries its labels and thresholds, and is whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import LABELS, build_model_folder, make_texts
from support.shipping import Exported, read_table, train_student, write_texts

import research_export
import research_predict
from research.evaluation.calibration import sigmoid
from research.models.classifiers import SequenceClassifier, StudentModel
from research.models.cutting import factorise_embeddings
from research.models.encoders import load_encoder, load_tokenizer
from research.models.saved import load_classifier, save_classifier
from research.shipping import export, onnx_files
from research.shipping.onnx_files import write_exported
from research.shipping.quantize import quantize_rows, write_int8
from research.shipping.scorers import ONNX_FILES, Usage, compute_logits, open_onnx, open_torch

pytest.importorskip("onnxruntime", reason="exporting and running ONNX needs pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="exporting to ONNX needs pip install onnx onnxscript onnxruntime")
onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs pip install onnx onnxscript onnxruntime")

TEXTS = [*make_texts(40, seed=4), "আজ", " ".join(["খুব"] * 50), "কেন\u200c তুমি [SEP] ভালো"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on 120 rows whose student has the mean of its tokens as text vector."""
    return train_student(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export.export_model(str(run), int8=True, measure_s=0.01)
    return run / "student_onnx"


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(sigmoid(one) - sigmoid(other)).max())


def test_float32_gives_torchs_probabilities(run: Path, exported: Path) -> None:
    expected = compute_logits(open_torch(str(run / "student"), "cpu"), TEXTS)
    assert largest_difference(compute_logits(open_onnx(exported), TEXTS), expected) < 1e-5
    assert sigmoid(expected).std() > 0.02  # of answers that differ at all


def test_int8_is_near_and_smaller(run: Path, exported: Path) -> None:
    expected = compute_logits(open_torch(str(run / "student"), "cpu"), TEXTS)
    found = compute_logits(open_onnx(exported, int8=True), TEXTS)
    assert 0 < largest_difference(found, expected) < 0.05
    sizes = [(exported / name).stat().st_size for name in ONNX_FILES.values()]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("int8", [False, True])
def test_batch_and_length_are_free(exported: Path, int8: bool) -> None:
    scorer = open_onnx(exported, int8=int8)
    ids, lengths = scorer.encode(["আজ খুব ভালো তুমি"])
    alone = scorer.classify(ids[None].astype(np.int64), np.ones((1, lengths[0]), dtype=np.int64))[0]
    for rows, width in ((1, 16), (3, 9), (17, 12)):
        padded = np.full((rows, width), scorer.pad_id)
        padded[:, : lengths[0]] = ids
        mask = np.zeros((rows, width), dtype=np.int64)
        mask[:, : lengths[0]] = 1
        found = scorer.classify(padded, mask)
        assert found.shape == (rows, len(LABELS))
        np.testing.assert_allclose(found, np.tile(alone, (rows, 1)), atol=1e-5)


def test_no_product_of_weights_and_no_embedding_is_left_in_float32(exported: Path) -> None:
    graph = onnx.load(exported / ONNX_FILES[True]).graph
    large = {
        tensor.name: tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2 and int(np.prod(tensor.dims)) >= 64
    }
    floats = [name for name, kind in large.items() if kind == onnx.TensorProto.FLOAT and not name.endswith("_scale")]
    assert large and floats == []


def test_int8_does_not_depend_on_the_batch(exported: Path) -> None:
    scorer = open_onnx(exported, int8=True)
    logits = compute_logits(scorer, TEXTS)
    for row in (0, 20, len(TEXTS) - 1):
        assert np.array_equal(compute_logits(scorer, [TEXTS[row]])[0], logits[row])
    dynamic = [node.op_type for node in onnx.load(exported / ONNX_FILES[True]).graph.node if "Dynamic" in node.op_type]
    assert dynamic == []


def test_rows_of_a_table_are_rounded_by_their_own_largest_value() -> None:
    table = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) * np.logspace(-4, 3, 7)[:, None].astype(np.float32)
    table[3] = 0
    codes, scales = quantize_rows(table)
    error = np.abs(codes.astype(np.float64) * scales - table)
    assert (error <= np.abs(table).max(axis=1, keepdims=True) / 254 * 1.001).all()
    assert np.abs(codes).max() == 127 and not codes[3].any()


def test_the_folder_says_how_it_is_used(run: Path, exported: Path) -> None:
    trained = load_classifier(str(run / "student")).settings
    settings = json.loads((exported / "classifier.json").read_text())
    assert {name: settings[name] for name in ("labels", "thresholds", "max_length", "text_normalization")} == {
        name: trained[name] for name in ("labels", "thresholds", "max_length", "text_normalization")
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["id2label"] == {str(place): label for place, label in enumerate(LABELS)}
    assert config["problem_type"] == "multi_label_classification"
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert str(run) not in "".join(path.read_text() for path in exported.glob("*config.json"))
    assert str(Path(onnx_files.__file__).parent).encode() not in (exported / ONNX_FILES[False]).read_bytes()


def test_export_json_holds_sizes_times_differences_and_scores(run: Path, exported: Path) -> None:
    facts = json.loads((exported / "export.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    assert facts["scores"]["f1_macro"]["torch"]["value"] == pytest.approx(
        metrics["student"]["test"]["at_0.5"]["f1_macro"], abs=1e-6
    )
    tuned = facts["scores"]["f1_macro_tuned"]["torch"]["value"]
    assert tuned == pytest.approx(metrics["student"]["test"]["tuned"]["f1_macro"], abs=1e-6)
    for form in ("onnx", "int8"):
        found = facts["scores"]["f1_macro"][form]
        assert found["difference"]["value"] == pytest.approx(
            found["value"] - facts["scores"]["f1_macro"]["torch"]["value"], abs=1e-6
        )
        assert found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]
    assert facts["forms"]["int8"]["size_mb"] == pytest.approx((exported / ONNX_FILES[True]).stat().st_size / 1e6)
    for form in facts["forms"].values():
        low, high = form["latency_ms_batch1_range"]
        assert 0 < low <= form["latency_ms_batch1"] <= high
    for name in ("export.md", "export.html"):
        text = (exported / name).read_text()
        assert "ONNX, int8" in text and f"{tuned:.4f}" in text


def test_a_second_export_has_the_same_models(run: Path, exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("student_onnx"))
    export.export_model(str(copy), int8=True, measure_s=0.01)
    for name in (*ONNX_FILES.values(), "classifier.json", "config.json", "tokenizer.json"):
        assert (copy / "student_onnx" / name).read_bytes() == (exported / name).read_bytes(), name


def test_a_table_is_labelled_as_by_torch(run: Path, exported: Path, tmp_path: Path) -> None:
    table = write_texts(tmp_path / "in.csv", TEXTS)
    flags = ["--dataset_path", str(table), "--output_path"]
    assert research_predict.main(["--model", str(run / "student"), *flags, str(tmp_path / "torch.csv")]) == 0
    assert research_predict.main(["--model", str(exported), *flags, str(tmp_path / "onnx.csv")]) == 0
    assert research_predict.main(["--model", str(exported), "--int8", *flags, str(tmp_path / "int8.csv")]) == 0
    tables = [read_table(tmp_path / f"{name}.csv") for name in ("torch", "onnx", "int8")]
    for label in LABELS:
        probs = np.array([[float(row[f"p_{label}"]) for row in table] for table in tables])
        assert np.abs(probs[1] - probs[0]).max() < 1e-5
        assert 0 < np.abs(probs[2] - probs[0]).max() < 0.05


def test_an_exported_model_is_run_without_torch(exported: Path, tmp_path: Path) -> None:
    table = write_texts(tmp_path / "in.csv", TEXTS)
    code = (
        "import sys, research_predict; status = research_predict.main(sys.argv[1:]); "
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    flags = ["--model", str(exported), "--dataset_path", str(table), "--output_path", str(tmp_path / "out.csv")]
    environment = {**os.environ, "PYTHONPATH": str(Path(research_predict.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, *flags], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["bert", "distilbert", "xlm-roberta", "electra", "albert"])
@pytest.mark.parametrize("native", [False, True])
def test_both_kinds_of_head_are_exported(tmp_path: Path, kind: str, native: bool, classifier_of: Exported) -> None:
    folder = classifier_of(tmp_path, kind, native)
    saved = load_classifier(str(folder))
    write_exported(saved, Usage.of(saved, str(folder)), tmp_path / "onnx")
    scorer = open_onnx(tmp_path / "onnx")
    expected = compute_logits(open_torch(str(folder), "cpu"), TEXTS)
    assert scorer.labels == tuple(saved.settings["labels"])
    assert largest_difference(compute_logits(scorer, TEXTS), expected) < 1e-5


@pytest.fixture
def classifier_of() -> Exported:
    """Save a random classifier of an architecture, with our head (and each pooling) or with its own."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    def build(root: Path, kind: str, native: bool) -> Path:
        build_model_folder(kind, "wordpiece", root / "encoder", make_texts(60), layers=2, width=32)
        torch.manual_seed(0)
        settings = {"labels": ["a", "b"], "thresholds": {"a": 0.4, "b": 0.6}, "max_length": 20, "text_normalization": "nfc"}
        if native:
            config = AutoConfig.from_pretrained(root / "encoder", num_labels=2, id2label={0: "a", 1: "b"})
            model: Any = SequenceClassifier(AutoModelForSequenceClassification.from_config(config), [0, 1])
        else:
            pooling = {"bert": "cls", "electra": "last"}.get(kind, "mean")
            model = StudentModel(str(root / "encoder"), 2, classifier_hidden_size=8, pooling=pooling)
        save_classifier(model.eval(), load_tokenizer(str(root / "encoder")), root / "saved", settings)
        return root / "saved"

    return build


def test_another_model_than_torchs_is_not_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("student_onnx"))

    def write_wrong(saved: Any, usage: Usage, folder: Path) -> None:
        with torch.no_grad():
            next(saved.model.classifier[3].parameters()).mul_(1.1)
        write_exported(saved, usage, folder)

    monkeypatch.setattr(export, "write_exported", write_wrong)
    assert research_export.main([str(copy)]) == 2
    assert not list(copy.glob("*student_onnx*")) and not list(copy.glob(".*.tmp"))


def test_other_texts_serve_where_the_table_is_gone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("student_onnx"))
    config = json.loads((copy / "config.json").read_text()) | {"dataset_path": str(tmp_path / "gone.csv")}
    (copy / "config.json").write_text(json.dumps(config))
    assert research_export.main([str(copy), "--int8"]) == 2
    assert "--calibration_path" in capsys.readouterr().err
    table = write_texts(tmp_path / "other.csv", make_texts(50, seed=8))
    export.export_model(str(copy), int8=True, calibration_path=str(table), measure_s=0.01)
    facts = json.loads((copy / "student_onnx" / "export.json").read_text())
    assert "scores" not in facts and facts["compared_with_torch"]["onnx"]["largest_difference"] < 1e-5
    assert "Not scored" in (copy / "student_onnx" / "export.md").read_text()


Change = Callable[[Path, pytest.MonkeyPatch], object]
MISTAKES: dict[str, tuple[Change, list[str], str]] = {
    "unfinished": (lambda run, _: (run / "metrics.json").unlink(), [], "unfinished"),
    "no teacher": (lambda *_: None, ["--model", "teacher"], "has no teacher; there is student"),
    "exported": (lambda run, _: (run / "student_onnx").mkdir(), [], "is there already. Give --overwrite"),
    "changed": (lambda run, _: write_texts(run.parent / "t.csv", ["x"] * 9), ["--calibration_path", "no.csv"], "no such file"),
    "no onnx": (
        lambda _, patch: patch.setattr(export, "version", lambda name: (_ for _ in ()).throw(export.PackageNotFoundError(name))),
        [],
        "pip install onnx onnxscript onnxruntime",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, flags, message = MISTAKES[name]
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("student_onnx"))
    change(copy, monkeypatch)
    before = sorted(copy.iterdir())
    assert research_export.main([str(copy), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert sorted(copy.iterdir()) == before


def test_overwriting_a_run_removes_what_was_exported_of_it(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    from research.runs.directory import RunDirectory

    with RunDirectory(copy) as directory:
        directory.claim(json.loads((copy / "config.json").read_text()) | {"seed": 7}, overwrite=True)
    assert not (copy / "student_onnx").exists()


def test_int8_keeps_what_is_no_embedding(tmp_path: Path) -> None:
    """A table that a product reads too is no mere embedding, and looking up columns is no looking up of rows."""
    from onnx import TensorProto, helper, numpy_helper

    from research.shipping.quantize import quantize_embeddings

    table = numpy_helper.from_array(np.ones((4, 3), np.float32), "table")
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"]), helper.make_node("MatMul", ["rows", "table"], ["out"])]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [None])
    graph = helper.make_graph(nodes, "g", [ids], [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)], [table])
    quantize_embeddings(graph)
    assert [node.op_type for node in graph.node] == ["Gather", "MatMul"]


def test_int8_takes_embeddings_that_are_a_product(tmp_path: Path) -> None:
    """Rows that a product reads have a scale of the quantiser's beside that of each row."""
    build_model_folder("bert", "wordpiece", tmp_path / "encoder", make_texts(60), layers=1, width=16)
    torch.manual_seed(0)
    encoder = factorise_embeddings(load_encoder(str(tmp_path / "encoder")), 4)
    settings = {"labels": ["a", "b"], "thresholds": {"a": 0.4, "b": 0.6}, "max_length": 20, "text_normalization": "nfc"}
    model = StudentModel(num_labels=2, classifier_hidden_size=8, pooling="mean", encoder=encoder).eval()
    save_classifier(model, load_tokenizer(str(tmp_path / "encoder")), tmp_path / "saved", settings)
    saved = load_classifier(str(tmp_path / "saved"))
    write_exported(saved, Usage.of(saved, "saved"), tmp_path / "onnx")
    ids, lengths = open_onnx(tmp_path / "onnx").encode(TEXTS)
    texts = [text[None].astype(np.int64) for text in np.split(ids, np.cumsum(lengths)[:-1])]
    feeds = [{"input_ids": text, "attention_mask": np.ones_like(text)} for text in texts]
    write_int8(tmp_path / "onnx" / ONNX_FILES[False], tmp_path / "onnx" / ONNX_FILES[True], feeds)
    found = compute_logits(open_onnx(tmp_path / "onnx", int8=True), TEXTS)
    assert largest_difference(found, compute_logits(open_onnx(tmp_path / "onnx"), TEXTS)) < 0.02


def test_a_slow_tokenizer_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = load_classifier(str(run / "student"))

    class Slow:
        is_fast = False
        name_or_path = "slow"

    with pytest.raises(Exception, match="slow one"):
        write_exported(type(saved)(saved.model, Slow(), saved.settings), Usage.of(saved, "x"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
