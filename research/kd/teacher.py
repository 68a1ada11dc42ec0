"""The frozen teacher of a run and what it says of every row: run once, kept in the cache, read by row.

Shapes: N rows, C labels, P positions of a row (tokens, or shared words when the tokenizers differ), H width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from research.evaluation.predict import predict_logits
from research.kd.layers import LayerComparison, LayerOutputs, name_layer_outputs, pool_outputs, word_mask
from research.models.classifiers import ModelShape, TextClassifier, freeze
from research.storage.arrays import append_array, map_array, release_pages, return_free_memory, write_array, write_npy
from research.storage.cache import Cache
from research.text.batches import BatchLoader

log = logging.getLogger(__name__)
FLOAT16_LARGEST = float(np.finfo(np.float16).max)


class Teacher:
    """The fine-tuned teacher: what identifies it, and its model, loaded only when something needs it.

    Args:
        identity: JSON values that change with any of its weights.
        shape: Its depth, width and heads.
        load: Loads the model.
        store: Puts the teacher into a folder of a run.
        training: Deterministic facts of its fine-tuning.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        shape: ModelShape,
        load: Callable[[], TextClassifier],
        store: Callable[[Path], None],
        training: dict[str, Any],
    ) -> None:
        self.identity = identity
        self.shape = shape
        self.store = store
        self.training = training
        self._load = load

    @cached_property
    def model(self) -> TextClassifier:
        return freeze(self._load())


def fetch_logits(teacher: Teacher, loader: BatchLoader, device: torch.device, cache: Cache) -> NDArray[np.float32]:
    """Return the teacher's logits of the loader's rows, (N, C), running it only when the cache has none.

    They are computed once in float32, so every run of a sweep reads the very same numbers. The loader's
    own tokens are the teacher's.
    """
    assert loader.teacher_tokens is None

    def build(folder: Path, _scratch: Path) -> None:
        batches = with_progress(loader, "teacher logits")
        logits = predict_logits(teacher.model.to(device), batches, device, num_rows=loader.num_rows)
        write_npy(folder / "logits.npy", logits)

    def read(folder: Path) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = np.load(folder / "logits.npy", mmap_mode="r")
        if len(logits) != loader.num_rows:
            raise ValueError(f"logits of {len(logits)} rows")
        return logits

    folder = cache.fetch("logits", output_key(teacher, loader, device), build, read)
    return_free_memory()
    return read(folder)


