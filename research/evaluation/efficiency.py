"""What a model costs: parameters, size, latency and throughput."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from research.evaluation.predict import evaluating

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Sample = tuple["Tensor", "Tensor"]  # input_ids and attention_mask, both (B, L)
Rounds = dict[str, list[float]]  # a model's mean seconds of a call in every round
LATENCY_BATCH = 32
LEAST_ROUNDS, MOST_ROUNDS = 3, 50


def measure_efficiency(
    models: Mapping[str, nn.Module],
    batches: Mapping[str, Sequence[Mapping[str, Tensor]]],
    device: torch.device | str,
    *,
    time_budget_s: float = 1.5,
    summed: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Count the parameters of one or several models and time them side by side on the same rows.

    A round lets every model answer all the rows once, one after the other, so that what slows the machine down
    for a while slows all of them; rounds are repeated for about `time_budget_s` a model (at least 3, at most 50)
    after one that is not counted. Rows come one at a time, and in batches of 32.

    Args:
        models: On the device already.
        batches: For each model the same rows in the same order, as it reads them: full batches of 32, from which
            single rows are cut too; padding that no row of a batch needs is left out.
        summed: {name: models that answer one after the other as one}, as the teachers of an ensemble; the sums of their
            parameters, sizes and seconds stand under that name, and in `members` how many they are.

    Returns:
        For each model its parameters, `size_mb` (MB of 10**6 bytes), and medians over the rounds of
        `latency_ms_batch1`, `latency_ms_batch32` (a call) and `throughput_per_s` (rows, in batches of 32), with
        the lowest and highest round as `..._range`. With "teacher" and "student", what `compare_efficiency` adds.
    """
    import torch

    device = torch.device(device)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))

        def time_rounds(size: int, *, waiting: bool = True) -> Rounds:
            sides = {name: (model, _take_rows(batches[name], size, device)) for name, model in models.items()}
            return _time_rounds(sides, device, time_budget_s, waiting)

        rounds = {"batch1": time_rounds(1), "batch32": time_rounds(LATENCY_BATCH)}
        # Calls that do not wait for each other keep a GPU's queue full; a CPU has none.
        stream = rounds["batch32"] if device.type == "cpu" else time_rounds(LATENCY_BATCH, waiting=False)
    sizes: dict[str, dict[str, float]] = {
        name: count_parameters(model) | {"size_mb": _measure_size_mb(model)} for name, model in models.items()
    }
    for name, members in (summed or {}).items():
        _sum_members(name, members, sizes, [*rounds.values(), *([] if device.type == "cpu" else [stream])])
    return _summarize_rounds(sizes, rounds, stream)


def _sum_members(name: str, members: Sequence[str], sizes: dict[str, dict[str, float]], timings: Sequence[Rounds]) -> None:
    """Put the sums of several models' sizes, and of their seconds in each round, in the place of theirs."""
    of_members = [sizes.pop(member) for member in members]
    sizes[name] = {entry: sum(size[entry] for size in of_members) for entry in of_members[0]} | {"members": len(members)}
    for rounds in timings:
        seconds = [rounds.pop(member) for member in members]
        rounds[name] = [sum(of_round) for of_round in zip(*seconds, strict=True)]


def _summarize_rounds(sizes: Mapping[str, Mapping[str, float]], rounds: Mapping[str, Rounds], stream: Rounds) -> dict[str, Any]:
    """Add to each model's sizes the medians and ranges of its rounds, and compare teacher and student."""
    result: dict[str, Any] = {}
    for name, counts in sizes.items():
        result[name] = dict(counts)
        for kind, seconds in rounds.items():
            result[name] |= _summarize(f"latency_ms_{kind}", [1000 * round_s for round_s in seconds[name]])
        result[name] |= _summarize("throughput_per_s", [LATENCY_BATCH / round_s for round_s in stream[name]])
    if "teacher" in result and "student" in result:
        result |= compare_efficiency(result["teacher"], result["student"])
        compared = {f"latency_{kind}": seconds for kind, seconds in rounds.items()} | {"throughput": stream}
        result["ratio_ranges"] = {
            name: _paired_range(seconds["teacher"], seconds["student"]) for name, seconds in compared.items()
        }
    return result


def _summarize(name: str, rounds: Sequence[float]) -> dict[str, Any]:
    return {name: float(np.median(rounds)), f"{name}_range": [min(rounds), max(rounds)]}


