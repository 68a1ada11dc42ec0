"""Logits: in dataset order, finite, and without a trace in the model."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from support.builders import ROOT
from support.classifiers import LengthSortedLoader, TinyClassifier

from research.evaluation.predict import predict_logits


def test_import_loads_neither_torch_nor_scikit_learn() -> None:
    check = (
        "import sys, research.evaluation.metrics, research.evaluation.predict, research.evaluation.efficiency; "
        "sys.exit(bool({'torch', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=60).returncode == 0


def test_length_sorted_loader_gives_rows_in_dataset_order() -> None:
    model, loader = TinyClassifier(), LengthSortedLoader()
    logits = predict_logits(model, loader, "cpu")
    assert logits.shape == (11, 3) and logits.dtype == np.float32
    model.eval()
    for row, input_ids in enumerate(loader.rows):
        with torch.inference_mode():
            alone = model(input_ids[None], torch.ones_like(input_ids[None]))["logits"][0]
        np.testing.assert_allclose(logits[row], alone.numpy(), atol=1e-5)


def test_a_loader_that_leaves_rows_out_is_caught() -> None:
    with pytest.raises(AssertionError, match="loader gave 11 of 12 rows"):
        predict_logits(TinyClassifier(), LengthSortedLoader(), "cpu", num_rows=12)


def test_prediction_restores_every_training_flag() -> None:
    model = TinyClassifier().train()
    model.encoder.eval()  # a frozen encoder stays in eval mode while its head trains
    before = [module.training for module in model.modules()]
    predict_logits(model, LengthSortedLoader(), "cpu")
    assert [module.training for module in model.modules()] == before
    assert True in before and False in before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_logits_match_cpu_logits() -> None:
    model, loader = TinyClassifier(), LengthSortedLoader()
    on_cpu = predict_logits(model, loader, "cpu")
    np.testing.assert_allclose(predict_logits(model.cuda(), loader, "cuda"), on_cpu, atol=1e-3)


def test_logits_that_are_not_finite_stop_the_evaluation() -> None:
    model = TinyClassifier()
    last = model.classifier[3]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.bias[1] = float("inf")
    with pytest.raises(FloatingPointError, match="logits of 11 of 11 rows are not finite"):
        predict_logits(model, LengthSortedLoader(), "cpu")
