"""A student without layers: a vector for each piece of the tokenizer, taken from an encoder that was trained.

The recipe is model2vec's (Tulkens and van Dongen, 2024): the encoder reads each piece alone, a principal component
analysis shortens the vectors, and frequent pieces weigh less. The text vector is the mean over its pieces, as in
Arora, Liang and Ma, "A simple but tough-to-beat baseline for sentence embeddings" (2017), whose weights these are.

Shapes: V pieces, L tokens, H width of the encoder, D width of the vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from research.logs import with_progress

PIECES_AT_ONCE = 256
# Of Arora et al., who found anything from 1e-4 to 1e-3 to do.
SIF_SMOOTHING = 1e-3


class StaticConfig(PretrainedConfig):
    """The sizes of a static encoder."""

    model_type = "static_embeddings"

    def __init__(self, vocab_size: int = 1, hidden_size: int = 1, **others: Any) -> None:
        super().__init__(**others)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = 0


class StaticEncoder(PreTrainedModel):
    """Gives each token the vector of its piece, whatever stands beside it."""

    config_class = StaticConfig
    base_model_prefix = "static"

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the vectors of the pieces."""
        return self.embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Return the tokens' vectors (B, L, D) as last states."""
        return BaseModelOutput(last_hidden_state=self.embeddings(input_ids))


# Here and in whatever imports this file, a static encoder's folder loads as that of any other encoder.
AutoConfig.register(StaticConfig.model_type, StaticConfig, exist_ok=True)
AutoModel.register(StaticConfig, StaticEncoder, exist_ok=True)


def build_static(
    encoder: Any, tokenizer: Any, width: int, counts: NDArray[np.int64] | None, device: torch.device | str = "cpu"
) -> StaticEncoder:
    """Return the static encoder of a trained one; special tokens start as zeros.

    Args:
        tokenizer: The encoder's.
        width: D, at most H and V.
        counts: How often the texts hold each piece, for vectors that weigh less the more frequent their piece is;
            later pieces are not there. None for equal weights.
    """
    outputs = read_pieces(encoder.to(device), tokenizer)
    # In double precision and with a fixed sign of every component, so that one machine gives the same bytes.
    vectors = PCA(width, svd_solver="covariance_eigh").fit_transform(outputs.astype(np.float64))
    if counts is not None:
        vectors[: len(counts)] *= sif_weights(counts)[:, None]
    special = [token for token in tokenizer.all_special_ids if token < len(vectors)]
    vectors[special] = 0.0
    static = StaticEncoder(StaticConfig(*vectors.shape, pad_token_id=tokenizer.pad_token_id))
    static.embeddings.weight.data.copy_(torch.from_numpy(vectors))
    return static


def read_pieces(encoder: Any, tokenizer: Any) -> NDArray[np.float32]:
    """Return the mean (V, H) of an encoder's last states over each piece with the special tokens around it."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    first, *_, last = [place for place, is_special in enumerate(encoded["special_tokens_mask"]) if not is_special] * 2
    around = [*encoded["input_ids"][: first + 1], *encoded["input_ids"][last + 1 :]]
    weight = next(encoder.parameters())
    pieces = torch.arange(encoder.config.vocab_size).split(PIECES_AT_ONCE)
    vectors = []
    with torch.no_grad():
        encoder.eval()
        for batch in with_progress(pieces, "vectors of the pieces", len(pieces)):
            ids = torch.tensor(around).repeat(len(batch), 1)
            ids[:, first] = batch
            ids = ids.to(weight.device)
            states = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            vectors.append(states.mean(dim=1).float().cpu().numpy())
    return np.concatenate(vectors)


def sif_weights(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a / (a + p) for each piece, (V,): p is its share of all pieces, so one never met weighs 1."""
    return SIF_SMOOTHING / (SIF_SMOOTHING + counts / max(int(counts.sum()), 1))
