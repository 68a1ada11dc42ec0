"""How the states of a text's tokens become its vector (no torch)."""

from __future__ import annotations

POOLINGS = {
    "cls": "the first token",
    "mean": "the mean of the tokens",
    "last": "the last token, for models that read left to right",
}
POOLING_HELP = "text vector of both models; " + "; ".join(f"{name}: {meaning}" for name, meaning in POOLINGS.items())
