"""A student with the classification head of its architecture, which transformers loads without this suite."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from research.models.attention import RECORDED_SDPA
from research.models.classifiers import SequenceClassifier
from research.models.dropout import BitDropout, replace_dropout
from research.models.folders import describe_labels
from research.models.reading import refusing


def build_native(encoder: Any, labels: Sequence[str], dropout: float) -> SequenceClassifier:
    """Put the head of its architecture, with random weights, on an encoder.

    Head and pooling are those that AutoModelForSequenceClassification has for the architecture: BERT pools by a layer
    that is pretrained with it, most others have a hidden layer, and both read the first position; models that read
    left to right classify by the last one.

    Args:
        encoder: As `load_encoder` returns it, cut or not; its weights are copied. A pooler in it is taken over, else
            it begins at random with the rest of the head.
        dropout: Of the head alone; the encoder keeps its own.

    Raises:
        InputError: the architecture has no such head, or one that holds another encoder.
    """
    kind = encoder.config.model_type
    with refusing(f"a {kind} model cannot be given its own classification head; use --student_head mlp"):
        # From a dictionary, so that nothing of how the encoder runs comes along.
        config = type(encoder.config).from_dict(copy.deepcopy(encoder.config.to_dict()) | describe_labels(labels))
        config._attn_implementation = "eager"
        if config.pad_token_id is None:
            config.pad_token_id = config.eos_token_id  # as `open_tokenizer` has texts padded
        model: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)
        keys = model.base_model.load_state_dict(encoder.state_dict(), strict=False)
        others = [key for key in (*keys.missing_keys, *keys.unexpected_keys) if not key.startswith("pooler.")]
        if others:
            raise ValueError(f"its classifier holds another encoder, which differs in {', '.join(sorted(others)[:2])}")
    inner = {id(module) for module in model.base_model.modules()}
    for module in model.modules():
        if isinstance(module, nn.Dropout) and id(module) not in inner:
            module.p = dropout
    replace_dropout(model, BitDropout)
    if model._supports_sdpa:
        model.set_attn_implementation(RECORDED_SDPA)
    return SequenceClassifier(model, range(len(labels)), first_is_enough=True)