def output_key(teacher: Teacher, loader: BatchLoader, device: torch.device) -> dict[str, Any]:
    """Return what the teacher's outputs on a loader's rows depend on, to the last bit."""
    tokens = loader.teacher_tokens or loader.tokens
    return {
        "teacher": teacher.identity,
        "tokens": tokens.key,
        "rows": hashlib.sha256(np.ascontiguousarray(loader.rows).tobytes()).hexdigest(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def with_progress(loader: BatchLoader, name: str) -> Any:
    return tqdm(loader, desc=name, unit="batch", disable=not sys.stderr.isatty(), leave=False)


class LayerStore:
    """The mapped layers' states, maps or relations of some rows, on disk, ragged and unpadded.

    States lie one position after the other, (sum of P, H) a file; maps one row after the other,
    P * P values each. float16 holds them unless a value is too large, then float32 does.
    """

    def __init__(self, folder: Path) -> None:
        layout = json.loads((folder / "layout.json").read_text(encoding="utf-8"))
        rows = map_array(folder / "rows.bin", np.int64)
        lengths = map_array(folder / "lengths.bin", np.int64)
        dtype = np.dtype(layout["dtype"])
        self.states = {name: map_array(folder / f"{name}.bin", dtype) for name in layout["states"]}
        self.widths: dict[str, int] = layout["states"]
        self.maps = {name: map_array(folder / f"{name}.bin", dtype) for name in layout["maps"]}
        self.slot_of_row = np.full(int(rows.max(initial=-1)) + 1, -1)
        self.slot_of_row[rows] = np.arange(len(rows))
        self.lengths = lengths
        self.state_starts = np.cumsum(lengths) - lengths
        self.map_starts = np.cumsum(lengths**2) - lengths**2
        sizes = {name: int(lengths.sum()) * width for name, width in layout["states"].items()}
        sizes |= dict.fromkeys(layout["maps"], int((lengths**2).sum()))
        torn = [name for name, flat in (self.states | self.maps).items() if flat.size != sizes[name]]
        if torn or len(rows) != len(lengths):
            raise ValueError(f"{', '.join(torn) or 'rows'}: not of the size that layout.json and lengths.bin give")

    def collate(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return each kept tensor of some rows, padded with zeros: (B, P, H) states, (B, P, P) maps."""
        slots = self.slot_of_row[rows]
        assert (slots >= 0).all(), "the store does not hold these rows"
        lengths = self.lengths[slots]
        positions = np.arange(int(lengths.max(initial=0)))
        real = positions < lengths[:, None]  # (B, P)
        arrays = {}
        for name, width in self.widths.items():
            flat = self.states[name].reshape(-1, width)
            padded = np.zeros((*real.shape, width), dtype=flat.dtype)
            padded[real] = flat[(self.state_starts[slots][:, None] + positions)[real]]
            arrays[name] = padded
        pairs = real[:, :, None] & real[:, None, :]  # (B, P, P)
        cells = self.map_starts[slots][:, None, None] + positions[:, None] * lengths[:, None, None] + positions
        for name, flat in self.maps.items():
            padded = np.zeros(pairs.shape, dtype=flat.dtype)
            padded[pairs] = flat[cells[pairs]]
            arrays[name] = padded
        return arrays

    def release_pages(self) -> None:
        release_pages(*self.states.values(), *self.maps.values())


def estimate_bytes(comparison: LayerComparison, lengths: NDArray[np.int64], width: int) -> int:
    """Return the size of a float16 store of rows with these numbers of positions."""
    hidden_layers, attention_layers = comparison.layers(0)
    state_files = len(hidden_layers) + (3 * len(attention_layers) if comparison.relations else 0)
    map_files = 0 if comparison.relations else len(attention_layers)
    return 2 * int(state_files * width * lengths.sum() + map_files * (lengths**2).sum())


def fetch_layers(
    teacher: Teacher, comparison: LayerComparison, loader: BatchLoader, device: torch.device, cache: Cache
) -> LayerStore:
    """Return the store of the compared layers for the loader's rows, running the teacher when the cache has none.

    The loader carries the teacher's ids, and both sides' words when the tokenizers differ.
    """
    key = output_key(teacher, loader, device) | {
        "student_tokens": loader.tokens.key if loader.words is not None else None,
        "layers": comparison.layers(0),
        "relations": comparison.relations,
    }

    def build(folder: Path, _scratch: Path) -> None:
        if not write_layers(folder, teacher, comparison, loader, device, np.dtype(np.float16)):
            log.warning("some teacher states are too large for float16: keeping them in float32")
            write_layers(folder, teacher, comparison, loader, device, np.dtype(np.float32))

    return LayerStore(cache.fetch("layers", key, build, LayerStore))


def write_layers(
    folder: Path,
    teacher: Teacher,
    comparison: LayerComparison,
    loader: BatchLoader,
    device: torch.device,
    dtype: np.dtype[Any],
) -> bool:
    """Write the layers of the loader's rows, in its order; return False when a value does not fit `dtype`."""
    model = teacher.model.to(device)
    files: dict[str, BinaryIO] = {}
    rows: list[NDArray[np.int64]] = []
    lengths: list[NDArray[np.int64]] = []
    # A file's width: that of a state, which relations need not share with the hidden states.
    widths: tuple[dict[str, int], dict[str, int]] = ({}, {})
    with ExitStack() as open_files:
        for batch in with_progress(loader, "teacher states"):
            outputs, mask = run_layers(model, comparison, {name: tensor.to(device) for name, tensor in batch.items()})
            rows.append(batch["row"].numpy())
            lengths.append(mask.sum(dim=1).cpu().numpy())
            pairs = mask.unsqueeze(2) & mask.unsqueeze(1)
            for group, tensors, real in zip(widths, name_layer_outputs(outputs), (mask, pairs), strict=True):
                for name, tensor in tensors.items():
                    values = tensor[real].float().cpu().numpy()
                    if dtype == np.float16 and np.abs(values).max(initial=0.0) > FLOAT16_LARGEST:
                        return False
                    if name not in files:
                        group[name] = tensor.shape[-1]
                        files[name] = open_files.enter_context(open(folder / f"{name}.bin", "wb"))
                    append_array(files[name], values.astype(dtype))
    write_array(folder / "rows.bin", np.concatenate(rows))
    write_array(folder / "lengths.bin", np.concatenate(lengths))
    layout = {"dtype": dtype.name, "states": widths[0], "maps": list(widths[1])}
    (folder / "layout.json").write_text(json.dumps(layout), encoding="utf-8")
    return True


def run_layers(model: TextClassifier, comparison: LayerComparison, batch: dict[str, Tensor]) -> tuple[LayerOutputs, Tensor]:
    """Return the teacher's layer outputs at the compared positions, and which positions are real, (B, P)."""
    input_ids = batch.get("teacher_input_ids", batch["input_ids"])
    attention_mask = batch.get("teacher_attention_mask", batch["attention_mask"])
    with torch.inference_mode():
        _, outputs = comparison.run(model, 0, input_ids, attention_mask)
        if "teacher_words" not in batch:
            return outputs, attention_mask.bool()
        num_words = int(batch["num_words"])
        return pool_outputs(outputs, batch["teacher_words"], num_words), word_mask(batch["teacher_words"], num_words)
