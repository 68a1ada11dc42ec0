"""Where the time of a training step goes, by what it is spent on.

    python benchmarks/profile_step.py                        # a 3-layer student in float32 and bfloat16, on the labels alone
    python benchmarks/profile_step.py --student_layers 12 --steps 10

One thread. Shares are of the time within torch's operations, as its profiler counts it (what calls them is the last
line's rest), over the same batches in both precisions; the profiler makes every operation a little longer, the small ones
most. `benchmarks/step.py` says how near the whole step comes to the machine's rate of matrix products.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import common
import torch
from step import Bench
from torch.profiler import ProfilerActivity, profile

from research_distillation import DistillationTrainer

# What an operation of torch's belongs to; every other one is "other".
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous"),
    "optimizer": ("aten::_fused_adamw_", "Optimizer.step#AdamW.step", "aten::_foreach_add_"),
    "norm of the gradient": ("aten::linalg_vector_norm", "aten::_foreach_norm", "aten::stack"),
    "activation": ("aten::gelu", "aten::gelu_backward"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data", "aten::masked_fill_", "aten::masked_fill"),
    "layer norm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "dropout": ("aten::random_", "aten::bernoulli_", "aten::ge", "aten::native_dropout", "aten::native_dropout_backward"),
    "embeddings": ("aten::fill_", "aten::zero_", "aten::embedding_dense_backward", "aten::index_select", "aten::embedding"),
    "sums and products of tensors": ("aten::add", "aten::add_", "aten::mul", "aten::mul_", "aten::div", "aten::sum"),
}
KIND_OF = {operation: kind for kind, operations in KINDS.items() for operation in operations}
OTHER = "other"


def profile_steps(bench: Bench, layers: int) -> dict[str, float]:
    """Return the milliseconds of a step that go into each kind of operation."""
    student = common.build_student(bench.arguments.model, len(bench.comments.label_names), layers)
    trainer = DistillationTrainer(None, student, bench.config(), bench.device)
    optimizer, weights = trainer.build_optimizer(), torch.ones(len(bench.comments.label_names))
    trainer.set_training_mode()
    first, *batches = bench.build_training_loader()
    trainer.take_step([first], optimizer, weights, step=1)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for batch in batches:
            trainer.take_step([batch], optimizer, weights, step=1)
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        spent[KIND_OF.get(event.key, OTHER)] += event.self_cpu_time_total / 1000 / len(batches)
    return dict(spent)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.build_parser(__doc__, rows=3000, repeats=1)
    parser.add_argument("--student_layers", type=int, default=3, help="layers of the student (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps that are profiled (default: %(default)s)")
    arguments = common.parse_flags(parser, argv)
    machine = common.describe_machine(arguments.threads, arguments.device)
    spent: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            arguments.dtype = dtype
            spent[dtype] = profile_steps(Bench(arguments, Path(folder)), arguments.student_layers)
    totals = {dtype: sum(of_dtype.values()) for dtype, of_dtype in spent.items()}
    print(f"| milliseconds of a step | {' | '.join(spent)} |\n| --- |{' ---: |' * len(spent)}")
    for kind in (*KINDS, OTHER):
        cells = [f"{of.get(kind, 0.0):.1f} ({of.get(kind, 0.0) / totals[dtype]:.0%})" for dtype, of in spent.items()]
        print(f"| {kind} | {' | '.join(cells)} |")
    common.print_result("profile_step", arguments, machine, {"milliseconds": spent, "total": totals})
    return 0


if __name__ == "__main__":
    sys.exit(main())
