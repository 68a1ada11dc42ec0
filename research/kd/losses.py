"""Distillation: the trainer that drives a student from a frozen teacher, and the teacher's verification.

Shapes: B batch, C labels, L tokens, P positions (tokens, or words when the tokenizers differ), H width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.models.mapping import LayerPairs, attention_pairs, check_pairs, map_layers, pair_name

SMALLEST_SPREAD = 1e-3  # of one label's logits over a batch; what lies under it is no order of the texts


def soft_bce_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, t_squared: bool = True) -> Tensor:
    """Pull the student's softened label probabilities toward the teacher's, (B, C) without reduction.

    Labels are independent, so each is a sigmoid cross entropy rather than one softmax. The logits
    form is used because CUDA autocast refuses `binary_cross_entropy` on probabilities. The gradient
    of the cross entropy shrinks with 1/T^2; the factor T^2 undoes that, so alpha means much the same
    at every temperature (Hinton, Vinyals and Dean 2015, section 2).
    """
    loss = F.binary_cross_entropy_with_logits(
        student_logits.float() / temperature,
        torch.sigmoid(teacher_logits.float() / temperature),
        reduction="none",
    )
    return loss * temperature**2 if t_squared else loss


def soft_loss_floor(teacher_logits: Tensor, temperature: float, *, t_squared: bool = True) -> Tensor:
    """Return the least value the soft loss can take, (B, C): the teacher's own entropy.

    The soft loss minus its floor is the Kullback-Leibler divergence, which is 0 for a perfect
    student at every temperature.
    """
    return soft_bce_loss(teacher_logits, teacher_logits, temperature, t_squared=t_squared)


class MultiLabelDistillationLoss(nn.Module):
    """alpha * soft + (1 - alpha) * hard over independent labels, the soft part over all cells, the hard over known ones.

    With one alpha per label, the sum over labels of alpha_c * soft_c / (B C) + (1 - alpha_c) * hard_c / K, with
    soft_c and hard_c summed over a label's cells and K the known cells of all labels. Where every label is known,
    K is B C and this is the mean over labels of alpha_c * soft_c + (1 - alpha_c) * hard_c; a label of few known
    cells weighs less in the hard part, as much as it has cells.

    Args:
        alpha: Weight of the soft loss, one number or one per label (C,).
        temperature: Softening of both models' logits, greater than 0.
        reduction: "mean" over all cells, "sum", or "none" for (B, C).
        t_squared: Multiply the soft loss by the squared temperature.
    """

    alpha: Tensor

    def __init__(
        self,
        alpha: float | Sequence[float] = 0.7,
        temperature: float = 4.0,
        reduction: str = "mean",
        *,
        t_squared: bool = True,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be greater than 0 and finite, got {temperature}")
        self.register_buffer("alpha", torch.as_tensor(alpha, dtype=torch.float32), persistent=False)
        if not bool(((self.alpha >= 0) & (self.alpha <= 1)).all()):
            raise ValueError(f"alpha must be 0 to 1, got {alpha}")
        self.temperature = temperature
        self.reduction = reduction
        self.t_squared = t_squared

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        class_weights: Tensor | None = None,
        label_share: float = 0.0,
        taught: Tensor | None = None,
        shares: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return total_loss, soft_loss and hard_loss.

        With a `label_share` of s, alpha weights (1 - s) * soft + s * hard in a known cell and soft alone in an unknown
        one, over all cells; what alpha leaves to the hard loss stays as it is. At alpha 1 and T 1 without class weights
        that is the cross entropy with the target s * y + (1 - s) * p_teacher, p_teacher where y is unknown, since the
        cross entropy is linear in its target (teacher annealing: Clark et al. 2019, BAM, section 3.2).

        Args:
            labels: (B, C) of 0 and 1, NaN where unknown: such a cell is left out of the hard loss,
                whose mean runs over the known cells; the soft loss still uses it.
            class_weights: (C,) weight of the positives in the hard loss.
            label_share: 0 to 1, what the labels have taken over of the soft loss in the total.
            taught: (B, C) of 0 and 1, 0 in a cell without a teacher, where alpha is 0: its soft loss is left
                out and its hard loss has full weight. Both means run over the cells that they run over
                without it. None where a teacher speaks of every cell.
            shares: What part of a whole batch's rows and of its known cells these are, when other processes have the
                others; what they return then adds up to the whole batch's losses.
        """
        soft = soft_bce_loss(student_logits, teacher_logits, self.temperature, t_squared=self.t_squared)
        alpha = self.alpha
        if taught is not None:
            soft, alpha = soft * taught, alpha * taught
        hard, known = hard_bce_loss(student_logits, labels, class_weights)
        blended = torch.lerp(soft, hard, label_share * known) if label_share else soft
        if self.reduction == "mean":
            soft, blended, hard = soft / soft.numel(), blended / soft.numel(), hard / known.sum().clamp_min(1.0)
        if shares is not None:
            soft, blended, hard = soft * shares[0], blended * shares[0], hard * shares[1]
        total = alpha * blended + (1.0 - alpha) * hard
        if self.reduction == "none":
            return {"total_loss": total, "soft_loss": soft, "hard_loss": hard}
        return {"total_loss": total.sum(), "soft_loss": soft.sum(), "hard_loss": hard.sum()}


