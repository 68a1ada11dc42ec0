"""Claims about research.experiment.demo and about the tiny models that the other tests stand on."""

from __future__ import annotations

import csv
import hashlib
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import (
    LABELS,
    ROOT,
    build_byte_bpe_tokenizer,
    build_encoder,
    build_model_folder,
    build_reference_hub_cache,
    build_unigram_tokenizer,
    build_wordpiece_tokenizer,
    make_table,
    make_texts,
)
from support.fault_injection import file_size_limit
from transformers import AutoModel, AutoTokenizer

import research_main
from research.experiment.demo import DEMO_LABELS, DEMO_VERSION, FLIPPED_CELL_SHARE, DemoFiles, build_demo, generate_table

ENCODER_KINDS = ("bert", "electra", "distilbert", "mobilebert", "xlm-roberta", "roberta", "albert", "deberta-v2")
VOWEL_SIGN_TEXT = "খুব ভালো তুমি"


def digest_tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_python(code: str, **environment: str) -> str:
    """Run code in a new process that finds the project's modules, and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return build_demo(tmp_path_factory.mktemp("demo"), seed=3)


def test_same_seed_gives_the_same_bytes_in_another_process(demo: DemoFiles, tmp_path: Path) -> None:
    code = f"from pathlib import Path; from research.experiment import demo as d; d.build_demo(Path({str(tmp_path)!r}), 3)"
    run_python(code, PYTHONHASHSEED="7")
    first = digest_tree(demo.dataset_path.parent)
    assert len(first) >= 8
    assert digest_tree(tmp_path / demo.dataset_path.parent.name) == first


def test_another_seed_gives_another_corpus() -> None:
    assert generate_table(3) != generate_table(4)


def test_finished_demo_is_not_built_again(demo: DemoFiles) -> None:
    weights = demo.teacher_path / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert build_demo(demo.dataset_path.parent.parent, seed=3) == demo
    assert weights.stat().st_mtime_ns == before
    assert [path.name for path in demo.dataset_path.parent.parent.iterdir()] == [f"v{DEMO_VERSION}_seed_3"]


def test_interrupted_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("research.experiment.demo.save_random_encoder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_demo(tmp_path, seed=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [100_000, 1_000_000], ids=["in the table", "in the weights"])
def test_demo_that_does_not_fit_on_the_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], room: int) -> None:
    with file_size_limit(room):
        status = research_main.main(["--demo", "--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")])
    errors = capsys.readouterr().err
    assert status == 1
    assert [line for line in errors.splitlines() if line.startswith(("error:", "Traceback"))] == [
        line for line in errors.splitlines() if line.startswith("error: File too large: ")
    ]
    assert not list((tmp_path / "cache" / "demo").iterdir())
    assert not (tmp_path / "run").exists()


def test_build_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    build_demo(tmp_path, seed=3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert repr(np.random.get_state(legacy=False)) == repr(numpy_state)


def test_corpus_says_that_it_is_synthetic(demo: DemoFiles) -> None:
    assert "synthetic" in demo.dataset_path.name
    assert "Synthetic" in (demo.dataset_path.parent / "README.txt").read_text(encoding="utf-8")


def test_corpus_has_what_real_tables_have(demo: DemoFiles) -> None:
    with demo.dataset_path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["text", *DEMO_LABELS]
    assert len(rows) == 1600
    texts = [row[0] for row in rows]
    cells = np.array([row[1:] for row in rows])
    positive_shares = (cells == "1").mean(axis=0)
    assert (positive_shares > 0.15).all() and (positive_shares < 0.6).all()
    assert ((cells == "1").sum(axis=1) >= 2).mean() > 0.5
    assert 30 <= len(texts) - len(set(texts)) <= 100
    assert 5 <= sum("\n" in text for text in texts) <= 100
    assert 20 <= (cells == "").sum() <= 200


def test_label_noise_is_near_its_stated_share(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = np.array([row[1:] for row in generate_table(3)])
    monkeypatch.setattr("research.experiment.demo.FLIPPED_CELL_SHARE", 0.0)
    clean = np.array([row[1:] for row in generate_table(3)])
    known = (noisy != "") & (clean != "")
    assert (noisy != clean)[known].mean() == pytest.approx(FLIPPED_CELL_SHARE, abs=0.01)


def test_demo_models_load_and_have_different_vocabularies(demo: DemoFiles) -> None:
    ids: dict[Path, Any] = {}
    for path, layers, width in ((demo.teacher_path, 4, 128), (demo.student_path, 2, 64)):
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
        batch = tokenizer(["খুব", "আজ খুব গোমটু খোঁচুলায়"], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        output = model(**batch, output_hidden_states=True)
        assert len(output.hidden_states) == layers + 1
        assert output.last_hidden_state.shape[::2] == (2, width)
        assert torch.isfinite(output.last_hidden_state).all()
        ids[path] = batch["input_ids"].tolist()
    assert ids[demo.teacher_path] != ids[demo.student_path]


def test_importing_the_demo_does_not_import_torch() -> None:
    code = "import sys, research.experiment.demo; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("build", [build_wordpiece_tokenizer, build_unigram_tokenizer, build_byte_bpe_tokenizer])
def test_tokenizers_keep_bangla_vowel_signs(build: Callable[..., Any], tmp_path: Path) -> None:
    build([*make_texts(64), VOWEL_SIGN_TEXT], tmp_path)
    build_encoder("bert", tmp_path, vocab_size=10)  # AutoTokenizer reads the model type beside it
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoding: dict[str, Any] = dict(tokenizer(VOWEL_SIGN_TEXT, return_offsets_mapping=True))
    ids = encoding["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).strip() == VOWEL_SIGN_TEXT
    covered = {i for start, end in encoding["offset_mapping"] for i in range(start, end)}
    assert covered >= {i for i, character in enumerate(VOWEL_SIGN_TEXT) if character != " "}


def test_wordpiece_keeps_every_character_of_a_word(tmp_path: Path) -> None:
    tokenizer = build_wordpiece_tokenizer(make_texts(64), tmp_path)
    pieces = tokenizer.tokenize("খুব")
    assert "".join(piece.removeprefix("##") for piece in pieces) == "খুব"


def test_uncased_wordpiece_deletes_vowel_signs(tmp_path: Path) -> None:
    tokenizer = build_wordpiece_tokenizer(make_texts(64), tmp_path, lowercase=True, strip_accents=True)
    assert not any(unicodedata.category(c) == "Mn" for piece in tokenizer.get_vocab() for c in piece)
    assert tokenizer("খুব")["input_ids"] == tokenizer("খব")["input_ids"]


def test_line_breaks_do_not_become_unknown_tokens(tmp_path: Path) -> None:
    tokenizer = build_unigram_tokenizer(make_texts(64), tmp_path)
    assert tokenizer("খুব\nআজ")["input_ids"] == tokenizer("খুব আজ")["input_ids"]


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_encoder_loads_with_the_depth_and_width_asked_for(kind: str, tmp_path: Path) -> None:
    tokenizer_kind = "unigram" if kind in ("xlm-roberta", "roberta") else "wordpiece"
    width = 48 if kind == "mobilebert" else 32
    build_model_folder(kind, tokenizer_kind, tmp_path, make_texts(64), layers=3, width=width)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = tokenizer(make_texts(4), padding=True, return_tensors="pt")
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
        output_attentions=True,
    )
    assert (tmp_path / "model.safetensors").is_file()
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert output.last_hidden_state.shape == (*batch["input_ids"].shape, width)
    assert torch.isfinite(output.last_hidden_state).all()
    attentions = output.attentions[-1]  # (B, A, L, L)
    assert torch.allclose(attentions.sum(-1), torch.ones(()), atol=1e-4)


def test_encoder_seed_decides_its_weights(tmp_path: Path) -> None:
    weights = [
        build_encoder("bert", tmp_path / str(index), 50, seed=seed).joinpath("model.safetensors").read_bytes()
        for index, seed in enumerate((1, 1, 2))
    ]
    assert weights[0] == weights[1] != weights[2]


def test_table_gives_every_label_positives_and_negatives(tmp_path: Path) -> None:
    with make_table(tmp_path / "comments.csv", rows=40).open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["text", *LABELS]
    assert [row[0] for row in rows] == make_texts(40)
    shares = np.array([row[1:] for row in rows], dtype=int).mean(axis=0)
    assert (shares > 0).all()
    assert (shares < 1).all()


def test_reference_names_load_offline_from_the_cache(tmp_path: Path) -> None:
    build_reference_hub_cache(tmp_path, make_texts(64))
    code = """
from transformers import AutoConfig, AutoModel, AutoTokenizer
for name in ("csebuetnlp/banglabert", "distilbert-base-multilingual-cased",
             "google/mobilebert-uncased", "bert-base-multilingual-cased"):
    config, model, tokenizer = (auto.from_pretrained(name) for auto in (AutoConfig, AutoModel, AutoTokenizer))
    batch = tokenizer("\u0996\u09c1\u09ac", return_tensors="pt")
    states = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    print(config.model_type, len(states) - 1, states[-1].shape[-1], len(tokenizer) == config.vocab_size)
"""
    printed = run_python(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert printed.splitlines() == [
        "electra 12 32 True",
        "distilbert 6 24 True",
        "mobilebert 24 48 True",
        "bert 12 32 True",
    ]
