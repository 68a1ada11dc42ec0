"""Compare the test scores of students trained by the suite with those of the reference's training, over many seeds.

    python benchmarks/quality.py --epochs 10 --seeds 16
    python benchmarks/quality.py --epochs 10 --seeds 16 --keep results/quality    # goes on where it was stopped

The question is whether what makes the suite fast (rows of similar length in a batch, cached teacher outputs, its
own dropout, bfloat16) costs quality. The reference would take hours a seed, so here it takes its own steps at less
cost: each of its random batches is cut into groups of similar length, padded to their own longest, whose gradients
add up to the batch's, and the teacher's logits are computed once. Its weights after a run are those of
`reference_loop.py` to rounding, dropout apart (tests/test_benchmarks.py).

Both sides get the same table, split, teacher, flags and seeds, and no early stopping. Most rows go into
the test part, since the luck of a small one would drown the difference. The line holds the scores of every seed and
the mean of the paired differences with its 95 % interval of Student's t.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from reference_loop import AS_REFERENCE, Comparison, ReferenceLoop, add_training_flags
from scipy.special import stdtrit
from torch import Tensor

from research.evaluation.inference import mean_and_std
from research_config import ExperimentConfig, parse_arguments

GROUP_ROWS = 8
SCORES = {"macro_f1": "f1_macro", "average_precision_macro": "average_precision_macro"}


# The reference, the same steps at less cost


def trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the columns off a padded batch that are padding in every row."""
    longest = int(batch["attention_mask"].sum(dim=1).max())
    return batch | {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}


class FrugalReference(ReferenceLoop):
    """The reference for `--kd_method logit`, without the padding and with the teacher's logits computed once."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        assert not config.method.hidden and not config.method.attention
        assert not np.isnan(self.inputs.comments.labels).any(), "the mean over known labels does not split into groups"
        with self.autocast():
            self.teacher_logits = self.compute_logits(self.teacher, self.inputs.split.train)

    @torch.no_grad()
    def compute_logits(self, model: Any, rows: Any) -> Tensor:
        """Return logits (N, C) of these rows, computed longest texts first."""
        order = np.argsort([-len(self.texts[row]) for row in rows], kind="stable")
        model.eval()
        logits = torch.empty(len(rows), len(self.label_names), device=self.device)
        for padded in self.build_loader(rows[order], shuffle=False):
            batch = trim({name: tensor.to(self.device) for name, tensor in padded.items()})
            logits[torch.from_numpy(order[padded["place"]])] = self.forward(model, batch)[1].float()
        return logits

    def predict(self, rows: Any) -> Any:
        return self.compute_logits(self.student, rows).sigmoid().cpu().numpy()

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Take the reference's step on a batch; groups of its rows add up to the gradient of its mean loss."""
        rows = len(batch["labels"])
        by_length = batch["attention_mask"].sum(dim=1).argsort(descending=True)
        self.optimizer.zero_grad()
        loss = 0.0
        for chosen in by_length.split(GROUP_ROWS):
            group = trim({name: tensor[chosen] for name, tensor in batch.items()})
            with self.autocast():
                _, student_logits = self.forward(self.student, group)
                teacher_logits = self.teacher_logits[group["place"]]
                losses = self.criterion(student_logits, teacher_logits, group["labels"], self.class_weights)
            share = losses["total_loss"] * (len(chosen) / rows)
            self.scaler.scale(share).backward()
            loss += share.item()
        self.update_weights()
        return {"total_loss": loss}


# The comparison


