"""The frozen teacher of a run and what it says of every row: run once, kept in the cache, read by row.

Shapes: N rows, C labels, P positions of a row (tokens, or shared words when the tokenizers differ), H width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from research.evaluation.predict import idle_inputs
from research.kd.labelling import Part, join_parts, label_parts
from research.kd.layers import ComparedLayers, LayerOutputs, align_outputs
from research.logs import with_progress
from research.models.classifiers import ModelShape, TextClassifier, freeze
from research.sharding import answering, is_sharded
from research.storage.arrays import append_array, map_array, read_ragged, return_free_memory, write_array
from research.storage.cache import Cache
from research.text.batches import Batch, BatchLoader, move_batch

log = logging.getLogger(__name__)
# Part of the cache keys: raise it when the names or the layout of the files change.
LAYERS_FORMAT = 2
FLOAT16_LARGEST = float(np.finfo(np.float16).max)


class Teacher:
    """The fine-tuned teacher: what identifies it, and its model, loaded only when something needs it.

    Args:
        identity: JSON values that change with any of its weights.
        shape: Its depth, width and heads.
        load: Loads the model.
        store: Puts the teacher into a folder of a run.
        training: Deterministic facts of its fine-tuning.
        num_parameters: Known before it is loaded.
        place: Puts the loaded model where it answers, as `shard` does over several processes; as it is without.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        shape: ModelShape,
        load: Callable[[], TextClassifier],
        store: Callable[[Path], None],
        training: dict[str, Any],
        num_parameters: int,
        place: Callable[[TextClassifier], TextClassifier] | None = None,
    ) -> None:
        self.identity = identity
        self.shape = shape
        self.store = store
        self.training = training
        self.num_parameters = num_parameters
        self.is_sharded = place is not None
        self._load = load
        self._place = place

    @cached_property
    def model(self) -> TextClassifier:
        """The frozen teacher, loaded when it is first asked for, and that by all processes where it is sharded."""
        model = freeze(self._load())
        return model if self._place is None else self._place(model)

    def load_encoder(self) -> nn.Module:
        """Return the encoder of a teacher that is whole, for whoever copies it; frozen."""
        model: Any = freeze(self._load()) if self.is_sharded else self.model
        encoder: nn.Module = model.encoder
        return encoder


def fetch_logits(teacher: Teacher, loader: BatchLoader, device: torch.device, cache: Cache) -> NDArray[np.float32]:
    """Return the teacher's logits of the loader's rows, (N, C), running it only when the cache has none.

    They are computed once in float32, so every run of a sweep reads the very same numbers. The loader's
    own tokens are the teacher's.
    """
    assert loader.teacher_tokens is None

    def label(scratch: Path) -> list[Part]:
        return label_parts(lambda: teacher.model, loader, device, scratch)

    def build(folder: Path, scratch: Path) -> None:
        join_parts(label(scratch), scratch, folder / "logits.npy")

    def read(folder: Path) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = np.load(folder / "logits.npy", mmap_mode="r")
        if len(logits) != loader.num_rows:
            raise ValueError(f"logits of {len(logits)} rows")
        return logits

    key = output_key(teacher.identity, loader.tokens.key, loader.rows, device)
    folder = cache.fetch("logits", key, build, read, join=label)
    return_free_memory()
    return read(folder)


