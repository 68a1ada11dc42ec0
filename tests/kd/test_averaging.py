"""The moving average of the weights against NumPy, and what a training does with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from research.kd.averaging import AveragedWeights


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_average_equals_the_weighted_sum_of_the_weights_after_each_step(decay: float) -> None:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(6, 4))  # before the first step, and after each of five
    parameter = nn.Parameter(torch.tensor(weights[0], dtype=torch.float32))
    averaged = AveragedWeights([parameter], decay)
    for step in range(1, 6):
        parameter.data.copy_(torch.tensor(weights[step], dtype=torch.float32))
        averaged.update()
        shares = (1 - decay) * decay ** (step - np.arange(1, step + 1))
        assert shares.sum() / (1 - decay**step) == pytest.approx(1)
        expected = shares @ weights[1 : step + 1] / (1 - decay**step)
        np.testing.assert_allclose(averaged.averages[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_model_holds_the_average_inside_and_its_own_weights_after_even_an_error() -> None:
    model = nn.Linear(2, 1, bias=False)
    averaged = AveragedWeights(list(model.parameters()), 0.5)
    for value in (1.0, 4.0):
        model.weight.data.fill_(value)
        averaged.update()
    with pytest.raises(KeyboardInterrupt), averaged.in_place():  # noqa: PT012  # a signal amid validation
        assert model(torch.ones(1, 2)).item() == pytest.approx(2 * 3.0)  # (0.25 * 1 + 0.5 * 4) / 0.75
        raise KeyboardInterrupt
    assert model(torch.ones(1, 2)).item() == 8.0
    assert averaged.averages[0].flatten().tolist() == [3.0, 3.0]


def test_without_a_step_there_is_nothing_to_average() -> None:
    model = nn.Linear(2, 1)
    averaged = AveragedWeights(list(model.parameters()), 0.9)
    model.weight.data.fill_(5.0)
    with averaged.in_place():
        assert (model.weight == 5.0).all()


def test_saved_average_goes_on_as_if_it_had_never_stopped() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    whole = AveragedWeights([parameter], 0.9)
    for step in range(4):
        parameter.data.fill_(step)
        whole.update()
        if step == 1:
            kept = {"steps": whole.steps, "averages": [average.clone() for average in whole.averages]}
    parameter.data.fill_(-1)
    resumed = AveragedWeights([parameter], 0.9)
    resumed.load_state_dict(kept)
    for step in (2, 3):
        parameter.data.fill_(step)
        resumed.update()
    assert torch.equal(resumed.averages[0], whole.averages[0])
