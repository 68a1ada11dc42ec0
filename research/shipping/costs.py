"""What each shipped form of a model costs: its size on disk and, one thread, in turn, its speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from research.evaluation.efficiency import LATENCY_BATCH, measure_efficiency
from research.shipping.scorers import Scorer
from research.storage.arrays import gather_ragged

TIMED_BATCHES = 8
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx")


@dataclass(frozen=True)
class Form:
    """A form of a model, and where its weights are."""

    scorer: Scorer
    weights: tuple[Path, ...]

    @property
    def size_mb(self) -> float:
        """Size of the weights on disk, in MB of 10**6 bytes."""
        return sum(path.stat().st_size for path in self.weights) / 1e6


class ScorerModule(nn.Module):
    """A scorer in the place of a module, for what times modules."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Return the logits (B, C) of ids and mask (B, L), as an array."""
        return {"logits": self.scorer.classify(input_ids.numpy(), attention_mask.numpy())}


def list_weights(folder: Path) -> tuple[Path, ...]:
    """Return the files of weights below a model's folder."""
    return tuple(sorted(path for path in folder.rglob("*") if path.suffix in WEIGHT_SUFFIXES and path.is_file()))


def measure_forms(forms: Mapping[str, Form], texts: Sequence[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Time the forms side by side on the same texts, on one thread.

    Args:
        texts: Some are timed, in random order; scorers were opened for one thread.
        seconds: For each form and batch size, about.

    Returns:
        For each form `size_mb` and, as `measure_efficiency` does, medians and ranges of latency at batch 1 and 32 and of
        throughput.
    """
    chosen = np.random.default_rng(0).permutation(len(texts))[: TIMED_BATCHES * LATENCY_BATCH]
    sample = [texts[row] for row in chosen]
    batches = {name: cut_batches(form.scorer, sample) for name, form in forms.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = measure_efficiency(
            {name: ScorerModule(form.scorer) for name, form in forms.items()}, batches, "cpu", time_budget_s=seconds
        )
    finally:
        torch.set_num_threads(threads)
    timed = ("latency", "throughput")
    return {
        name: {"size_mb": form.size_mb} | {key: value for key, value in measured[name].items() if key.startswith(timed)}
        for name, form in forms.items()
    }


def cut_batches(scorer: Scorer, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return the texts as full batches, each padded to its longest row; the first rows are repeated to fill the last."""
    filled = [texts[row % len(texts)] for row in range(-(-len(texts) // LATENCY_BATCH) * LATENCY_BATCH)]
    ids, lengths = scorer.encode(filled)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    batches = []
    for start in range(0, len(filled), LATENCY_BATCH):
        input_ids, real = gather_ragged(ids, offsets, np.arange(start, start + LATENCY_BATCH), scorer.pad_id)
        batches.append({"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(real.astype(np.int64))})
    return batches