def hard_bce_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the cross entropy with the labels, (B, C) and 0 in unknown (NaN) cells, and the known cells as 0/1."""
    labels = labels.float()
    pos_weight = None if class_weights is None else class_weights.float()
    known = ~torch.isnan(labels)
    loss = F.binary_cross_entropy_with_logits(
        logits.float(), labels.masked_fill(~known, 0.0), pos_weight=pos_weight, reduction="none"
    )
    return loss * known, known.float()


def rank_loss(student_logits: Tensor, teacher_logits: Tensor, objective: str = "pearson") -> Tensor:
    """Return how far the student orders a batch's texts unlike the teacher, averaged over labels; logits are (B, C).

    Labels play no part, so an unknown one changes nothing. A label for which the teacher says the same of every text
    (a standard deviation of its logits under SMALLEST_SPREAD) has no order to learn and is left out; where that is all
    of them, as in a batch of one text, the loss is 0.

    Args:
        objective: "pearson" or "pairwise", each a function below.
    """
    student, teacher = student_logits.float(), teacher_logits.float()
    losses = RANK_OBJECTIVES[objective](student, teacher)
    return masked_mean(losses, teacher.var(dim=0, correction=0) > SMALLEST_SPREAD**2)


def pearson_rank_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - Pearson(student[:, c], teacher[:, c]) over the batch for each label c, (C,), from logits (B, C).

    The relation within a class of Huang et al. 2022 (DIST, equation 9), which correlates softmax probabilities; the
    logits of independent labels need no softmax. A shift or a positive scale of either model's logits changes nothing.
    Spreads under SMALLEST_SPREAD count as that, which bounds the gradient of a student that says the same of every text.
    """
    student, teacher = student - student.mean(dim=0), teacher - teacher.mean(dim=0)
    # Clamped before the root, whose gradient at 0 is infinite.
    spreads = [logits.square().mean(dim=0).clamp_min(SMALLEST_SPREAD**2).sqrt() for logits in (student, teacher)]
    return 1.0 - (student * teacher).mean(dim=0) / (spreads[0] * spreads[1])


def pairwise_rank_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return for each label, (C,), the mean of softplus(-sign(p_i - p_j) (z_i - z_j)) over pairs of texts, from logits (B, C).

    Pairs are weighted by |p_i - p_j|, with p the teacher's probabilities and z the student's logits: RankNet (Burges et
    al. 2005) on the teacher's order, where a pair counts as much as the teacher tells its texts apart.
    """
    probs = torch.sigmoid(teacher)
    gaps = probs.unsqueeze(1) - probs.unsqueeze(0)  # (B, B, C)
    margins = student.unsqueeze(1) - student.unsqueeze(0)
    losses = F.softplus(-gaps.sign() * margins)
    weights = gaps.abs()
    # Each pair stands there twice, with equal terms, in both sums.
    return (weights * losses).sum(dim=(0, 1)) / weights.sum(dim=(0, 1)).clamp_min(torch.finfo(weights.dtype).tiny)


RANK_OBJECTIVES = {"pearson": pearson_rank_loss, "pairwise": pairwise_rank_loss}


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average over the true cells of `mask`; over all cells without one, 0 where none is true."""
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp_min(1.0)


