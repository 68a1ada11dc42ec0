"""Flags of the views that a student learns from beside the texts themselves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from research.errors import quote_value
from research.flags import between, setting

VIEW_KINDS = {
    "noise": "characters as they are mistyped",
    "dropout": "some words left out",
    "swap": "a span of words from a text of the same labels",
    "fill": "some words filled in by the encoder's masked-language head, where it has one",
}


def check_kinds(kinds: Collection[str]) -> str | None:
    """Say what is wrong with the kinds of views; None when nothing is."""
    chosen = list(kinds)
    if unknown := [kind for kind in chosen if kind not in VIEW_KINDS]:
        return f"must be of {', '.join(VIEW_KINDS)}, separated by spaces, got {quote_value(unknown[0])}"
    if len(set(chosen)) < len(chosen) or not chosen:
        return f"names a kind twice: {' '.join(chosen)}" if chosen else "names no kind; leave it out"
    return None


@dataclass(frozen=True)
class AugmentationSettings:
    """How many views a training text has, and how they are made."""

    augment: int = setting(
        0,
        "data",
        "views of each labelled training text: the student learns from the text itself in the first epoch, from its first view "
        "in the second and so on in turn; with a teacher, as the teacher scores the view. 0 is off",
        check=between(0, 1000),
        decides="student",
        keyed_at_default=False,
    )
    augment_kinds: tuple[str, ...] = setting(
        tuple(VIEW_KINDS),
        "data",
        "what is changed in a view, in turn: " + "; ".join(f"{name}: {meaning}" for name, meaning in VIEW_KINDS.items()),
        check=check_kinds,
        metavar="KIND",
        decides="student",
        keyed_at_default=False,
    )


def check_augmentation_flags(config: Any, pipeline: Any, has_layers: bool) -> list[str]:
    """Return the problems of the views with the other flags.

    Args:
        pipeline: Which models there are; None where --pipeline names none.
        has_layers: Whether a teacher, if there is any, is a model, and not a table of probabilities only.
    """
    if pipeline is None or not pipeline.student or not config.augment:
        return []
    problems = []
    if config.augment >= config.epochs:
        problems.append(
            f"--augment: the text itself and {config.augment} view{'s' * (config.augment > 1)} take an epoch each, so --epochs "
            f"must be at least {config.augment + 1}, got {config.epochs}"
        )
    # A view has no labels beside a teacher, so there would be nothing to learn from it.
    compares_logits = any([config.kd_alpha, config.rank_loss_weight, *config.label_alpha_map.values()])
    if pipeline.teacher and not compares_logits and config.kd_method == "logit":
        problems.append("--augment: the teacher's scores are all that is known of a view, and --kd_alpha is 0; raise it")
    if pipeline.teacher and not has_layers:
        problems.append(
            "--augment: --teacher_probs_path has no probabilities of views; add --teacher_checkpoint or --teacher_seeds"
        )
    return problems