def _paired_range(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the lowest and the highest ratio of a round."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    return [min(ratios), max(ratios)]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count parameters, embeddings apart; a tensor shared by two places counts once.

    Embeddings are `model.encoder`'s token embeddings and all in its module named `embeddings`, the encoder
    is the rest of it, the head what lies outside, so the three add up. A model without an encoder of that
    name is all encoder.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding_sizes: dict[int, int] = {}
    head = 0
    encoder: Any = getattr(model, "encoder", None)
    if encoder is not None:
        modules = [getattr(encoder, "embeddings", None), encoder.get_input_embeddings()]
        embedding_sizes = {id(p): p.numel() for module in modules if module is not None for p in module.parameters()}
        head = total - sum(parameter.numel() for parameter in encoder.parameters())
    embeddings = sum(embedding_sizes.values())
    return {
        "parameters_total": total,
        "parameters_embeddings": embeddings,
        "parameters_encoder": total - embeddings - head,
        "parameters_head": head,
    }


def _measure_size_mb(model: nn.Module) -> float:
    """Return the bytes that saving the model would take: each tensor of its state once."""
    # keep_vars gives the parameters themselves, so that tied weights have one identity.
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6


def _take_rows(batches: Sequence[Mapping[str, Tensor]], size: int, device: torch.device) -> list[Sample]:
    """Cut `size` rows from each batch, in 8 places for single rows, without columns that are all padding."""
    import torch

    assert batches, "measure_efficiency needs at least one batch"
    samples = []
    for number, batch in enumerate(batches):
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        # Single rows from all over the batches; a batch that is not full repeats its rows.
        first = 0 if size > 1 else number * len(input_ids) // len(batches)
        rows = (first + torch.arange(size)) % len(input_ids)
        columns = attention_mask[rows].bool().any(dim=0)
        samples.append((input_ids[rows][:, columns].to(device), attention_mask[rows][:, columns].to(device)))
    return samples


def _time_rounds(
    sides: Mapping[str, tuple[nn.Module, Sequence[Sample]]], device: torch.device, time_budget_s: float, waiting: bool
) -> Rounds:
    """Return for each side the mean seconds of a call in every round; each round takes the sides in turn."""
    rounds: Rounds = {name: [] for name in sides}
    spent_s, count = 0.0, -1  # the first round warms up
    while count < LEAST_ROUNDS or (count < MOST_ROUNDS and spent_s < time_budget_s * len(sides)):
        for name, (model, samples) in sides.items():
            seconds = _time_calls(model, samples, device, waiting)
            if count >= 0:
                rounds[name].append(seconds / len(samples))
                spent_s += seconds
        count += 1
    return rounds


def _time_calls(model: nn.Module, samples: Sequence[Sample], device: torch.device, waiting: bool) -> float:
    """Return the seconds of answering all samples, each waiting for the one before it or not."""
    import torch

    _synchronize(device)
    started = time.perf_counter()
    with torch.inference_mode():
        for input_ids, attention_mask in samples:
            model(input_ids, attention_mask)
            if waiting:
                _synchronize(device)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    """Wait for the device; a CUDA call returns before its work is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_efficiency(teacher: Mapping[str, float], student: Mapping[str, float]) -> dict[str, Any]:
    """Set two results of `measure_efficiency` against each other.

    Every ratio is above 1 when the student is the cheaper one. `remark` is one plain sentence for the
    report, which also says so when there is nothing gained.
    """

    def ratio(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else np.nan

    sources = {
        "compression": "parameters_total",
        "encoder_compression": "parameters_encoder",
        "size": "size_mb",
        "latency_batch1": "latency_ms_batch1",
        "latency_batch32": "latency_ms_batch32",
    }
    ratios = {name: ratio(teacher[key], student[key]) for name, key in sources.items()}
    ratios["throughput"] = ratio(student["throughput_per_s"], teacher["throughput_per_s"])
    return {"ratios": ratios, "remark": _describe_efficiency(teacher, student, ratios)}


def _describe_efficiency(teacher: Mapping[str, float], student: Mapping[str, float], ratios: Mapping[str, float]) -> str:
    counts = (
        f"{_format_count(student['parameters_total'])} against {_format_count(teacher['parameters_total'])} "
        f"parameters, of which {_format_count(student['parameters_embeddings'])} and "
        f"{_format_count(teacher['parameters_embeddings'])} are embeddings"
    )
    if student["parameters_total"] >= teacher["parameters_total"]:
        size = f"the student is not smaller than the teacher: {counts}"
    else:
        size = f"the student is {ratios['compression']:.2f} times smaller than the teacher: {counts}"
    gain = ratios["throughput"]
    speed = f"{gain:.2f} times the teacher's" if gain >= 1 else f"only {gain:.2f} times the teacher's"
    return f"{size}; its throughput at batch {LATENCY_BATCH} is {speed}"


def _format_count(count: float) -> str:
    if count >= 1e5:
        return f"{count / 1e6:.1f} M"
    return f"{count / 1e3:.1f} k" if count >= 1e3 else f"{count:.0f}"
