"""Dropout from random bits: the values, rates and gradients that dropout promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from research.models.dropout import BitDropout, drop_values, replace_dropout


def draw(p: float, shape: tuple[int, ...] = (200, 500), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return drop_values(torch.ones(shape, dtype=dtype), p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_p_is_dropped_and_the_rest_scaled(p: float) -> None:
    values = draw(p)
    dropped = (values == 0).float()
    # Four standard deviations of a binomial share of 100,000.
    assert abs(float(dropped.mean()) - p) < 4 * (p * (1 - p) / values.numel()) ** 0.5
    torch.testing.assert_close(values[values != 0], torch.full_like(values[values != 0], 1 / (1 - p)), atol=1e-3, rtol=1e-3)


def test_neighbouring_values_are_dropped_independently() -> None:
    # One random word holds the bits of four neighbours.
    dropped = (draw(0.5, (100_000, 4)) == 0).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 4 / 100_000**0.5


def test_the_gradient_is_dropped_and_scaled_like_the_values() -> None:
    values = torch.randn(37, 3, dtype=torch.float64, requires_grad=True)
    dropped = drop_values(values, 0.3)
    dropped.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values * values.grad, dropped)
    assert 0 < int((values.grad == 0).sum()) < values.numel()


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_ends_of_the_range(p: float, expected: float) -> None:
    assert (draw(p) == expected).all()


@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (3, 7)])
def test_any_size_and_precision_keeps_its_shape(shape: tuple[int, ...]) -> None:
    values = draw(0.5, shape, torch.bfloat16)
    assert values.shape == shape and values.dtype == torch.bfloat16


def test_the_seed_decides() -> None:
    assert torch.equal(draw(0.5), draw(0.5))


def test_every_dropout_of_a_model_is_replaced_and_rests_outside_training() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.25), nn.ReLU()), nn.Dropout(0.5))
    replace_dropout(model, BitDropout)
    assert [module.p for module in model.modules() if isinstance(module, BitDropout)] == [0.25, 0.5]
    model.eval()
    values = torch.randn(4, 3)
    assert torch.equal(model(values), torch.relu(model[0](values)))


def test_replacing_dropout_keeps_its_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    replace_dropout(model, BitDropout)
    assert isinstance(model[0], BitDropout) and not model[0].training
    replace_dropout(model, nn.Dropout)
    assert type(model[0]) is nn.Dropout and not model[0].training
