"""A trained classifier as ONNX, in float32: the folder that ONNX Runtime, optimum and transformers.js read.

    config.json  tokenizer.json  tokenizer_config.json    as in any folder of transformers
    onnx/model.onnx                                       input_ids, attention_mask (batch, length) -> logits (batch, C)
    classifier.json                                       labels, thresholds, longest text, normalisation

Batch and length are free; attention_mask is 1 for a token and 0 for padding, which stands on the right.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from research.errors import InputError
from research.models.reading import refusing
from research.models.saved import SavedClassifier
from research.runs.formats import write_json_atomic
from research.shipping.scorers import EXPORT_FILE, ONNX_FILES, Usage

LARGEST_FILE = 2_000_000_000  # a protocol buffer's
INPUTS = ("input_ids", "attention_mask")


class LogitsOnly(nn.Module):
    """A classifier that returns its logits and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits (B, C) of ids and mask (B, L)."""
        return self.model(input_ids, attention_mask)["logits"]


def write_exported(saved: SavedClassifier, usage: Usage, folder: Path) -> None:
    """Write a classifier's whole folder but for the int8 model.

    Raises:
        InputError: its tokenizer is a slow one, it is too large for one file, or torch cannot export it.
    """
    if not saved.tokenizer.is_fast:
        raise InputError(f"{saved.tokenizer.name_or_path}: its tokenizer is a slow one; only tokenizer.json runs everywhere")
    (folder / "onnx").mkdir(parents=True)
    write_onnx(saved.model, folder / ONNX_FILES[False])
    write_config(saved.model.backbone_config, usage.labels, folder)
    write_tokenizer(saved.tokenizer, usage.max_length, folder)
    settings = {
        "labels": list(usage.labels),
        "thresholds": usage.thresholds,
        "max_length": usage.max_length,
        "text_normalization": usage.text_normalization,
        "truncation_side": saved.tokenizer.truncation_side,
        "pad_token_id": int(saved.tokenizer.pad_token_id or 0),  # the mask hides it
    }
    write_json_atomic(folder / EXPORT_FILE, settings)


def write_onnx(model: nn.Module, path: Path) -> None:
    """Export a classifier with torch's exporter.

    Raises:
        InputError: it is too large, or torch cannot export it.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST_FILE:
        raise InputError(f"--model: its weights take {size / 1e9:.1f} GB, and an ONNX file holds 2. Export a smaller student.")
    ids = torch.arange(33).view(3, 11) % 7 + 1
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with refusing("--model: torch cannot export it to ONNX"), quiet_exporter():
        program = torch.onnx.export(
            LogitsOnly(model).eval(),
            (ids, mask),
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(INPUTS, dimensions),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)
    strip_traces(path)


def strip_traces(path: Path) -> None:
    """Remove what the exporter notes of each node: lines and paths of the code that made it, half of a small file.

    Raises:
        InputError: batch or length came out as numbers, so that the model would take no other input.
    """
    import onnx

    model = onnx.load(path)
    sizes = [dimension for entry in model.graph.input for dimension in entry.type.tensor_type.shape.dim]
    if not all(size.dim_param for size in sizes):
        raise InputError("--model: torch's exporter fixes its batch or length; ONNX cannot express this architecture")
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save(model, path)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what the exporter and the quantiser say of themselves."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def write_config(backbone_config: Any, labels: tuple[str, ...], folder: Path) -> None:
    """Write config.json: the encoder's, with the labels and the class that loaders choose their code by."""
    # As slow to import as transformers itself.
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    config = copy.deepcopy(backbone_config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: place for place, label in enumerate(labels)}
    config.problem_type = "multi_label_classification"
    if name := CLASSES.get(config.model_type):
        config.architectures = [name]
    content = config.to_dict() | {"id2label": {str(place): label for place, label in enumerate(labels)}}
    content.pop("_name_or_path", None)  # a folder of this machine
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def write_tokenizer(tokenizer: Any, max_length: int, folder: Path) -> None:
    """Write the tokenizer so that whatever loads it cuts texts where the model was trained to."""
    from tokenizers import Tokenizer

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    backend.no_padding()
    backend.save(str(folder / "tokenizer.json"))