def output_key(identity: Mapping[str, Any], tokens_key: str, rows: NDArray[np.int64], device: torch.device) -> dict[str, Any]:
    """Return what a teacher's outputs on some rows depend on, to the last bit.

    Args:
        identity: What identifies the teacher.
        tokens_key: That of the tokens it reads.
    """
    return {
        "teacher": identity,
        "tokens": tokens_key,
        "rows": hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


class LayerStore:
    """The mapped layers' states, maps or relations of some rows, on disk, ragged and unpadded.

    States lie one position after the other, (sum of P, H) a file; maps one row after the other,
    P * P values each. float16 holds them unless a value is too large, then float32 does.
    """

    def __init__(self, folder: Path) -> None:
        layout = json.loads((folder / "layout.json").read_text(encoding="utf-8"))
        dtype = np.dtype(layout["dtype"])
        rows = map_array(folder / "rows.bin", np.int64)
        self.lengths = map_array(folder / "lengths.bin", np.int64)
        self.states = {
            name: map_array(folder / f"{name}.bin", dtype).reshape(-1, width) for name, width in layout["states"].items()
        }
        self.maps = {name: map_array(folder / f"{name}.bin", dtype) for name in layout["maps"]}
        self.slot_of_row = np.full(int(rows.max(initial=-1)) + 1, -1)
        self.slot_of_row[rows] = np.arange(len(rows))
        self.state_starts = np.cumsum(self.lengths) - self.lengths
        self.map_starts = np.cumsum(self.lengths**2) - self.lengths**2
        num_states, num_cells = int(self.lengths.sum()), int((self.lengths**2).sum())
        torn = [name for name, states in self.states.items() if len(states) != num_states]
        torn += [name for name, cells in self.maps.items() if len(cells) != num_cells]
        if torn or len(rows) != len(self.lengths):
            raise ValueError(f"{', '.join(torn) or 'rows'}: not of the size that lengths.bin gives")

    def read(self, rows: NDArray[np.int64]) -> LayerOutputs:
        """Return what is kept of some rows, padded with zeros, on the CPU and as precise as it is stored."""
        slots = self.slot_of_row[rows]
        assert (slots >= 0).all(), "the store does not hold these rows"
        lengths = self.lengths[slots]
        real = np.arange(int(lengths.max(initial=0))) < lengths[:, None]  # (B, P)
        pairs = real[:, :, None] & real[:, None, :]  # (B, P, P)
        states = {
            name: _scatter(real, read_ragged(flat, self.state_starts[slots], lengths)) for name, flat in self.states.items()
        }
        maps = {name: _scatter(pairs, read_ragged(flat, self.map_starts[slots], lengths**2)) for name, flat in self.maps.items()}
        return unname_outputs(states, maps)


def _scatter(real: NDArray[np.bool_], cells: NDArray[Any]) -> Tensor:
    """Return a tensor that holds the cells where `real` is true, in order, and zeros elsewhere."""
    padded = np.zeros((*real.shape, *cells.shape[1:]), dtype=cells.dtype)
    padded[real] = cells
    return torch.from_numpy(padded)


def name_outputs(outputs: LayerOutputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Name layer outputs as their files are: the states (B, P, H), and the maps (B, P, P)."""
    states = {f"hidden.{layer}": tensor for layer, tensor in outputs.hidden.items()}
    for layer, parts in outputs.relations.items():
        states |= {f"relation.{layer}.{part}": tensor for part, tensor in enumerate(parts)}
    return states, {f"map.{layer}": tensor for layer, tensor in outputs.maps.items()}


def unname_outputs(states: Mapping[str, Tensor], maps: Mapping[str, Tensor]) -> LayerOutputs:
    """Return the layer outputs of which `name_outputs` gives these names."""
    hidden: dict[int, Tensor] = {}
    relations: dict[int, dict[int, Tensor]] = {}
    for name, tensor in states.items():
        match name.split("."):
            case ["hidden", layer]:
                hidden[int(layer)] = tensor
            case ["relation", layer, part]:
                relations.setdefault(int(layer), {})[int(part)] = tensor
    return LayerOutputs(
        hidden,
        {int(name.removeprefix("map.")): tensor for name, tensor in maps.items()},
        {layer: tuple(parts[part] for part in sorted(parts)) for layer, parts in relations.items()},
    )


def estimate_bytes(layers: ComparedLayers, lengths: NDArray[np.integer[Any]], width: int) -> int:
    """Return the size of a float16 store of rows with these numbers of positions."""
    state_files = len(layers.hidden) + (3 * len(layers.attention) if layers.relations else 0)
    map_files = 0 if layers.relations else len(layers.attention)
    return 2 * int(state_files * width * lengths.sum() + map_files * np.square(lengths, dtype=np.int64).sum())


def fetch_layers(teacher: Teacher, layers: ComparedLayers, loader: BatchLoader, device: torch.device, cache: Cache) -> LayerStore:
    """Return the store of the compared layers for the loader's rows, running the teacher when the cache has none.

    The loader carries the teacher's ids, and both sides' words when the tokenizers differ.
    """
    tokens = loader.teacher_tokens or loader.tokens
    key = output_key(teacher.identity, tokens.key, loader.rows, device) | {
        "student_tokens": loader.tokens.key if loader.words is not None else None,
        "layers": (layers.hidden, layers.attention),
        "relations": layers.relations,
        "format": LAYERS_FORMAT,
    }

    def compute(dtype: type[np.floating[Any]]) -> Iterator[RowLayers]:
        return compute_layers(teacher, layers, loader, device, dtype)

    def build(folder: Path, _scratch: Path) -> None:
        try:
            write_layers(folder, compute(np.float16), np.float16)
        except OverflowError:
            log.warning("some teacher states are too large for float16: keeping them in float32")
            write_layers(folder, compute(np.float32), np.float32)

    def join(_scratch: Path) -> None:
        try:
            deque(compute(np.float16), maxlen=0)
        except OverflowError:
            deque(compute(np.float32), maxlen=0)

    return LayerStore(cache.fetch("layers", key, build, LayerStore, join))


@dataclass(frozen=True)
class RowLayers:
    """The layers of a batch's rows at their real positions, as precise as they are stored.

    Attributes:
        rows, lengths: (B,) the rows' places in the data set, and their numbers of positions.
        states: By file name, (sum of P, H).
        maps: By file name, (sum of P * P,).
    """

    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    states: dict[str, NDArray[Any]]
    maps: dict[str, NDArray[Any]]


def compute_layers(
    teacher: Teacher, layers: ComparedLayers, loader: BatchLoader, device: torch.device, dtype: type[np.floating[Any]]
) -> Iterator[RowLayers]:
    """Run the teacher over the loader's rows and yield the layers of each batch, in the order of all batches.

    Several processes take turns: the first yields what each of them computed, the others nothing.

    Raises:
        OverflowError: a value does not fit `dtype`; in every process.
    """
    model, world = teacher.model.to(device), loader.world
    for batch in world.take_turns(with_progress(loader, "teacher layers", len(loader))):
        found, fits = None, True
        if batch is not None:
            try:
                found = keep_layers(*run_layers(model, layers, move_batch(batch, device)), batch["row"].numpy(), dtype)
            except OverflowError:
                fits = False
        elif is_sharded(model):
            with answering(model):
                model(*idle_inputs(device), **layers.request)
        if any(world.any(not fits)):
            raise OverflowError
        yield from (of_rank for of_rank in world.gather(found) if of_rank is not None)


def keep_layers(outputs: LayerOutputs, mask: Tensor, rows: NDArray[np.int64], dtype: type[np.floating[Any]]) -> RowLayers:
    """Return what a store keeps of a batch's layers.

    Raises:
        OverflowError: a value does not fit `dtype`.
    """

    def keep(tensors: Mapping[str, Tensor], real: Tensor) -> dict[str, NDArray[Any]]:
        return {name: _round(tensor[real].float().cpu().numpy(), dtype) for name, tensor in tensors.items()}

    states, maps = name_outputs(outputs)
    pairs = mask.unsqueeze(2) & mask.unsqueeze(1)
    return RowLayers(rows, mask.sum(dim=1).cpu().numpy(), keep(states, mask), keep(maps, pairs))


def _round(values: NDArray[np.float32], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    if dtype is np.float16 and np.abs(values).max(initial=0.0) > FLOAT16_LARGEST:
        raise OverflowError
    return values.astype(dtype)


def write_layers(folder: Path, computed: Iterable[RowLayers], dtype: type[np.floating[Any]]) -> None:
    """Write the layers of batches, one after the other, as a `LayerStore` reads them."""
    files: dict[str, BinaryIO] = {}
    rows: list[NDArray[np.int64]] = []
    lengths: list[NDArray[np.int64]] = []
    # A state's width: that of relations need not be that of the hidden states.
    widths: dict[str, int] = {}
    maps: dict[str, None] = {}
    with ExitStack() as open_files:
        for batch in computed:
            rows.append(batch.rows)
            lengths.append(batch.lengths)
            widths |= {name: values.shape[-1] for name, values in batch.states.items()}
            maps |= dict.fromkeys(batch.maps)
            for name, values in (batch.states | batch.maps).items():
                if name not in files:
                    files[name] = open_files.enter_context(open(folder / f"{name}.bin", "wb"))
                append_array(files[name], values)
    write_array(folder / "rows.bin", np.concatenate(rows))
    write_array(folder / "lengths.bin", np.concatenate(lengths))
    layout = {"dtype": np.dtype(dtype).name, "states": widths, "maps": list(maps)}
    (folder / "layout.json").write_text(json.dumps(layout), encoding="utf-8")


def run_layers(model: TextClassifier, layers: ComparedLayers, batch: Batch) -> tuple[LayerOutputs, Tensor]:
    """Return the teacher's layer outputs at the compared positions, and which positions are real, (B, P)."""
    input_ids, attention_mask = teacher_inputs(batch)
    with answering(model):
        outputs = layers.pick(model(input_ids, attention_mask, **layers.request))
        return align_outputs(outputs, attention_mask, batch.get("teacher_words"), int(batch.get("num_words", 0)))


def teacher_inputs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the ids and mask, (B, L) each, that the teacher reads: its own, or the student's when they are the same."""
    prefix = "teacher_" if "teacher_input_ids" in batch else ""
    return batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
