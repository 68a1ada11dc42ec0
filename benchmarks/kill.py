"""Kill a small run at many points, start it again until it ends, and compare it with one that was left alone.

python benchmarks/kill.py --kills 150

Half of the runs are first killed just before one of their writes, spread evenly over all of them, the others
at a random moment; each is killed up to three times. Every run has to end with the same bytes in its metrics,
histories, predictions and weights, with no litter in its directory or in the cache. With --damage every file
of a half-finished run's cache and checkpoints is altered, cut to half and deleted, alone, before the run goes
on: it has to end the same, or say what is wrong. Prints one JSON line; exit status 1 when a run ended otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("", "tests")]

from support.fault_injection import (  # noqa: E402
    attempt,
    build_inputs,
    copy_inputs,
    damage_files,
    kill_runs,
    read_results,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=150, help="how many times to kill, at least (default: %(default)s)")
    parser.add_argument("--damage", action="store_true", help="also damage every file of the cache and the checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments (default: %(default)s)")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    inputs = build_inputs(folder / "inputs")
    untouched = copy_inputs(inputs, folder / "untouched")
    reference = attempt(untouched)
    assert reference.status == 0, reference.errors
    expected = read_results(untouched / "run")
    result = kill_runs(folder, inputs, reference, expected, arguments.kills, arguments.seed)
    if arguments.damage:
        result |= damage_files(folder, inputs, reference, expected)
    print(json.dumps({"benchmark": "kill", "settings": vars(arguments), **result}))
    if result["runs_that_differ"] or result.get("damages_that_differ"):
        print(f"what they left stands in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
