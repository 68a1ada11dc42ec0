"""A trimmed tokenizer cuts texts of kept pieces as before, and its encoder gives them the same states."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import TOKENIZERS, build_encoder, requires_shared, shared_path, wrap_tokenizer
from support.checkpoints import ARCHITECTURES, TEXTS, build_student, logits_of
from support.texts import HARD_TEXTS
from transformers import AutoTokenizer

from research.errors import InputError
from research.models.cutting import keep_pieces
from research.models.encoders import load_encoder, load_tokenizer
from research.models.saved import load_classifier, save_classifier
from research.models.vocabulary import choose_pieces, script_of, trim_tokenizer

ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")


def build_character_bpe(texts: Sequence[str], folder: Path, vocab_size: int = 120) -> Any:
    """Save a BPE tokenizer of characters, whose last ones of a word are pieces of their own, with bytes for the unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + 256, special_tokens=special + byte_pieces, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    for piece in byte_pieces:
        assert tokenizer.token_to_id(piece) is not None
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return wrap_tokenizer(tokenizer, folder, names, token_type_ids=False)


BUILDERS = {**TOKENIZERS, "character_bpe": build_character_bpe}


def count(tokenizer: Any, texts: Iterable[str]) -> np.ndarray:
    return np.bincount([token for text in texts for token in tokenizer(text)["input_ids"]])


def trim(tokenizer: Any, texts: Sequence[str], least: int = 1) -> tuple[Any, list[int]]:
    kept = choose_pieces(tokenizer, count(tokenizer, texts), least)
    return trim_tokenizer(tokenizer, kept, texts), kept.tolist()


def check_same_cuts(tokenizer: Any, trimmed: Any, kept: Sequence[int], texts: Sequence[str]) -> int:
    """Check every text whose pieces are kept; return their number."""
    new_ids = {old: new for new, old in enumerate(kept)}
    checked = 0
    for text in texts:
        before = tokenizer.backend_tokenizer.encode(text).ids
        if all(token in new_ids for token in before):
            checked += 1
            assert trimmed.backend_tokenizer.encode(text).ids == [new_ids[token] for token in before], text
    return checked


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("kind", BUILDERS)
def test_texts_of_kept_pieces_are_cut_as_before(kind: str, least: int, tmp_path: Path) -> None:
    texts = [*TEXTS, *HARD_TEXTS]
    tokenizer = BUILDERS[kind](texts * 3, tmp_path, 300)
    trimmed, kept = trim(tokenizer, TEXTS, least)
    assert len(trimmed) == len(kept) < len(tokenizer)
    checked = check_same_cuts(tokenizer, trimmed, kept, texts)
    if least == 1:
        assert checked >= len(TEXTS)


@pytest.mark.parametrize("kind", BUILDERS)
def test_any_text_of_the_known_scripts_is_read_without_new_unknown_pieces(kind: str, tmp_path: Path) -> None:
    texts = [text for text in HARD_TEXTS if not any(script_of(char) not in ("", "BENGALI") for char in text)]
    tokenizer = BUILDERS[kind](texts * 3, tmp_path, 300)
    trimmed, _ = trim(tokenizer, TEXTS[:2])
    for text in texts:
        before, after = (entry.backend_tokenizer.encode(text).ids for entry in (tokenizer, trimmed))
        assert after.count(trimmed.unk_token_id) <= before.count(tokenizer.unk_token_id), text


