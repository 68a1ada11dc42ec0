"""Words are filled in by the head that an encoder was pretrained with, and by no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.builders import build_model_folder, make_texts, requires_shared, shared_path

from research.models import filling
from research.models.filling import MaskedText, WordFiller, list_words, load_filler

TEXTS = make_texts(60)
HEADS = {"bert": "wordpiece", "xlm-roberta": "unigram", "distilbert": "unigram", "electra": "wordpiece"}


def add_head(folder: Path, seed: int = 0) -> Path:
    """Put a masked-language head with random weights into a folder, which then is as one that was pretrained."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_head(build_model_folder("bert", "wordpiece", tmp_path_factory.mktemp("bert"), TEXTS))


@pytest.fixture
def filler(folder: Path) -> WordFiller:
    found = load_filler(str(folder), 32)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_used_where_its_weights_are_and_a_random_one_nowhere(kind: str, tmp_path: Path) -> None:
    build_model_folder(kind, HEADS[kind], tmp_path, TEXTS)
    assert load_filler(str(tmp_path), 32) is None
    assert load_filler(str(add_head(tmp_path)), 32) is not None


@requires_shared
def test_the_real_encoder_has_none() -> None:
    assert load_filler(str(shared_path("models", "me5-small-bn")), 32) is None


def test_a_word_is_the_one_that_the_heads_probabilities_give_for_the_draw(filler: WordFiller) -> None:
    words = TEXTS[0].split()
    masked = list(words)
    masked[2] = "[MASK]"
    ids: Any = filler.tokenizer([" ".join(masked)], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = filler.model(ids).logits[0, (ids[0] == filler.tokenizer.mask_token_id).nonzero().item()].double().numpy()
    likely = [piece for piece in np.argsort(-logits) if piece in filler.words and filler.words[piece] != words[2]][:10]
    shares = np.exp(logits[likely]) / np.exp(logits[likely]).sum()
    for draw in (0.0, 0.3, 0.7, 0.999):
        (view,) = filler.fill([MaskedText(words, [2], [draw])])
        wanted = filler.words[likely[int(np.searchsorted(np.cumsum(shares), draw, side="right"))]]
        assert view.split() == [*words[:2], wanted, *words[3:]]


def test_batches_and_company_change_no_word(filler: WordFiller, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    texts = [MaskedText(text.split(), [0, 2], generator.random(2).tolist()) for text in TEXTS]
    whole = filler.fill(texts)
    monkeypatch.setattr(filling, "CELLS_AT_ONCE", 1)
    assert filler.fill(texts) == whole
    for view, text in zip(whole, texts, strict=True):
        assert len(view.split()) == len(text.words) and view.split()[0] != text.words[0]
    assert filler.fill([]) == []


def test_words_past_the_end_of_what_is_read_and_masks_that_somebody_wrote_stay_out(filler: WordFiller) -> None:
    short = load_filler(str(Path(filler.tokenizer.name_or_path)), 8)
    assert short is not None
    words = ["কেন"] * 30
    assert short.fill([MaskedText(words, [20], [0.5])]) == [" ".join(words)]
    words = ["[MASK]", *TEXTS[0].split()]
    (view,) = filler.fill([MaskedText(words, [1], [0.5])])
    assert view.split()[0] == "[MASK]" and view.split()[1] in filler.words.values()


def test_only_pieces_that_are_words_by_themselves_are_filled_in(filler: WordFiller, tmp_path: Path) -> None:
    build_model_folder("xlm-roberta", "unigram", tmp_path, TEXTS)
    marked = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer, own in ((filler.tokenizer, lambda piece: "##" not in piece), (marked, lambda piece: piece.startswith("▁"))):
        found = list_words(tokenizer, 1000)
        assert found and all(own(tokenizer.convert_ids_to_tokens(piece)) for piece in found)
        assert not set(found) & set(tokenizer.all_special_ids)
        assert not any(word[0] in "0123456789.#▁" for word in found.values())


def test_a_tokenizer_without_a_mask_fills_nothing_in(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mask(name: str) -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        tokenizer.mask_token = None
        return tokenizer

    monkeypatch.setattr(filling, "load_tokenizer", without_mask)
    assert load_filler(str(folder), 32) is None
