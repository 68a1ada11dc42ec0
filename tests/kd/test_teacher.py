"""What the cache holds of a teacher is what the live teacher says, in any order of the rows."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import QUICK_EXTRAS, TOKENIZERS, build_encoder, build_model_folder, make_table, make_texts
from support.fault_injection import file_size_limit, tear

import research_main
from research.kd import teacher as teacher_room
from research.kd.layers import ComparedLayers, LayerComparison
from research.kd.targets import KeptTeacher, LiveTeacher
from research.kd.teacher import LayerStore, Teacher, estimate_bytes, fetch_layers, fetch_logits, run_layers
from research.models.classifiers import ModelShape, TeacherModel
from research.models.encoders import load_encoder, load_tokenizer
from research.storage.cache import Cache
from research.text.batches import BatchLoader
from research.text.tokens import Tokens, tokenize
from research.text.words import pair_words
from research_config import ExperimentConfig

CPU = torch.device("cpu")
TEXTS = tuple(make_texts(22))
METHODS = ("mse", "relation")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts, with the hash that names them."""

    texts: tuple[str, ...] = TEXTS

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def text_sha256(self) -> str:
        return str(hash(self.texts))

    def iter_texts(self) -> Iterator[str]:
        return iter(self.texts)


@dataclasses.dataclass(frozen=True)
class Setup:
    """One teacher and what its loaders carry; `extras` holds the words when the tokenizers differ."""

    teacher: Teacher
    tokens: Tokens
    teacher_tokens: Tokens
    extras: dict[str, Any]
    cache: Cache

    def teacher_loader(self) -> BatchLoader:
        """Return batches of every row in the teacher's own tokens."""
        return BatchLoader(np.arange(len(TEXTS)), self.teacher_tokens, np.zeros((len(TEXTS), 3), np.float32), 5)

    def loader(self, rows: np.ndarray, seed: int | None = 0, **more: Any) -> BatchLoader:
        labels = np.zeros((len(TEXTS), 3), dtype=np.float32)
        return BatchLoader(rows, self.tokens, labels, 5, seed=seed, **{**self.extras, **more})