class QualityComparison(Comparison):
    """Both sides over the seeds 1 to N, one thread a run; what a kept folder holds is not run again."""

    def data_flags(self) -> dict[str, Any]:
        return super().data_flags() | {"test_fraction": self.arguments.test_fraction}

    def seeds(self) -> range:
        return range(1, self.arguments.seeds + 1)

    def run_suite_seeds(self) -> list[dict[str, float]]:
        """Train the suite's students in one sweep and return their test scores at threshold 0.5."""
        runs = self.scratch / f"suite_{self.arguments.dtype}"
        sweep = {"sweep": [f"seed={','.join(map(str, self.seeds()))}"], "jobs": self.arguments.threads}
        command = common.suite_command(**self.flags(1), **sweep, output_dir=runs, cache_dir=self.scratch / "cache")
        command += common.precision_flags(self.arguments.dtype)
        common.run_process(command, runs.with_suffix(".log"), threads=1)
        tests = [json.loads((runs / f"seed_{seed}" / "metrics.json").read_text())["student"]["test"] for seed in self.seeds()]
        return [{name: test["at_0.5"][key] for name, key in SCORES.items()} for test in tests]

    def run_reference_seeds(self) -> list[dict[str, float]]:
        with ThreadPoolExecutor(self.arguments.threads) as pool:
            return list(pool.map(self.run_reference_seed, self.seeds()))

    def run_reference_seed(self, seed: int) -> dict[str, float]:
        dtype = self.arguments.reference_dtype or self.arguments.dtype
        done = self.scratch / f"reference_{dtype}_{seed}.json"
        if not done.exists():
            command = common.script_command(Path(__file__).resolve(), AS_REFERENCE, **self.flags(1), seed=seed)
            command += common.precision_flags(dtype)
            finished = common.run_process(command, done.with_suffix(".log"), threads=1)
            done.write_text(finished.stdout.splitlines()[-1])
            print(f"reference, seed {seed}: {done.read_text()}", file=sys.stderr)
        scores: dict[str, float] = json.loads(done.read_text())
        return scores


def run_as_reference(argv: Sequence[str]) -> int:
    """Be the reference's process: the flags of a run of the suite."""
    test = FrugalReference(parse_arguments(argv).config).run()
    print(json.dumps({name: test[key] for name, key in SCORES.items()}))
    return 0


def compare_scores(suite: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Return both sides' mean and standard deviation, and the paired difference with its interval, all times 100."""
    points = {side: [round(100 * value, 2) for value in values] for side, values in (("suite", suite), ("reference", reference))}
    differences = [100 * (one - other) for one, other in zip(suite, reference, strict=True)]
    mean, std = mean_and_std(differences)
    result: dict[str, Any] = {"points": points, "suite_minus_reference": round(mean, 2)}
    for side, values in points.items():
        result[side] = dict(zip(("mean", "std"), (round(value, 2) for value in mean_and_std(values)), strict=True))
    if len(differences) > 1:
        half = float(stdtrit(len(differences) - 1, 0.975)) * std / math.sqrt(len(differences))
        result["interval_95"] = [round(mean - half, 2), round(mean + half, 2)]
    return result


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [AS_REFERENCE]:
        return run_as_reference(argv[1:])
    parser = common.build_parser(__doc__, rows=None, repeats=1)
    parser.add_argument("--seeds", type=int, default=8, help="students of each side, seeds 1 to N (default: %(default)s)")
    parser.add_argument("--test_fraction", type=float, default=0.6, help="share of the rows to test on (default: %(default)s)")
    add_training_flags(parser)
    parser.set_defaults(student_layers=3, pooling="mean", teacher_epochs=3, kd_method="logit", reference_fraction=1.0)
    parser.add_argument("--reference_dtype", choices=("float32", "bfloat16"), help="the reference's precision (default: --dtype)")
    parser.add_argument("--keep", type=Path, help="folder to work in, kept; the same command goes on with what it holds")
    arguments = common.parse_flags(parser, argv)
    machine = common.describe_machine(arguments.threads, arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        comparison = QualityComparison(arguments, folder.resolve())
        suite, reference = comparison.run_suite_seeds(), comparison.run_reference_seeds()
    result = {name: compare_scores(*([scores[name] for scores in side] for side in (suite, reference))) for name in SCORES}
    common.print_result("quality", arguments, machine, {"seeds": list(comparison.seeds()), "test_scores_at_0.5": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
