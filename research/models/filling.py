"""Words filled in by the masked-language head that an encoder was pretrained with.

Shapes: B texts, L tokens, V pieces of the vocabulary, K candidates.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from research.models.encoders import find_encoder, load_pretrained, load_tokenizer, open_config
from research.models.folders import read_own_config
from research.models.reading import refusing

CANDIDATES = 10
# Logits of a batch, 256 MB of them: a head says something of every piece at every token.
CELLS_AT_ONCE = 1 << 26
# How pieces begin that begin a word, where a tokenizer marks those and not the others.
WORD_MARKS = ("\u2581", "\u0120")


@dataclass(frozen=True)
class MaskedText:
    """A text of which some words are to be filled in.

    Attributes:
        words: Of the whole text.
        places: The words to be filled in, ascending.
        draws: A number from 0 to 1 for each, which decides among the candidates.
    """

    words: Sequence[str]
    places: Sequence[int]
    draws: Sequence[float]


class WordFiller:
    """An encoder with the masked-language head that it was pretrained with.

    Args:
        model: Any model whose answer has `logits` (B, L, V).
        tokenizer: Its own.
        max_length: What of a text it reads; words after that stay as they are.
        device: Where it runs.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.words = list_words(tokenizer, model.config.vocab_size)
        self.ids = torch.tensor(sorted(self.words), device=self.device)

    def fill(self, texts: Sequence[MaskedText]) -> list[str]:
        """Return the texts with each masked word replaced by one that the head finds likely in its place.

        It is drawn from the CANDIDATES most likely words of one piece, by their probabilities, the word that stood
        there left out. With several masked, each is chosen without regard to the others.
        """
        joined = []
        for text in texts:
            # Somebody may have written the mask itself.
            words = [word.replace(self.tokenizer.mask_token, "") for word in text.words]
            for place in text.places:
                words[place] = self.tokenizer.mask_token
            joined.append(" ".join(words))
        ids = self.tokenizer(joined, truncation=True, max_length=self.max_length)["input_ids"] if joined else []
        filled: list[str] = [""] * len(texts)
        for batch in self._batches([len(row) for row in ids]):
            made = self._fill([texts[number] for number in batch], [ids[number] for number in batch])
            for number, view in zip(batch, made, strict=True):
                filled[number] = view
        return filled

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
        start = 0
        while start < len(order):
            rows = max(CELLS_AT_ONCE // (self.model.config.vocab_size * max(lengths[order[start]], 1)), 1)
            yield order[start : start + rows]
            start += rows

    @torch.inference_mode()
    def _fill(self, texts: Sequence[MaskedText], ids: Sequence[Sequence[int]]) -> list[str]:
        longest = max(map(len, ids))
        padded = torch.full((len(ids), longest), self.tokenizer.pad_token_id)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        real = torch.arange(longest) < torch.tensor([[len(tokens)] for tokens in ids])
        masked = (padded == self.tokenizer.mask_token_id) & real
        logits = self.model(padded.to(self.device), attention_mask=real.long().to(self.device)).logits[masked.to(self.device)]
        most = min(CANDIDATES + 1, len(self.ids))
        likely, found = logits.float()[:, self.ids].topk(most, dim=1)
        likely_ids = self.ids[found].cpu().numpy()
        weights = torch.softmax(likely.double(), dim=1).cpu().numpy()
        starts = np.cumsum([0, *masked.sum(dim=1).tolist()])
        return [
            self._replace(text, likely_ids[start:end], weights[start:end])
            for text, (start, end) in zip(texts, pairwise(starts), strict=True)
        ]

    def _replace(self, text: MaskedText, likely: Any, weights: Any) -> str:
        """Return a text with words drawn from its candidates, (places, K) ids and weights; truncation cuts the last places."""
        words = list(text.words)
        for place, draw, ids, shares in zip(text.places, text.draws, likely, weights, strict=False):
            candidates = [(self.words[int(piece)], share) for piece, share in zip(ids, shares, strict=True)]
            candidates = [(word, share) for word, share in candidates if word != text.words[place]][:CANDIDATES]
            if candidates:
                bounds = np.cumsum([share for _, share in candidates])
                chosen = int(np.searchsorted(bounds, draw * bounds[-1], side="right"))
                words[place] = candidates[min(chosen, len(candidates) - 1)][0]
        return " ".join(words)


def list_words(tokenizer: Any, vocab_size: int) -> dict[int, str]:
    """Return the pieces that are words by themselves, letters with their marks, by their ids."""
    size = min(len(tokenizer), vocab_size)
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    marked = any(piece.startswith(WORD_MARKS) for piece in pieces)
    special = set(tokenizer.all_special_ids)
    words = {
        number: tokenizer.convert_tokens_to_string([piece]).strip()
        for number, piece in enumerate(pieces)
        if number not in special and (not marked or piece.startswith(WORD_MARKS))
    }
    return {number: word for number, word in words.items() if is_word(word)}


def is_word(text: str) -> bool:
    """Whether a text is letters with their marks, and begins with a letter."""
    kinds = "".join(unicodedata.category(character)[0] for character in text)
    return kinds[:1] == "L" and set(kinds) <= {"L", "M"}


def load_filler(name: str, max_length: int, device: torch.device | str = "cpu") -> WordFiller | None:
    """Load a pretrained encoder with its masked-language head; None when it has none, or a tokenizer without a mask.

    Args:
        name: Folder or hub name.

    Raises:
        InputError: its files cannot be read.
    """
    place = find_encoder(name)
    if read_own_config(place) is not None:
        return None
    tokenizer = load_tokenizer(name)
    with refusing(f"model '{name}': its masked-language head cannot be loaded"):
        if tokenizer.mask_token_id is None or open_config(place).model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return None
        model, report = load_pretrained(AutoModelForMaskedLM, place)
    # A head that is not in the files would be random.
    if report["missing_keys"] or report["mismatched_keys"]:
        return None
    filler = WordFiller(model, tokenizer, max_length, device)
    return filler if len(filler.ids) > 1 else None