def build_teacher(folder: Path, identity: dict[str, Any] | None = None, scale: float = 1.0) -> Teacher:
    """Return a teacher of that encoder; `scale` multiplies what its first layer puts out."""

    def load() -> TeacherModel:
        torch.manual_seed(0)
        model = TeacherModel(num_labels=3, encoder=load_encoder(str(folder)))
        with torch.no_grad():
            model.encoder.encoder.layer[0].output.LayerNorm.weight.mul_(scale)  # type: ignore[union-attr, index]
        return model

    return Teacher(identity or {"scale": scale}, ModelShape(3, 16, 2, 50), load, lambda folder: None, {}, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    TOKENIZERS["unigram"](TEXTS, root / "other", 120)
    return {
        "teacher": build_model_folder("bert", "wordpiece", root / "teacher", TEXTS, layers=3, width=16),
        "other": root / "other",
    }


@pytest.fixture(params=["one tokenizer", "two tokenizers"])
def setup(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Setup:
    two = request.param == "two tokenizers"
    cache = Cache(tmp_path)
    tokenizer = load_tokenizer(str(folders["teacher"]))
    tokens = tokenize(Corpus(), tokenizer, 24, cache, with_words=two)
    teacher = build_teacher(folders["teacher"])
    if not two:
        return Setup(teacher, tokens, tokens, {}, cache)
    other = tokenize(Corpus(), load_tokenizer(str(folders["other"])), 24, cache, with_words=True)
    assert not other.same_ids(tokens)
    extras = {"teacher_tokens": tokens, "words": pair_words(other, tokens, cache)}
    return Setup(teacher, other, tokens, extras, cache)


def compared_layers(objective: str = "mse") -> ComparedLayers:
    config = ExperimentConfig(kd_method="multi_level", attention_objective=objective, layer_mapping="0:0,2:1,3:2")
    return LayerComparison(config, ModelShape(3, 16, 2, 50), ModelShape(2, 12, 2, 50)).teacher


def test_cached_logits_are_those_of_the_live_teacher_whatever_the_order(setup: Setup) -> None:
    everything = np.arange(len(TEXTS))
    logits = fetch_logits(setup.teacher, setup.teacher_loader(), CPU, setup.cache)
    assert logits.dtype == np.float32 and logits.shape == (len(TEXTS), 3)
    kept, live = KeptTeacher(setup.teacher.shape, logits), LiveTeacher(setup.teacher.model, CPU)
    for batch in setup.loader(everything, seed=3):
        torch.testing.assert_close(kept.targets(batch).logits, live.targets(batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", METHODS)
def test_cached_layers_are_those_of_the_live_teacher_after_shuffling(objective: str, setup: Setup) -> None:
    layers = compared_layers(objective)
    rows = np.array([3, 1, 20, 7, 8, 15, 0, 12, 11])
    store = fetch_layers(setup.teacher, layers, setup.loader(rows), CPU, setup.cache)
    seen = 0
    for batch in setup.loader(np.sort(rows), seed=9):
        live, mask = run_layers(setup.teacher.model, layers, batch)
        stored = store.read(batch["row"].numpy()).map(lambda tensor: tensor.float())
        assert (stored.hidden.keys(), stored.maps.keys(), stored.relations.keys()) == (
            live.hidden.keys(), live.maps.keys(), live.relations.keys()
        )  # fmt: skip
        pairs = mask.unsqueeze(2) & mask.unsqueeze(1)
        expected = [(live.hidden[layer], stored.hidden[layer], mask) for layer in live.hidden]
        expected += [(live.maps[layer], stored.maps[layer], pairs) for layer in live.maps]
        for layer, parts in live.relations.items():
            expected += [(part, kept, mask) for part, kept in zip(parts, stored.relations[layer], strict=True)]
        for left, right, real in expected:
            torch.testing.assert_close(left[real], right[real], rtol=2e-3, atol=1e-4)
            assert (right[~real] == 0).all()
        seen += len(batch["row"])
    assert seen == len(rows)


def test_layers_are_kept_in_float16_and_take_the_bytes_that_were_estimated(folders: dict[str, Path], tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    tokens = tokenize(Corpus(), load_tokenizer(str(folders["teacher"])), 24, cache, with_words=False)
    setup = Setup(build_teacher(folders["teacher"]), tokens, tokens, {}, cache)
    rows = np.arange(len(TEXTS))
    for objective in METHODS:
        layers = compared_layers(objective)
        store = fetch_layers(setup.teacher, layers, setup.loader(rows), CPU, cache)
        arrays = [*store.states.values(), *store.maps.values()]
        assert {array.dtype for array in arrays} == {np.dtype(np.float16)}
        assert sum(array.nbytes for array in arrays) == estimate_bytes(layers, tokens.lengths_of(rows), 16)
    long = np.array([1 << 16], dtype=np.int32)  # whose square has more than 32 bits
    assert estimate_bytes(ComparedLayers(attention=(1,)), long, 16) == 2 << 32


def test_states_too_large_for_float16_are_kept_in_float32(
    setup: Setup, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = build_teacher(folders["teacher"], scale=1e6)
    layers = ComparedLayers(hidden=(1,))
    rows = np.arange(len(TEXTS))
    store = fetch_layers(teacher, layers, setup.loader(rows), CPU, setup.cache)
    assert "too large for float16" in caplog.text
    for batch in setup.loader(rows, seed=4):
        live, mask = run_layers(teacher.model, layers, batch)
        stored = store.read(batch["row"].numpy()).hidden[1]
        assert stored.dtype == torch.float32 and stored.abs().max() > teacher_room.FLOAT16_LARGEST
        torch.testing.assert_close(stored[mask], live.hidden[1][mask], rtol=1e-4, atol=1e-2)


def test_teacher_is_run_once_and_not_even_loaded_for_what_the_cache_holds(setup: Setup, folders: dict[str, Path]) -> None:
    loader = setup.loader(np.arange(len(TEXTS)))
    first = fetch_logits(setup.teacher, setup.teacher_loader(), CPU, setup.cache)
    fetch_layers(setup.teacher, compared_layers(), loader, CPU, setup.cache)

    def refuse() -> TeacherModel:
        raise AssertionError("the teacher was loaded")

    unloaded = Teacher(setup.teacher.identity, setup.teacher.shape, refuse, lambda folder: None, {}, 0)
    np.testing.assert_array_equal(fetch_logits(unloaded, setup.teacher_loader(), CPU, Cache(setup.cache.root)), first)
    assert isinstance(fetch_layers(unloaded, compared_layers(), loader, CPU, Cache(setup.cache.root)), LayerStore)


def test_another_teacher_tokenizer_text_or_layer_is_another_entry(folders: dict[str, Path], tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    edited = Corpus((*TEXTS[:-1], TEXTS[-1] + " আরও"))

    def fetch(identity: str, tokenizer_of: str, corpus: Corpus, max_length: int, objective: str) -> None:
        tokenizer = load_tokenizer(str(folders[tokenizer_of]))
        tokens = tokenize(corpus, tokenizer, max_length, cache, with_words=False)
        setup = Setup(build_teacher(folders["teacher"], {"name": identity}), tokens, tokens, {}, cache)
        loader = setup.loader(np.arange(len(TEXTS)))
        fetch_logits(setup.teacher, loader, CPU, cache)
        fetch_layers(setup.teacher, compared_layers(objective), loader, CPU, cache)

    counts = []
    for case in (
        ("a", "teacher", Corpus(), 24, "mse"),
        ("a", "teacher", Corpus(), 24, "mse"),
        ("b", "teacher", Corpus(), 24, "mse"),
        ("a", "other", Corpus(), 24, "mse"),
        ("a", "teacher", edited, 24, "mse"),
        ("a", "teacher", Corpus(), 6, "mse"),
        ("a", "teacher", Corpus(), 24, "relation"),
    ):
        fetch(*case)
        entries = {kind: {path for path in (tmp_path / kind).iterdir() if path.is_dir()} for kind in ("logits", "layers")}
        counts.append((len(entries["logits"]), len(entries["layers"])))
    assert counts == [(1, 1), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (5, 6)]


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_another_version_of_a_library_is_another_entry(setup: Setup, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    loader = setup.teacher_loader()
    parts = (setup.teacher.identity, loader.tokens.key, loader.rows, CPU)
    before = teacher_room.output_key(*parts)
    installed = teacher_room.version
    monkeypatch.setattr(teacher_room, "version", lambda name: "0.0.1" if name == library else installed(name))
    assert teacher_room.output_key(*parts) != before


@pytest.mark.parametrize("name", ["logits.npy", "hidden", "map", "rows.bin", "lengths.bin", "layout.json"])
def test_torn_outputs_with_a_manifest_of_their_own_are_made_again(
    setup: Setup, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """What an earlier version left on a full disk."""
    loader = setup.loader(np.arange(len(TEXTS)))

    def fetch(cache: Cache) -> tuple[np.ndarray, ...]:
        logits = fetch_logits(setup.teacher, setup.teacher_loader(), CPU, cache)
        store = fetch_layers(setup.teacher, compared_layers(), loader, CPU, cache)
        return tuple(map(np.array, (logits, *store.states.values(), *store.maps.values())))

    whole = fetch(setup.cache)
    tear(next(path for path in setup.cache.root.glob("l*/*/*") if name in path.name))
    for left, right in zip(whole, fetch(Cache(setup.cache.root)), strict=True):
        np.testing.assert_array_equal(left, right)
    assert caplog.text.count("is damaged") == 1


@pytest.mark.parametrize("lost", [1, 2000])
def test_outputs_that_do_not_fit_on_the_disk_are_an_error_and_no_entry(setup: Setup, tmp_path: Path, lost: int) -> None:
    """The tofile of numpy itself said nothing when it was the last block that did not fit."""
    loader = setup.loader(np.arange(len(TEXTS)))
    store = fetch_layers(setup.teacher, compared_layers(), loader, CPU, setup.cache)
    largest = max(array.nbytes for array in [*store.states.values(), *store.maps.values()])
    with file_size_limit(largest - lost), pytest.raises(OSError, match="File too large"):
        fetch_layers(setup.teacher, compared_layers(), loader, CPU, Cache(tmp_path / "full"))
    assert list((tmp_path / "full" / "layers").iterdir()) == []


# The same through the command line


@pytest.mark.parametrize("tokenizer", ["wordpiece", "unigram"])
def test_live_teacher_past_the_budget_trains_nearly_as_the_cache_does(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_table(tmp_path / "data" / "comments.csv", rows=60)
    texts = make_texts(60)
    teacher = build_model_folder("electra", "wordpiece", tmp_path / "teacher", texts, layers=4, width=24, seed=1)
    student = tmp_path / "student"
    if tokenizer == "unigram":
        build_model_folder("distilbert", "unigram", student, texts, layers=2, width=16, seed=2)
    else:
        built = load_tokenizer(str(teacher))
        build_encoder("distilbert", student, len(built), width=16, pad_token_id=built.pad_token_id, seed=2)
        built.save_pretrained(student)
    flags = (
        "--teacher_path teacher --student_path student --lr 1e-3 --teacher_epochs 1 --epochs 3 --batch 16 --max_length 32 "
        "--kd_method multi_level --allow_weak_teacher --num_threads 1"
    )
    histories = []
    for name, budget in (("cached", "20"), ("live", "0")):
        argv = [*flags.split(), "--cache_budget_gb", budget, "--output_dir", name, "--cache_dir", f"cache_{name}"]
        assert research_main.main(argv, QUICK_EXTRAS) == 0
        with (tmp_path / name / "history.csv").open(encoding="utf-8") as file:
            histories.append([{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)])
        assert ("the teacher runs live" in capsys.readouterr().err) == (name == "live")
    assert (tmp_path / "cache_cached" / "layers").is_dir() and not (tmp_path / "cache_live" / "layers").exists()
    for cached, live in zip(*histories, strict=True):
        assert cached == pytest.approx(live, rel=2e-3)
    assert histories[0][0]["hidden_loss"] > 0 and histories[0][0]["attention_loss"] > 0
    budgets = [json.loads((tmp_path / name / "config.json").read_text())["cache_budget_gb"] for name in ("cached", "live")]
    assert budgets == [20.0, 0.0]
