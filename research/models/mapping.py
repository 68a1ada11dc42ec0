"""Which layer of the teacher is compared with which of the student (no torch)."""

from __future__ import annotations

import re
from collections.abc import Callable

from research.errors import quote_value

LAYER_STRATEGIES = ("uniform", "last", "first")


def parse_layer_mapping(text: str) -> tuple[tuple[int, int], ...] | None:
    """Return the (teacher, student) pairs of an explicit mapping, None for a strategy's name.

    Layers count from 0, the embeddings.

    Raises:
        ValueError: neither a strategy nor `teacher:student` pairs, or a pair is given twice.
    """
    if text in LAYER_STRATEGIES:
        return None
    pairs: list[tuple[int, int]] = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*[0-9]{1,6}\s*:\s*[0-9]{1,6}\s*", part):
            raise ValueError(
                f"{quote_value(part.strip())} is neither teacher:student (as in 2:1,4:2) nor one of {', '.join(LAYER_STRATEGIES)}"
            )
        teacher, student = map(int, part.split(":"))
        if (teacher, student) in pairs:
            raise ValueError(f"the pair {teacher}:{student} is given twice")
        pairs.append((teacher, student))
    return tuple(pairs)


LayerPairs = tuple[tuple[int, int], ...]


def map_layers(mapping: str, teacher_layers: int, student_layers: int) -> LayerPairs:
    """Return the (teacher, student) layer pairs of a mapping; layer k is the k-th block, 0 the embeddings.

    uniform pairs student layer j with teacher layer round(j * teacher_layers / student_layers), so
    the last meets the last. last and first pair all layers of the shallower model with as many of
    the other's last or first ones. Layers of a cut student count from 1, whichever they were: the pairs
    say what each is to become, by depth, and not what it started as. To pair `lowest_layers` with what they
    started as is `first`; for `end_layers` it takes explicit pairs, as in 1:1,2:2,12:3.

    Raises:
        ValueError: an explicit pair names a layer that a model does not have.
    """
    pairs = parse_layer_mapping(mapping)
    if pairs is not None:
        check_pairs(pairs, 0, teacher_layers, student_layers)
        return pairs
    if mapping == "uniform":
        return tuple((teacher, student) for student, teacher in enumerate(pick_layers(teacher_layers, student_layers), 1))
    shared = min(teacher_layers, student_layers)
    if mapping == "first":
        return tuple((layer, layer) for layer in range(1, shared + 1))
    return tuple((teacher_layers - back, student_layers - back) for back in reversed(range(shared)))


def check_pairs(pairs: LayerPairs, lowest: int, teacher_layers: int, student_layers: int) -> None:
    """Raise ValueError when there is no pair, or one names a layer under `lowest` or over a model's last."""
    if not pairs:
        raise ValueError("names no layers, so there is nothing to compare")
    for teacher, student in pairs:
        if not (lowest <= teacher <= teacher_layers and lowest <= student <= student_layers):
            raise ValueError(
                f"{teacher}:{student} is out of range; the teacher has layers {lowest} to "
                f"{teacher_layers}, the student {lowest} to {student_layers}"
            )


def pick_layers(total: int, wanted: int) -> list[int]:
    """Return layer round(j * total / wanted) for j = 1..wanted: evenly spread, the last one included.

    Halves are rounded up, and no layer lies under 1, so a student deeper than its teacher is paired too.
    """
    return [max(1, (2 * layer * total + wanted) // (2 * wanted)) for layer in range(1, wanted + 1)]


def lowest_layers(total: int, wanted: int) -> list[int]:
    """Return layers 1..wanted; the top is dropped.

    Sajjad et al. 2020, "On the effect of dropping layers of pre-trained transformer models", top-layer dropping.
    """
    return list(range(1, min(wanted, total) + 1))


def end_layers(total: int, wanted: int) -> list[int]:
    """Return as many of the lowest as of the highest layers, of an odd number one more of the lowest; the middle is dropped.

    Sajjad et al. 2020, "On the effect of dropping layers of pre-trained transformer models", symmetric dropping.
    """
    top = min(wanted, total) // 2
    return [*range(1, min(wanted, total) - top + 1), *range(total - top + 1, total + 1)]


# How the layers of a cut encoder are chosen: from its number of layers and the number wanted, counted from 1.
LAYER_CHOICES: dict[str, Callable[[int, int], list[int]]] = {"uniform": pick_layers, "lowest": lowest_layers, "ends": end_layers}


def attention_pairs(pairs: LayerPairs) -> LayerPairs:
    """Return the pairs that have attention maps: the embeddings, layer 0, have none.

    Raises:
        ValueError: no pair is left.
    """
    kept = tuple((teacher, student) for teacher, student in pairs if teacher and student)
    if not kept:
        raise ValueError("layer 0 is the embeddings and has no attention map; map layers from 1")
    return kept


def pair_name(teacher_layer: int, student_layer: int) -> str:
    """Name a mapped pair for a ModuleDict, which allows no colon or dot."""
    return f"{teacher_layer}_{student_layer}"
