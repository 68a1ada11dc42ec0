"""benchmarks/ngrams.py on a finished run: what the same command with --student_ngrams gives."""

from __future__ import annotations

import json
from types import ModuleType

import numpy as np
import pytest
from support.scripts import load_benchmark
from support.tiny_lab import TinyLab, columns_of, read_metrics

FLAGS = "--num_folds 2 --with_control"


@pytest.fixture(scope="module")
def ngrams() -> ModuleType:
    return load_benchmark("ngrams")


def test_a_finished_run_is_written_anew_as_the_flag_would_have_made_it(lab: TinyLab, ngrams: ModuleType) -> None:
    plain, flagged = lab.done("plain", FLAGS), lab.done("flagged", f"{FLAGS} --student_ngrams 2")
    lab.capture()
    arguments = [str(plain), "--output_dir", "beside", "--ngrams", "2"]
    assert ngrams.main(arguments) == 0
    printed = lab.capture()[0].splitlines()
    written = lab.folder / "beside" / "plain"
    for fold in ("fold_1", "fold_2"):
        for model in ("student", "control"):
            facts = [read_metrics(run / fold)["training"][model] for run in (written, flagged)]
            assert facts[0] == facts[1]
        for file in ("predictions.csv", "validation_predictions.csv"):
            found, expected = (columns_of(run / fold / file, "logit_") for run in (written, flagged))
            np.testing.assert_allclose(found, expected, atol=2e-5)
    result = json.loads(printed[-1])["results"][str(plain)]["student"]
    assert len(result["shares"]) == 2
    assert result["scores"]["f1_macro"][1] == pytest.approx(
        read_metrics(flagged)["pooled"]["scores"]["f1_macro"]["student"]["value"]
    )
    before = (written / "metrics.json").read_bytes()
    assert ngrams.main(arguments) == 0 and (written / "metrics.json").read_bytes() == before


def test_a_run_of_one_split_is_refused(lab: TinyLab, ngrams: ModuleType) -> None:
    with pytest.raises(SystemExit, match="is no run with --num_folds"):
        ngrams.main([str(lab.done("single")), "--output_dir", "beside"])
