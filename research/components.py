"""What a training loss is made of: one row a component (no torch).

The trainer sums these, history.csv has a column for each, and figures and reports take their names from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Needs = Literal["labels", "logits", "hidden_states", "attentions"]


@dataclass(frozen=True)
class LossComponent:
    """One entry of a step's losses.

    Attributes:
        name: Its key in a step's losses and its column in history.csv.
        label: Its name in figures.
        needs: What has to be known beside the student's own outputs: the labels, or an output of the teacher.
        weight_flag: The flag that weights it on top of the soft and hard loss; None for a component that
            alpha weights or that is only watched.
        optional: Whether it is computed only where that weight is above 0; history.csv has no column for it elsewhere.
    """

    name: str
    label: str
    needs: Needs
    weight_flag: str | None = None
    optional: bool = False


LOSS_COMPONENTS: tuple[LossComponent, ...] = (
    LossComponent("total_loss", "total", "labels"),
    LossComponent("soft_loss", "soft", "logits"),
    LossComponent("soft_excess", "soft excess", "logits"),
    LossComponent("hard_loss", "hard", "labels"),
    LossComponent("hidden_loss", "hidden", "hidden_states", "hidden_loss_weight"),
    LossComponent("attention_loss", "attention", "attentions", "attention_loss_weight"),
    LossComponent("rank_loss", "rank", "logits", "rank_loss_weight", optional=True),
)
COMPONENT_NAMES = tuple(component.name for component in LOSS_COMPONENTS)
