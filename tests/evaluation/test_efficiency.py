"""Size and speed of a model, and of two against each other."""

from __future__ import annotations

import pytest
import torch
from support.classifiers import LengthSortedLoader, TinyClassifier
from torch import nn

from research.evaluation.efficiency import compare_efficiency, count_parameters, measure_efficiency


def test_efficiency_counts_embeddings_apart() -> None:
    model = TinyClassifier()
    counts = count_parameters(model)
    assert counts["parameters_embeddings"] == (50 + 24 + 2) * 16 + 2 * 16  # words, positions, types, LayerNorm
    assert counts["parameters_head"] == 16 * 8 + 8 + 8 * 3 + 3
    assert counts["parameters_encoder"] == sum(p.numel() for p in model.encoder.encoder.parameters())
    assert counts["parameters_total"] == sum(p.numel() for p in model.parameters())


def test_model_without_an_encoder_is_all_encoder() -> None:
    assert count_parameters(nn.Linear(4, 3)) == {
        "parameters_total": 15,
        "parameters_embeddings": 0,
        "parameters_encoder": 15,
        "parameters_head": 0,
    }


def test_measured_efficiency_is_complete_and_positive() -> None:
    model = TinyClassifier().train()
    result = measure_efficiency({"student": model}, {"student": list(LengthSortedLoader())}, "cpu", time_budget_s=0.02)
    efficiency = result["student"]
    timed = ("latency_ms_batch1", "latency_ms_batch32", "throughput_per_s")
    assert set(efficiency) == {*count_parameters(model), "size_mb", *timed, *(f"{name}_range" for name in timed)}
    assert all(low <= efficiency[name] <= high for name in timed for low, high in [efficiency[f"{name}_range"]])
    assert efficiency["size_mb"] == pytest.approx(efficiency["parameters_total"] * 4 / 1e6)
    assert model.training and model.encoder.training
    assert set(result) == {"student"}


class Clockwork(nn.Module):
    """Takes a number of seconds a cell, on a clock of its own, and notes what it was asked."""

    def __init__(self, clock: list[float], seconds: float, asked: list[tuple[str, tuple[int, ...]]], name: str) -> None:
        super().__init__()
        self.clock, self.seconds, self.asked, self.name = clock, seconds, asked, name

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        assert attention_mask.any(dim=0).all(), "needless padding"
        self.asked.append((self.name, tuple(input_ids.shape)))
        self.clock[0] += self.seconds * input_ids.numel()
        return {"logits": attention_mask.float()}


def test_models_answer_the_same_rows_in_turn_so_the_ratio_is_that_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher so slow that it uses up the time budget is still timed on every batch, as the student is."""
    clock, asked = [0.0], []  # type: ignore[var-annotated]
    monkeypatch.setattr("research.evaluation.efficiency.time.perf_counter", lambda: clock[0])
    models = {name: Clockwork(clock, seconds, asked, name) for name, seconds in (("teacher", 0.004), ("student", 0.001))}
    batches = list(LengthSortedLoader(num_rows=96, batch_size=32))
    result = measure_efficiency(models, dict.fromkeys(models, batches), "cpu", time_budget_s=0.5)
    for name in ("latency_batch1", "latency_batch32", "throughput"):
        assert result["ratios"][name] == pytest.approx(4)
        assert result["ratio_ranges"][name] == pytest.approx([4, 4])
    of_teacher, of_student = ([shape for name, shape in asked if name == side] for side in models)
    assert of_teacher == of_student
    assert {shape[0] for shape in of_teacher} == {1, 32}
    one_round = [name for name, _ in asked[: 2 * len(batches)]]
    assert one_round == ["teacher"] * len(batches) + ["student"] * len(batches)


def efficiency_of(millions: float, embeddings: float, latency_ms: float) -> dict[str, float]:
    return {
        "parameters_total": millions * 1e6,
        "parameters_embeddings": embeddings * 1e6,
        "parameters_encoder": (millions - embeddings - 0.2) * 1e6,
        "parameters_head": 0.2e6,
        "size_mb": millions * 4,
        "latency_ms_batch1": latency_ms,
        "latency_ms_batch32": latency_ms * 20,
        "throughput_per_s": 32_000 / (latency_ms * 20),
    }


def test_comparison_gives_ratios_above_one_for_a_cheaper_student() -> None:
    comparison = compare_efficiency(efficiency_of(110, 24.6, 40), efficiency_of(55, 12.3, 10))
    assert comparison["ratios"] == pytest.approx(
        {
            "compression": 2,
            "encoder_compression": 85.2 / 42.5,
            "size": 2,
            "latency_batch1": 4,
            "latency_batch32": 4,
            "throughput": 4,
        }
    )
    assert "2.00 times smaller" in comparison["remark"]


def test_remark_says_plainly_that_a_student_is_not_smaller() -> None:
    remark = compare_efficiency(efficiency_of(110, 24.6, 40), efficiency_of(135.3, 92.2, 50))["remark"]
    assert remark.startswith("the student is not smaller than the teacher: 135.3 M against 110.0 M parameters")
    assert "92.2 M" in remark and "only 0.80 times" in remark and "\n" not in remark