def hidden_distance(teacher: Tensor, student: Tensor, mask: Tensor | None = None, objective: str = "mse") -> Tensor:
    """Return the distance of two layers' states over real positions.

    Args:
        teacher, student: (B, P, H) of the same width.
        mask: (B, P), true at real positions.
        objective: "mse", mean over H of the squared difference (Sun et al. 2019, patient KD; here
            without their normalisation), or "cosine", 1 - cos (Sanh et al. 2019, DistilBERT).
    """
    teacher, student = teacher.float(), student.float()
    if objective == "cosine":
        return masked_mean(1.0 - F.cosine_similarity(student, teacher, dim=-1), mask)
    return masked_mean((student - teacher).square().mean(dim=-1), mask)


def attention_distance(teacher: Tensor, student: Tensor, mask: Tensor | None = None, objective: str = "mse") -> Tensor:
    """Return the distance of two head-averaged attention maps over real positions.

    Args:
        teacher, student: (B, P, P), each row a distribution over the keys.
        mask: (B, P), true at real positions.
        objective: "mse", the mean squared difference over pairs of real queries and keys (Jiao et
            al. 2020, TinyBERT, here of head averages), or "kl", the divergence of the student's row
            from the teacher's, sum over keys of t * log(t / s), averaged over real queries.
    """
    teacher, student = teacher.float(), student.float()
    if objective == "kl":
        tiny = torch.finfo(torch.float32).tiny
        terms = teacher * (teacher.clamp_min(tiny).log() - student.clamp_min(tiny).log())
        keys = terms if mask is None else terms * mask.unsqueeze(1)
        return masked_mean(keys.sum(dim=-1), mask)
    pairs = None if mask is None else mask.unsqueeze(2) & mask.unsqueeze(1)  # (B, P, P)
    return masked_mean((student - teacher).square(), pairs)


def relation_distance(teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Tensor | None, heads: int) -> Tensor:
    """Return the divergence of self-attention relations, averaged over queries, keys and values.

    For each of Q, K and V, cut into `heads` relation heads of width d, the relation is
    R = softmax(X X^T / sqrt(d)) over real positions, and the loss is KL(R_teacher || R_student)
    averaged over heads and real positions (Wang et al. 2021, MiniLMv2, equations 3 to 5). Neither
    the models' own head counts nor their widths need to be equal.

    Args:
        teacher, student: queries, keys and values, each (B, P, H) with H a multiple of `heads`.
        mask: (B, P), true at real positions.
    """
    total = torch.zeros((), device=student[0].device)
    for teacher_part, student_part in zip(teacher, student, strict=True):
        target = relation_log_probs(teacher_part, heads, mask)
        log_ratio = target - relation_log_probs(student_part, heads, mask)
        divergence = (target.exp() * log_ratio).sum(dim=-1).mean(dim=1)  # (B, P)
        total = total + masked_mean(divergence, mask)
    return total / len(student)


