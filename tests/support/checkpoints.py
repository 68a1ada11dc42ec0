"""Small encoders, students and saved classifiers for the tests of the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from research.models.classifiers import EncoderClassifier, SequenceClassifier, StudentModel, TextClassifier
from support.builders import make_texts

ARCHITECTURES = ("bert", "electra", "distilbert", "mobilebert", "xlm-roberta", "roberta", "albert", "deberta-v2")
LAYER_STACKS = {
    "bert": "encoder.layer",
    "electra": "encoder.layer",
    "distilbert": "transformer.layer",
    "mobilebert": "encoder.layer",
    "xlm-roberta": "encoder.layer",
}
LABELS = ("bully", "threat", "spam")
TEXTS = tuple(make_texts(12))
VOCABULARY, HEADS, LAYERS = 60, 4, 3


def token_batch(padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (2, 7 + padding) and their mask; the second row has two padded cells of its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (2, 7), generator=generator)
    ids[1, 5:] = 1
    ids = nn.functional.pad(ids, (0, padding), value=1)
    return ids, (ids != 1).long()


def text_batch(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def logits_of(model: TextClassifier, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(*batch)["logits"]


def build_student(folder: Path, num_labels: int = 3, **options: Any) -> StudentModel:
    torch.manual_seed(1)
    return StudentModel(str(folder), num_labels, 0.1, 8, **options)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def save_former(model: TextClassifier, tokenizer: Any, folder: Path, settings: dict[str, Any]) -> Path:
    """Save a classifier as the versions up to 0.1 and those after it did, with its parts in folders below."""
    tokenizer.save_pretrained(folder / "tokenizer")
    own = dict(settings)
    if isinstance(model, EncoderClassifier):
        model.encoder.save_pretrained(folder / "encoder")  # type: ignore[operator]
        own |= {"classifier_width": model.classifier[0].out_features, "dropout": 0.1, "pooling": model.pooling}
        save_file(dict(model.classifier.state_dict()), folder / "classifier.safetensors")
    else:
        assert isinstance(model, SequenceClassifier)
        model.model.save_pretrained(folder / "sequence_classifier")  # type: ignore[operator]
    (folder / "classifier.json").write_text(json.dumps(own), encoding="utf-8")
    return folder
