"""Tiny random models, tokenizers, tables and hub caches for the tests: seeded, offline, built in a folder."""

from __future__ import annotations

import csv
import hashlib
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from research.experiment.demo import (
    ROBERTA_SPECIAL_TOKENS,
    build_unigram_tokenizer,
    build_wordpiece_tokenizer,
    save_random_encoder,
    wrap_tokenizer,
)
from research.experiment.runtime import Extras

QUICK_EXTRAS = Extras(measure_s=0.01, plots=False)
"""Measurements are no part of what a test asks for, and drawing would take most of its time."""

LABELS = ("bully", "sexual", "religious", "threat", "spam")
KEYWORDS = ("বোকা", "লাজুক", "মন্দির", "মারব", "টাকা")
FILLERS = ("আজ", "খুব", "ভালো", "তুমি", "কেন", "ভিডিও", "দেখলাম", "সবাই", "এখন", "গান", "মেঘ", "নদী")

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
requires_shared = pytest.mark.skipif(
    not (SHARED / "data" / "bn_cyberbully5.csv").is_file(), reason="needs the real comments and encoder of ../shared"
)


def shared_path(*parts: str) -> Path:
    """Return a path below ../shared."""
    return SHARED.joinpath(*parts)


def build_byte_bpe_tokenizer(texts: Sequence[str], folder: Path, vocab_size: int = 320) -> Any:
    """Save a RoBERTa-like byte-level BPE tokenizer for `texts` in `folder` and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer, folder, ROBERTA_SPECIAL_TOKENS, token_type_ids=False)


TOKENIZERS: dict[str, Callable[..., Any]] = {
    "wordpiece": build_wordpiece_tokenizer,
    "unigram": build_unigram_tokenizer,
    "byte_bpe": build_byte_bpe_tokenizer,
}


def encoder_config(kind: str, vocab_size: int, layers: int, width: int, heads: int, pad_token_id: int) -> Any:
    """Return the configuration of a tiny encoder of an architecture."""
    common: dict[str, Any] = {"vocab_size": vocab_size, "pad_token_id": pad_token_id, "max_position_embeddings": 160}
    shape: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
    }
    match kind:
        case "bert":
            return transformers.BertConfig(**common, **shape)
        case "electra":
            return transformers.ElectraConfig(**common, **shape, embedding_size=width // 2)
        case "distilbert":
            return transformers.DistilBertConfig(**common, n_layers=layers, dim=width, n_heads=heads, hidden_dim=2 * width)
        case "mobilebert":
            bottleneck: dict[str, Any] = {
                "intra_bottleneck_size": width // 2,
                "embedding_size": width,
                "true_hidden_size": width // 2,
            }
            return transformers.MobileBertConfig(**common, **shape, **bottleneck, num_feedforward_networks=2)
        case "xlm-roberta":
            return transformers.XLMRobertaConfig(**common, **shape)
        case "roberta":
            return transformers.RobertaConfig(**common, **shape)
        case "albert":
            return transformers.AlbertConfig(**common, **shape, embedding_size=width)
        case "deberta-v2":
            relative: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
            return transformers.DebertaV2Config(**common, **shape, **relative)
    raise AssertionError(kind)


def build_encoder(
    kind: str,
    folder: Path,
    vocab_size: int,
    layers: int = 2,
    width: int = 32,
    heads: int = 2,
    pad_token_id: int = 0,
    seed: int = 0,
) -> Path:
    """Save a tiny random encoder for AutoModel in `folder`."""
    save_random_encoder(encoder_config(kind, vocab_size, layers, width, heads, pad_token_id), folder, seed)
    return folder


def build_model_folder(
    kind: str,
    tokenizer_kind: str,
    folder: Path,
    texts: Sequence[str],
    *,
    vocab_size: int = 200,
    lowercase: bool = False,
    **shape: Any,
) -> Path:
    """Save a tokenizer and an encoder that fits it in one folder."""
    options = {"lowercase": True, "strip_accents": True} if lowercase else {}
    tokenizer = TOKENIZERS[tokenizer_kind](texts, folder, vocab_size, **options)
    return build_encoder(kind, folder, len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape)


def build_hub_cache(hf_home: Path, models: dict[str, Path]) -> None:
    """Lay model folders out as the hub's cache does, so HF_HOME and HF_HUB_OFFLINE=1 find them by name."""
    for name, folder in models.items():
        root = hf_home / "hub" / f"models--{name.replace('/', '--')}"
        revision = hashlib.sha1(name.encode()).hexdigest()
        shutil.copytree(folder, root / "snapshots" / revision)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(revision)


def build_reference_hub_cache(hf_home: Path, texts: Sequence[str]) -> None:
    """Fill a hub cache with tiny models under the names that the reference commands use.

    At the default learning rate a tiny teacher hardly moves. Seed 8 is one whose first guess is that
    every label is there, which is over --min_teacher_f1 on make_table(rows=60, label_rate=0.75).
    """
    scratch = hf_home / "scratch"
    build_hub_cache(
        hf_home,
        {
            "csebuetnlp/banglabert": build_model_folder("electra", "wordpiece", scratch / "a", texts, layers=12, seed=8),
            "distilbert-base-multilingual-cased": build_model_folder(
                "distilbert", "wordpiece", scratch / "b", texts, vocab_size=150, layers=6, width=24, seed=2
            ),
            "google/mobilebert-uncased": build_model_folder(
                "mobilebert", "wordpiece", scratch / "c", texts, lowercase=True, layers=24, width=48, heads=4, seed=3
            ),
            "bert-base-multilingual-cased": build_model_folder(
                "bert", "wordpiece", scratch / "d", texts, vocab_size=180, layers=12, seed=4
            ),
        },
    )
    shutil.rmtree(scratch)


def make_texts(rows: int, seed: int = 0, label_rate: float = 0.3) -> list[str]:
    """Return distinct Bangla-like texts; a keyword stands in one for each label it carries."""
    generator = random.Random(seed)
    texts = []
    for row in range(rows):
        words = generator.sample(FILLERS, generator.randint(2, 6))
        words += [keyword for keyword in KEYWORDS if generator.random() < label_rate]
        generator.shuffle(words)
        texts.append(" ".join([*words, f"{row}"]))
    return texts


def make_table(path: Path, rows: int = 120, seed: int = 0, label_rate: float = 0.3) -> Path:
    """Write a CSV with a text column and the five labels, each told by its keyword."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *LABELS])
        for text in make_texts(rows, seed, label_rate):
            writer.writerow([text, *(int(keyword in text) for keyword in KEYWORDS)])
    return path