def test_letters_of_scripts_that_no_text_holds_go_and_signs_stay(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["wordpiece"](["খুব ভালো কথা 7", "abc def", "! ? 😀"] * 3, tmp_path, 200)
    trimmed, _ = trim(tokenizer, ["খুব ভালো"])
    pieces = trimmed.get_vocab().keys()
    assert {"ক", "7", "!", "😀"} <= pieces
    assert not {"a", "b", "##c"} & pieces


@pytest.mark.parametrize("kind", BUILDERS)
def test_trimmed_tokenizer_is_saved_and_loaded_as_any_other(kind: str, tmp_path: Path) -> None:
    tokenizer = BUILDERS[kind](TEXTS * 3, tmp_path / "whole", 300)
    tokenizer.add_tokens(["<user>"])
    trimmed, kept = trim(tokenizer, TEXTS[:4])
    trimmed.save_pretrained(tmp_path / "trimmed")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    assert [loaded(text)["input_ids"] for text in TEXTS] == [trimmed(text)["input_ids"] for text in TEXTS]
    assert loaded.tokenize("<user>") == ["<user>"]
    for role in ROLES:
        token = getattr(tokenizer, f"{role}_token_id")
        assert getattr(loaded, f"{role}_token_id") == (None if token is None else kept.index(token))


def test_tokenizer_that_has_just_cut_texts_is_trimmed_all_the_same(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["unigram"](TEXTS * 3, tmp_path, 300)
    tokenizer(list(TEXTS), truncation=True, padding=True, max_length=4)
    kept = choose_pieces(tokenizer, count(tokenizer, TEXTS), 1)
    tokenizer(list(TEXTS), truncation=True, padding=True, max_length=4)
    assert check_same_cuts(tokenizer, trim_tokenizer(tokenizer, kept, TEXTS), kept.tolist(), TEXTS) == len(TEXTS)


@requires_shared
@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("bn_cyberbully5", "comment"),
        ("bn_toxic6", "text"),
        ("brighter_mar", "text"),
        ("jigsaw_sample", "comment_text"),
        ("ethos_multilabel", "comment"),
    ],
)
def test_real_texts_of_kept_pieces_are_cut_as_before(table: str, column: str) -> None:
    with shared_path("data", f"{table}.csv").open(encoding="utf-8", newline="") as file:
        texts = [row[column] for row in csv.DictReader(file)][:1000]
    tokenizer = load_tokenizer(str(shared_path("models", "me5-small-bn")))
    trimmed, kept = trim(tokenizer, texts[: len(texts) // 2])
    assert len(kept) < len(tokenizer)
    assert check_same_cuts(tokenizer, trimmed, kept, texts) >= len(texts) // 2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_encoder_of_kept_pieces_gives_equal_logits_before_and_after_saving(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["unigram"](TEXTS * 3, tmp_path / "tokenizer", 300)
    folder = build_encoder(kind, tmp_path / "encoder", len(tokenizer) + 3, heads=4, pad_token_id=tokenizer.pad_token_id)
    trimmed, kept = trim(tokenizer, TEXTS[:6])
    whole = build_student(folder, pooling="mean")
    student = build_student(folder, pooling="mean", encoder=keep_pieces(load_encoder(str(folder)), kept))
    batches = [entry(list(TEXTS[:6]), padding=True, return_tensors="pt") for entry in (tokenizer, trimmed)]
    student.classifier.load_state_dict(whole.classifier.state_dict())
    expected, found = (
        logits_of(model, (batch["input_ids"], batch["attention_mask"]))
        for model, batch in zip((whole, student), batches, strict=True)
    )
    assert torch.equal(found, expected)
    assert student.encoder.get_input_embeddings().num_embeddings == len(kept)  # type: ignore[operator]
    save_classifier(student, trimmed, tmp_path / "saved", {"labels": ["bully", "threat", "spam"]})
    loaded = load_classifier(str(tmp_path / "saved"))
    again = loaded.tokenizer(list(TEXTS[:6]), padding=True, return_tensors="pt")
    assert torch.equal(logits_of(loaded.model, (again["input_ids"], again["attention_mask"])), expected)


def test_model_that_counts_positions_from_a_padding_id_that_moves_is_refused(tmp_path: Path) -> None:
    folder = build_encoder("roberta", tmp_path, 60, pad_token_id=9)
    with pytest.raises(InputError, match="vocabulary of a roberta model cannot be trimmed"):
        keep_pieces(load_encoder(str(folder)), [0, 2, 9, *range(20, 40)])


def test_ids_without_an_embedding_are_refused(encoders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="ids up to 600, its model 60 embeddings"):
        keep_pieces(load_encoder(str(encoders["bert"])), [0, 1, 600])


def test_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["wordpiece"](TEXTS, tmp_path, 200)

    class Slow:
        is_fast, name_or_path = False, "models/slow"

    assert tokenizer.is_fast
    with pytest.raises(InputError, match="'models/slow' cannot be trimmed: it is a slow one"):
        choose_pieces(Slow(), np.ones(3, dtype=np.int64), 1)
