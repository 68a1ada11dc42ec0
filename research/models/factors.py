"""Token embeddings as the product of two small matrices, and an encoder's folder that says so.

Shapes: V pieces, R rank, E width of the embeddings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

RANK = "embedding_rank"  # an entry of the encoder's configuration
MODEL_TYPE = "factorised_embeddings"
INNER_TYPE = "factorised_model_type"


class FactorisedEmbedding(nn.Module):
    """In the place of an nn.Embedding (V, E): (V, R), then a linear map to E, as in ALBERT (Lan et al., 2020)."""

    def __init__(self, num_embeddings: int, rank: int, width: int, padding_idx: int | None) -> None:
        super().__init__()
        self.pieces = nn.Embedding(num_embeddings, rank, padding_idx)
        self.widen = nn.Linear(rank, width, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings (B, L, E) of ids (B, L)."""
        widened: Tensor = self.widen(self.pieces(input_ids))
        return widened


def put_factors(encoder: Any) -> Any:
    """Give an encoder that was built from its configuration the factors that this asks for, with random weights."""
    rank = getattr(encoder.config, RANK, None)
    if rank is not None:
        table = encoder.get_input_embeddings()
        encoder.set_input_embeddings(FactorisedEmbedding(table.num_embeddings, rank, table.embedding_dim, table.padding_idx))
    return encoder


def save_encoder(encoder: Any, folder: Path) -> None:
    """Write an encoder's folder; with factors it is of a model type that only `read_factorised` knows.

    Under its own type, transformers would load it with random embeddings and a warning.
    """
    encoder.save_pretrained(folder)
    if getattr(encoder.config, RANK, None) is not None:
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {"model_type": MODEL_TYPE, INNER_TYPE: values["model_type"]}
        path.write_text(json.dumps(values, sort_keys=True, indent=2) + "\n", encoding="utf-8")


def read_factorised(name: str) -> dict[str, Any] | None:
    """Return the configuration of an encoder with factors, under its own type, None when a folder holds another model."""
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        return None
    return {**values, "model_type": values.pop(INNER_TYPE)}
