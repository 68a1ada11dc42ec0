"""What a model costs: parameters, size, latency and throughput."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from research.evaluation.predict import build_forward, evaluating

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Sample = tuple["Tensor", "Tensor"]  # input_ids and attention_mask, both (B, L)
LATENCY_BATCH = 32
MIN_CALLS, MAX_CALLS = 3, 50


def measure_efficiency(
    model: nn.Module,
    example_batches: Sequence[Mapping[str, Tensor]],
    device: torch.device | str,
    *,
    time_budget_s: float = 1.5,
) -> dict[str, float]:
    """Count a model's parameters and time it on real batches, already on its device.

    `example_batches` are batches as for `predict_logits`; single rows and batches of 32 are cut from
    them without their padding, and rows repeat when a batch has fewer than 32. Each of the three timings
    takes about `time_budget_s` (at least 3 and at most 50 calls) after a warm-up. Latencies are medians
    in ms. Throughput is rows per second over batches of 32 in a row, with one wait at the end, so that
    a GPU's queue is kept full. Sizes are in MB of 10**6 bytes.
    """
    import torch

    device = torch.device(device)
    single_rows = _take_rows(_spread_rows(example_batches, 8), 1, device)
    full_batches = _take_rows([(batch, 0) for batch in example_batches], LATENCY_BATCH, device)
    forward = build_forward(model)
    with evaluating(model):
        latency_one_s = _measure_latency(forward, single_rows, device, time_budget_s)
        latency_full_s = _measure_latency(forward, full_batches, device, time_budget_s)
        num_calls = max(MIN_CALLS, min(MAX_CALLS, int(time_budget_s / latency_full_s)))
        throughput_per_s = _measure_throughput(forward, full_batches, device, num_calls)
    return {
        **count_parameters(model),
        "size_mb": _measure_size_mb(model),
        "latency_ms_batch1": 1000 * latency_one_s,
        "latency_ms_batch32": 1000 * latency_full_s,
        "throughput_per_s": throughput_per_s,
    }


def count_parameters(model: nn.Module) -> dict[str, float]:
    """Count parameters, embeddings apart; a tensor shared by two places counts once.

    Embeddings are `model.encoder`'s token embeddings and all in its module named `embeddings`, the head
    is `model.classifier`, the encoder is the rest, so the three add up. A model without an encoder of
    that name is all encoder.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding_sizes: dict[int, int] = {}
    head = 0
    encoder: Any = getattr(model, "encoder", None)
    if encoder is not None:
        modules = [getattr(encoder, "embeddings", None), encoder.get_input_embeddings()]
        embedding_sizes = {id(p): p.numel() for module in modules if module is not None for p in module.parameters()}
        classifier: Any = getattr(model, "classifier", None)
        head = sum(parameter.numel() for parameter in classifier.parameters()) if classifier is not None else 0
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


def _spread_rows(batches: Sequence[Mapping[str, Tensor]], count: int) -> list[tuple[Mapping[str, Tensor], int]]:
    """Return up to `count` (batch, row) places spread evenly, since batches may be sorted by length."""
    places = [(batch, row) for batch in batches for row in range(len(batch["input_ids"]))]
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    return [places[position] for position in chosen]


def _take_rows(places: Sequence[tuple[Mapping[str, Tensor], int]], batch_size: int, device: torch.device) -> list[Sample]:
    """Cut `batch_size` rows starting at each (batch, row), without columns that are all padding."""
    import torch

    assert places, "measure_efficiency needs at least one batch"
    samples = []
    for batch, first in places:
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        rows = (first + torch.arange(batch_size)) % len(input_ids)
        columns = attention_mask[rows].bool().any(dim=0)
        samples.append((input_ids[rows][:, columns].to(device), attention_mask[rows][:, columns].to(device)))
    return samples


def _synchronize(device: torch.device) -> None:
    """Wait for the device; a CUDA call returns before its work is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_latency(
    forward: Callable[[Tensor, Tensor], Tensor],
    samples: Sequence[Sample],
    device: torch.device,
    time_budget_s: float,
) -> float:
    """Return the median seconds of one call, after a warm-up over the samples for a third of the budget."""

    def timed_calls(budget_s: float, least: int, most: int) -> list[float]:
        durations: list[float] = []
        while len(durations) < least or (len(durations) < most and sum(durations) < budget_s):
            sample = samples[len(durations) % len(samples)]
            _synchronize(device)
            started = time.perf_counter()
            forward(*sample)
            _synchronize(device)
            durations.append(time.perf_counter() - started)
        return durations

    timed_calls(time_budget_s / 3, 1, len(samples))
    return float(np.median(timed_calls(time_budget_s, MIN_CALLS, MAX_CALLS)))


def _measure_throughput(
    forward: Callable[[Tensor, Tensor], Tensor],
    samples: Sequence[Sample],
    device: torch.device,
    num_calls: int,
) -> float:
    """Return rows per second over calls that do not wait for each other."""
    _synchronize(device)
    started = time.perf_counter()
    for call in range(num_calls):
        forward(*samples[call % len(samples)])
    _synchronize(device)
    return num_calls * LATENCY_BATCH / (time.perf_counter() - started)


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
