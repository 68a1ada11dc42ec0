"""Logistic regression on a text's n-grams of pieces, as one more term of a classifier's logits: a wide part beside a deep one.

Wide and deep parts make unlike mistakes (Cheng et al., "Wide & deep learning for recommender systems", 2016): layers know
what words mean, n-grams which exact strings the labels hang on. Both read the ids of one tokenizer, so the classifier
stays one model that takes `input_ids` and `attention_mask`, in torch and in ONNX.

With o running over the n-grams of a text that the table knows, idf their inverse document frequencies and u their weights,

    z = (1 - s) z_layers + s (b + sum_o idf_o u_o / sqrt(sum_o idf_o^2)),

which is tf-idf scaled to unit length wherever no n-gram stands twice in the text, and s the share of the n-grams.

Shapes: B batch, L tokens, C labels, F n-grams of the table, n the most pieces in one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from research.models.ngram_table import NgramTable, is_countable


class NgramBranch(nn.Module):
    """The wide part, fitted: it takes the logits of the layers and returns those of both.

    Attributes:
        codes: (F,) int64, rising; see `number_ngrams`.
        squares: (F,) float32, idf².
        weights: (F, C) float32, s idf u.
        bias: (C,) float32, s b.
        layers_share: () float32, 1 - s.
    """

    codes: Tensor
    squares: Tensor
    layers_share: Tensor

    def __init__(self, num_ngrams: int, num_labels: int, vocabulary: int, longest: int) -> None:
        super().__init__()
        assert is_countable(vocabulary, longest)
        self.vocabulary, self.longest = vocabulary, longest
        self.register_buffer("codes", torch.zeros(num_ngrams, dtype=torch.int64))
        self.register_buffer("squares", torch.ones(num_ngrams))
        self.register_buffer("layers_share", torch.ones(()))
        self.weights = nn.Parameter(torch.zeros(num_ngrams, num_labels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_labels), requires_grad=False)

    def forward(self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits (B, C) of layers and n-grams together from the layers' and ids and mask (B, L)."""
        places, known = self.look_up(input_ids, attention_mask)
        found = known.to(self.weights.dtype)
        squares = self.squares.index_select(0, places.flatten()).view_as(found)
        length = (squares * found).sum(dim=1, keepdim=True).clamp_min(1.0).sqrt()  # no idf is under 1
        summed = (embedding(places, self.weights) * found.unsqueeze(-1)).sum(dim=1)
        return logits.float() * self.layers_share + summed / length + self.bias

    def look_up(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the place in the table of each n-gram of a text and whether it is there, (B, n L) both."""
        width = input_ids.shape[1]
        # Of places beyond the text, which the mask rules out.
        ids, mask = (pad(tensor.long(), (0, self.longest - 1)) for tensor in (input_ids, attention_mask))
        code, inside = torch.zeros_like(input_ids).long(), torch.ones_like(input_ids).bool()
        codes, inner = [], []
        for offset in range(self.longest):
            code = code * (self.vocabulary + 1) + ids[:, offset : offset + width] + 1
            inside = inside & (mask[:, offset : offset + width] > 0)
            codes.append(code)
            inner.append(inside)
        wanted = torch.cat(codes, dim=1)
        places = self.search(wanted.flatten())
        known = (self.codes.index_select(0, places) == wanted.flatten()).view_as(wanted)
        return places.view_as(wanted), known & torch.cat(inner, dim=1)

    def search(self, wanted: Tensor) -> Tensor:
        """Return the place of the last code that is not above each wanted one (M,), 0 where all are.

        ONNX has no `searchsorted`. By `index_select`, since it would hold a copy of the codes for every step of an indexing.
        """
        places = torch.zeros_like(wanted)
        step = 1 << max(len(self.codes) - 1, 0).bit_length() >> 1
        while step:
            ahead = (places + step).clamp_max(len(self.codes) - 1)
            places = torch.where(self.codes.index_select(0, ahead) <= wanted, ahead, places)
            step >>= 1
        return places


def build_branch(table: NgramTable, weights: NDArray[np.float32], bias: NDArray[np.float32], share: float) -> NgramBranch:
    """Return the branch of a regression's weights u (C, F) and bias b (C,) that has this share of the logits."""
    branch = NgramBranch(len(table.codes), len(bias), table.vocabulary, table.longest)
    values = {
        "codes": table.codes,
        "squares": table.idf**2,
        "layers_share": np.array(1 - share),
        "weights": share * table.idf[:, None] * weights.T,
        "bias": share * bias,
    }
    state = branch.state_dict()
    branch.load_state_dict({name: torch.from_numpy(value).to(state[name].dtype) for name, value in values.items()})
    return branch
