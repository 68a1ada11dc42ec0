"""Token embeddings as the product of two small matrices.

Shapes: V pieces, R rank, E width of the embeddings.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

RANK = "embedding_rank"  # an entry of the encoder's configuration


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