def relation_log_probs(states: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Return the log of the relation among positions, (B, heads, P, P), from (B, P, H)."""
    split = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, P, d)
    with torch.autocast(states.device.type, enabled=False):
        scores = split @ split.transpose(-1, -2) / math.sqrt(split.shape[-1])
    if mask is not None:
        # The lowest finite value, not -inf: 0 * (-inf - -inf) would be NaN where both are masked.
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores.log_softmax(dim=-1)


def hidden_state_loss(
    pairs: LayerPairs,
    teacher: Mapping[int, Tensor],
    student: Mapping[int, Tensor],
    mask: Tensor | None = None,
    projections: Mapping[str, nn.Module] | None = None,
    objective: str = "mse",
) -> Tensor:
    """Average `hidden_distance` over layer pairs; states are {layer: (B, P, H)}, layer 0 the embeddings.

    Args:
        mask: (B, P), true at real positions.
        projections: By `pair_name`, what carries the student's width to the teacher's.

    Raises:
        ValueError: the states of a pair differ in shape.
    """
    distances = []
    for teacher_layer, student_layer in pairs:
        teacher_states, student_states = teacher[teacher_layer], student[student_layer]
        if projections is not None:
            student_states = projections[pair_name(teacher_layer, student_layer)](student_states)
        if teacher_states.shape != student_states.shape:
            raise ValueError(
                f"hidden states of teacher layer {teacher_layer} {tuple(teacher_states.shape)} and student layer "
                f"{student_layer} {tuple(student_states.shape)} differ in shape: project the width, align the tokens"
            )
        distances.append(hidden_distance(teacher_states, student_states, mask, objective))
    return torch.stack(distances).mean()


def attention_map_loss(
    pairs: LayerPairs,
    teacher: Mapping[int, Tensor],
    student: Mapping[int, Tensor],
    mask: Tensor | None = None,
    objective: str = "mse",
) -> Tensor:
    """Average `attention_distance` over layer pairs; maps are {layer: (B, P, P) or (B, A, P, P)}, from layer 1.

    Raises:
        ValueError: no pair has maps, or the maps of one differ in shape.
    """
    distances = []
    for teacher_layer, student_layer in attention_pairs(pairs):
        teacher_map, student_map = average_heads(teacher[teacher_layer]), average_heads(student[student_layer])
        if teacher_map.shape != student_map.shape:
            raise ValueError(
                f"attention maps of teacher layer {teacher_layer} {tuple(teacher_map.shape)} and student layer "
                f"{student_layer} {tuple(student_map.shape)} differ in shape: align the tokens"
            )
        distances.append(attention_distance(teacher_map, student_map, mask, objective))
    return torch.stack(distances).mean()


def average_heads(attention_map: Tensor) -> Tensor:
    """Average (B, A, P, P) over the heads; a map that is already averaged stays."""
    return attention_map.float().mean(dim=1) if attention_map.dim() == 4 else attention_map.float()


def compute_hidden_state_loss(
    teacher_hidden: Sequence[Tensor],
    student_hidden: Sequence[Tensor],
    layer_mapping: Mapping[int, int] | None = None,
    *,
    attention_mask: Tensor | None = None,
    objective: str = "mse",
) -> Tensor:
    """Average the distance of the mapped layers' hidden states.

    Args:
        teacher_hidden, student_hidden: hidden_states of both models, (B, P, H) each; entry 0 is the
            embeddings, so layer k is entry k.
        layer_mapping: {teacher layer: student layer}; uniform when None, which is
            {2: 1, 4: 2, 6: 3, 8: 4, 10: 5, 12: 6} for 12 and 6 layers.
        attention_mask: (B, P), 1 at real positions; padding is left out.

    Raises:
        ValueError: the states differ in shape, or the mapping names a layer that is not there.
    """
    pairs = _pairs_of(layer_mapping, 0, len(teacher_hidden) - 1, len(student_hidden) - 1)
    mask = None if attention_mask is None else attention_mask.bool()
    return hidden_state_loss(pairs, dict(enumerate(teacher_hidden)), dict(enumerate(student_hidden)), mask, objective=objective)


def compute_attention_loss(
    teacher_attentions: Sequence[Tensor],
    student_attentions: Sequence[Tensor],
    layer_mapping: Mapping[int, int] | None = None,
    *,
    attention_mask: Tensor | None = None,
    objective: str = "mse",
) -> Tensor:
    """Average the distance of the mapped layers' head-averaged attention maps.

    Args:
        teacher_attentions, student_attentions: one map per block, (B, A, P, P) or head-averaged
            (B, P, P); layer k's map is entry k - 1. Head counts may differ.
        layer_mapping: as for `compute_hidden_state_loss`; layers count from 1.
        attention_mask: (B, P), 1 at real positions; padded queries and keys are left out.

    Raises:
        ValueError: there are no maps, since a fused attention kernel returns an empty tuple or nothing
            but None; they differ in shape; or the mapping names a layer that is not there.
    """
    for side, maps in (("teacher", teacher_attentions), ("student", student_attentions)):
        if not maps or any(entry is None for entry in maps):
            raise ValueError(f"the {side} has no attention maps: its attention kernel returns none, so no loss can be computed")
    pairs = _pairs_of(layer_mapping, 1, len(teacher_attentions), len(student_attentions))
    mask = None if attention_mask is None else attention_mask.bool()
    return attention_map_loss(
        pairs, dict(enumerate(teacher_attentions, 1)), dict(enumerate(student_attentions, 1)), mask, objective
    )


def _pairs_of(layer_mapping: Mapping[int, int] | None, lowest: int, teacher_layers: int, student_layers: int) -> LayerPairs:
    if layer_mapping is None:
        return map_layers("uniform", teacher_layers, student_layers)
    pairs = tuple(layer_mapping.items())
    check_pairs(pairs, lowest, teacher_layers, student_layers)
    return pairs
