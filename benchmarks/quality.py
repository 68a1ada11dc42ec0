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
from reference_loop import Comparison, PaddedRows, ReferenceLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader

from research_config import ExperimentConfig, parse_arguments
from research_evaluation import DEFAULT_THRESHOLD, compute_metrics
from research_statistics import mean_and_std

AS_REFERENCE = "as_reference"
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
        rows = self.inputs.split.train
        self.teacher_logits = torch.full((len(self.texts), len(self.label_names)), torch.nan)
        self.teacher_logits[torch.from_numpy(rows)] = self.predict(self.teacher, rows, self.autocast_dtype)

    def build_loader(self, rows: Any, *, shuffle: bool) -> DataLoader[dict[str, Tensor]]:
        texts = [self.texts[row] for row in rows]
        data = RowsWithNumbers(texts, self.inputs.comments.labels[rows], self.inputs.student_tokenizer, self.config.max_length)
        data.numbers = rows
        return DataLoader(data, batch_size=self.config.batch, shuffle=shuffle)

    @torch.no_grad()
    def predict(self, model: Any, rows: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Return logits (N, C) of these rows, computed longest texts first."""
        order = np.argsort([-len(self.texts[row]) for row in rows], kind="stable")
        model.eval()
        logits = torch.empty(len(rows), len(self.label_names))
        done = 0
        for padded in self.build_loader(rows[order], shuffle=False):
            batch = {name: tensor.to(self.device) for name, tensor in trim(padded).items()}
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                _, of_batch = self.forward(model, batch)
            logits[torch.from_numpy(order[done : done + len(of_batch)])] = of_batch.float().cpu()
            done += len(of_batch)
        return logits

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Take the reference's step on a batch; groups of its rows add up to the gradient of its mean loss."""
        rows = len(batch["labels"])
        by_length = batch["attention_mask"].sum(dim=1).argsort(descending=True)
        self.optimizer.zero_grad()
        loss = 0.0
        for places in by_length.split(GROUP_ROWS):
            group = trim({name: tensor[places] for name, tensor in batch.items()})
            with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
                _, student_logits = self.forward(self.student, group)
                teacher_logits = self.teacher_logits[group["number"].cpu()].to(self.device)
                losses = self.criterion(student_logits, teacher_logits, group["labels"], self.class_weights)
            share = losses["total_loss"] * (len(places) / rows)
            self.scaler.scale(share).backward()
            loss += share.item()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), self.config.gradient_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {"total_loss": loss}

    def score(self, rows: Any) -> dict[str, Any]:
        probs = self.predict(self.student, rows).sigmoid().numpy()
        return compute_metrics(self.inputs.comments.labels[rows], probs, DEFAULT_THRESHOLD, self.label_names)


class RowsWithNumbers(PaddedRows):
    """Padded rows that carry their number in the data set."""

    numbers: Any

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return super().__getitem__(place) | {"number": torch.tensor(self.numbers[place])}


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
            command = common.suite_command(**self.flags(1), seed=seed)
            command[1:2] = [str(Path(__file__).resolve()), AS_REFERENCE]
            command += common.precision_flags(dtype)
            finished = common.run_process(command, done.with_suffix(".log"), threads=1)
            done.write_text(finished.stdout.splitlines()[-1])
            print(f"reference, seed {seed}: {done.read_text()}", file=sys.stderr)
        scores: dict[str, float] = json.loads(done.read_text())
        return scores


def run_as_reference(argv: Sequence[str]) -> int:
    """Be the reference's process: the flags of a run of the suite."""
    loop = FrugalReference(parse_arguments(argv).config)
    loop.run()
    test = loop.score(loop.inputs.split.test)
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
        half = critical_t(len(differences) - 1) * std / math.sqrt(len(differences))
        result["interval_95"] = [round(mean - half, 2), round(mean + half, 2)]
    return result


def critical_t(freedom: int) -> float:
    """Return the 97.5 % point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [AS_REFERENCE]:
        return run_as_reference(argv[1:])
    parser = common.build_parser(__doc__, rows=None, repeats=1)
    parser.add_argument("--seeds", type=int, default=8, help="students of each side, seeds 1 to N (default: %(default)s)")
    parser.add_argument("--test_fraction", type=float, default=0.6, help="share of the rows to test on (default: %(default)s)")
    parser.add_argument("--student_layers", type=int, default=3, help="layers of the student, cut from the model")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of both sides (default: %(default)s)")
    parser.add_argument("--pooling", choices=("cls", "mean"), default="mean", help="text vector of teacher and student")
    parser.add_argument("--reference_dtype", choices=("float32", "bfloat16"), help="the reference's precision (default: --dtype)")
    parser.add_argument("--teacher_checkpoint", type=Path, help="fine-tuned teacher of both sides, as the suite takes it")
    parser.add_argument("--teacher_epochs", type=int, default=3, help="else fine-tune one so long (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder to work in, kept; the same command goes on with what it holds")
    parser.set_defaults(kd_method="logit", data_fraction=1.0, reference_fraction=1.0)
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
