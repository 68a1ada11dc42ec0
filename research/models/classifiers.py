"""Teacher and student: an encoder with a classifier on its text vector.

Shapes: B batch, L tokens, H width, C labels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from research.errors import InputError
from research.models.attention import RECORDED_SDPA, record_attention
from research.models.encoders import load_encoder
from research.models.ngrams import NgramBranch
from research.models.pooling import POOLINGS
from research.models.static import StaticConfig


@dataclass(frozen=True)
class ModelShape:
    """What is known of a model before it is loaded."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocabulary: int

    @classmethod
    def of(cls, model_config: Any) -> ModelShape:
        """Take the shape from a transformers configuration.

        Raises:
            InputError: it tells none, as that of a model of images or of several parts.
        """
        sizes = [getattr(model_config, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
        # A static encoder has no layers.
        fewest = (0 if model_config.model_type == StaticConfig.model_type else 1, 1, 1)
        layers, width, vocabulary = (
            size if isinstance(size, int) and size >= least else None for size, least in zip(sizes, fewest, strict=True)
        )
        if layers is None or width is None or vocabulary is None:
            raise InputError(
                f"model '{model_config.name_or_path}': its config.json ({model_config.model_type}) does not tell layers, width "
                "and vocabulary; choose an encoder of texts, such as a BERT"
            )
        return cls(layers, width, count_heads(model_config), vocabulary)


# Of a teacher that is no model, as a table of probabilities.
NO_LAYERS = ModelShape(num_layers=0, hidden_size=0, num_heads=1, vocabulary=0)


def count_heads(model_config: Any) -> int:
    """Return the number of attention heads, 1 for a model without any (as FNet or Mamba)."""
    heads = getattr(model_config, "num_attention_heads", None)
    return heads if isinstance(heads, int) and heads > 0 else 1


def freeze(model: nn.Module) -> Any:
    """Put a model in eval mode without gradients: nothing of it may change."""
    return model.eval().requires_grad_(False)


# Stack of layers, and the part of a layer after which every position is computed by itself, by model type.
POSITIONWISE_PARTS = dict.fromkeys(
    ("bert", "camembert", "electra", "roberta", "xlm-roberta"), ("encoder.layer", "attention.output")
)
POSITIONWISE_PARTS["distilbert"] = ("transformer.layer", "sa_layer_norm")


class TextClassifier(nn.Module):
    """What teacher and student have in common: logits, and on request states and maps.

    Args:
        backbone: The transformers model that runs.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone_config: Any = backbone.config

    @property
    def num_layers(self) -> int:
        """Layers of the encoder."""
        return int(self.backbone_config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's states."""
        return int(self.backbone_config.hidden_size)

    @property
    def num_heads(self) -> int:
        """Attention heads of a layer."""
        return count_heads(self.backbone_config)

    def freeze_encoder(self) -> None:
        """Leave the classifier alone to be trained."""
        encoder: Any = self.encoder
        encoder.requires_grad_(False)

    def run_backbone(self, **inputs: Any) -> tuple[Any, Tensor]:
        """Return the transformers output and the logits (B, C)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        *,
        attention_layers: Collection[int] = (),
        relation_layers: Collection[int] = (),
    ) -> dict[str, Any]:
        """Classify token ids (B, L).

        Args:
            output_hidden_states: Add `hidden_states`, a tuple of (B, L, H): the embeddings, then one
                entry per layer.
            output_attentions: Add `attentions`, a tuple of every layer's map (B, A, L, L).
            attention_layers: Add `attention_maps`, {layer: head-averaged map (B, L, L)}, for these
                layers only; the others keep the fused kernel.
            relation_layers: Add `relations`, {layer: (queries, keys, values)}, (B, L, H) each.

        Raises:
            InputError: states, maps or relations are asked for and this model gives none for each layer and token.
        """
        keep = "heads" if output_attentions else "relation" if relation_layers else "mean"
        layers = range(1, self.num_layers + 1) if output_attentions else tuple(relation_layers) or tuple(attention_layers)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "output_hidden_states": output_hidden_states}
        # A model with an attention of its own (as DeBERTa's) returns its maps by itself.
        own_attention = bool(layers) and self.backbone_config._attn_implementation != RECORDED_SDPA
        if own_attention:
            inputs["output_attentions"] = True
        with record_attention(layers, keep) as recorder:
            outputs, logits = self.run_backbone(**inputs)
        result: dict[str, Any] = {"logits": logits}
        if output_hidden_states:
            result["hidden_states"] = self._check_states(getattr(outputs, "hidden_states", None), input_ids)
        if not layers:
            return result
        # Where not every layer has an attention, the k-th that runs is not that of layer k.
        all_ran = recorder.layers_run == self.num_layers
        if relation_layers:
            return result | {"relations": self._check_recorded(recorder.relations if all_ran else {}, layers)}
        maps = self._own_maps(outputs, layers, keep, input_ids.shape[1]) if own_attention else recorder.maps if all_ran else {}
        self._check_recorded(maps, layers)
        if output_attentions:
            return result | {"attentions": tuple(maps[layer] for layer in layers)}
        return result | {"attention_maps": maps}

    def _own_maps(self, outputs: Any, layers: Collection[int], keep: str, length: int) -> dict[int, Tensor]:
        """Return {layer: map} of the asked layers that have one, whole for "heads", else averaged over the heads.

        A model that gives fewer maps than it has layers does not say whose they are, and some give other
        tensors in their place (windows of keys, mixed values): those are no maps.
        """
        maps = getattr(outputs, "attentions", None) or ()
        if len(maps) != self.num_layers:
            return {}
        wanted = {layer: maps[layer - 1] for layer in layers}
        present = {layer: full for layer, full in wanted.items() if full is not None and full.shape[2:] == (length, length)}
        return present if keep == "heads" else {layer: full.float().mean(dim=1) for layer, full in present.items()}

    def _check_states(self, states: Sequence[Tensor] | None, input_ids: Tensor) -> Sequence[Tensor]:
        expected = (*input_ids.shape, self.hidden_size)
        if states is None or len(states) != self.num_layers + 1 or any(entry.shape != expected for entry in states):
            raise InputError(
                f"{self.backbone_config.model_type} model: it does not give one state for each layer and token, so the hidden "
                "loss cannot be computed. Use --kd_method logit."
            )
        return states

    def _check_recorded(self, found: dict[int, Any], wanted: Collection[int]) -> dict[int, Any]:
        missing = sorted(set(wanted) - set(found))
        if missing:
            raise InputError(
                f"{self.backbone_config.model_type} model: its attention gives nothing for layer "
                f"{', '.join(map(str, missing))} of {self.num_layers}, so the attention loss cannot be computed. "
                "Use --kd_method logit or hidden, or --attention_objective mse."
            )
        return found


class EncoderClassifier(TextClassifier):
    """An encoder, a pooled text vector, and Linear -> ReLU -> Dropout -> Linear on it.

    Attributes:
        ngrams: What mixes its logits with those of the text's n-grams, if it has any.
    """

    def __init__(self, encoder: nn.Module, num_labels: int, dropout: float, classifier_width: int, pooling: str) -> None:
        super().__init__(encoder)
        assert pooling in POOLINGS
        self.encoder = encoder
        self.pooling = pooling
        self.ngrams: NgramBranch | None = None
        self.classifier = nn.Sequential(
            nn.Linear(self.hidden_size, classifier_width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(classifier_width, num_labels),
        )

    def run_backbone(self, **inputs: Any) -> tuple[Any, Tensor]:
        """Run the encoder and the head; only the first position of the last layer where that is enough."""
        first_is_enough = self.pooling == "cls" and not inputs["output_hidden_states"]
        with narrow_to_first_position(self.encoder) if first_is_enough else nullcontext():
            outputs = self.encoder(**inputs)
        logits = self.classify(outputs.last_hidden_state, inputs["attention_mask"])
        return outputs, logits if self.ngrams is None else self.ngrams(logits, inputs["input_ids"], inputs["attention_mask"])

    def classify(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool the last states (B, L, H), of which "cls" reads the first position only, and return logits (B, C)."""
        if self.pooling == "cls":
            return self.classifier(states[:, 0])
        if self.pooling == "last":
            # The last place of the mask, and not their number: padding may stand in front.
            last = (attention_mask * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(dim=1)
            return self.classifier(states[torch.arange(states.shape[0], device=states.device), last])
        mask = attention_mask.unsqueeze(-1).to(states.dtype)  # (B, L, 1)
        return self.classifier((states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1.0))


@contextmanager
def narrow_to_first_position(encoder: Any) -> Iterator[None]:
    """Let the last layer finish the first position only, where it is known how; the last states are then (B, 1, H).

    The first position's state and every gradient stay what they are: after attention, a layer computes
    each position by itself, and nothing reads the others'.
    """
    if encoder.config.model_type not in POSITIONWISE_PARTS:
        yield
        return
    stack, part = POSITIONWISE_PARTS[encoder.config.model_type]
    module = encoder.get_submodule(stack)[-1].get_submodule(part)
    hook = module.register_forward_pre_hook(lambda _, states: tuple(state[:, :1] for state in states))
    try:
        yield
    finally:
        hook.remove()


class TeacherModel(EncoderClassifier):
    """The large model: classifier Linear(h, h) -> ReLU -> Dropout -> Linear(h, num_labels).

    Args:
        model_name: Folder or hub name of the pretrained encoder.
        encoder: An encoder that is already loaded, instead of `model_name`.
    """

    def __init__(
        self,
        model_name: str = "csebuetnlp/banglabert",
        num_labels: int = 5,
        dropout: float = 0.1,
        *,
        pooling: str = "cls",
        encoder: nn.Module | None = None,
    ) -> None:
        encoder = load_encoder(model_name) if encoder is None else encoder
        super().__init__(encoder, num_labels, dropout, int(encoder.config.hidden_size), pooling)  # type: ignore[union-attr, arg-type]


class StudentModel(EncoderClassifier):
    """The small model: classifier Linear(h, classifier_hidden_size) -> ReLU -> Dropout -> Linear."""

    def __init__(
        self,
        model_name: str = "distilbert-base-multilingual-cased",
        num_labels: int = 5,
        dropout: float = 0.1,
        classifier_hidden_size: int = 256,
        *,
        pooling: str = "cls",
        encoder: nn.Module | None = None,
    ) -> None:
        encoder = load_encoder(model_name) if encoder is None else encoder
        super().__init__(encoder, num_labels, dropout, classifier_hidden_size, pooling)


class SequenceClassifier(TextClassifier):
    """A fine-tuned AutoModelForSequenceClassification whose labels are put into another order.

    Args:
        model: The loaded model with its own head.
        label_order: For each of our labels, its place among the model's.
        first_is_enough: Let the last layer compute the first position only, where POSITIONWISE_PARTS says how: of each
            architecture in it the head reads no other. It changes the last digits of a foreign model's logits.
    """

    label_order: Tensor

    def __init__(self, model: nn.Module, label_order: Sequence[int], *, first_is_enough: bool = False) -> None:
        super().__init__(model)
        self.model = model
        self.first_is_enough = first_is_enough
        self.register_buffer("label_order", torch.tensor(label_order), persistent=False)

    @property
    def encoder(self) -> nn.Module:
        """The model below the head."""
        base = self.model.base_model
        assert isinstance(base, nn.Module)
        return base

    def freeze_encoder(self) -> None:
        """Leave the classifier alone to be trained, with the pooler that it reads, which may be random."""
        super().freeze_encoder()
        if isinstance(pooler := getattr(self.encoder, "pooler", None), nn.Module):
            pooler.requires_grad_(True)

    def run_backbone(self, **inputs: Any) -> tuple[Any, Tensor]:
        """Run the whole model and put its logits in the order of the label columns."""
        narrowed = self.first_is_enough and not inputs["output_hidden_states"]
        with narrow_to_first_position(self.encoder) if narrowed else nullcontext():
            outputs = self.model(**inputs)
        return outputs, outputs.logits[:, self.label_order]
