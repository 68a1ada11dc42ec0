"""A tiny classifier, batches for it, and labels with scores that fit them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertModel

NAMES = ["bully", "threat", "spam"]


def random_case(num_rows: int = 200, num_labels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probs = rng.random((num_rows, num_labels)).round(2)  # ties, as real scores have
    labels = (rng.random(probs.shape) < probs * 0.7).astype(float)
    return labels, probs


class TinyClassifier(nn.Module):
    def __init__(self, hidden_size: int = 16, num_layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=24,
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Sequential(nn.Linear(hidden_size, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.classifier(states[:, 0])}


class LengthSortedLoader:
    """Rows of growing length, longest first, padded batch by batch."""

    def __init__(self, num_rows: int = 11, batch_size: int = 4) -> None:
        rng = np.random.default_rng(1)
        self.num_rows, self.batch_size = num_rows, batch_size
        self.rows = [torch.from_numpy(rng.integers(1, 50, size=length)) for length in rng.integers(2, 20, num_rows)]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = sorted(range(self.num_rows), key=lambda row: -len(self.rows[row]))
        for start in range(0, self.num_rows, self.batch_size):
            index = order[start : start + self.batch_size]
            input_ids = nn.utils.rnn.pad_sequence([self.rows[row] for row in index], batch_first=True)
            yield {
                "index": torch.tensor(index),
                "input_ids": input_ids,
                "attention_mask": (input_ids > 0).long(),
                "labels": torch.zeros(len(index), 3),
            }
