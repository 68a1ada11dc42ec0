"""Kill a small run at many points, start it again until it ends, and compare it with one that was left alone.

python benchmarks/kill.py --kills 150 --sweep_kills 60

Half of the runs are first killed just before one of their writes, spread evenly over all of them, the others
at a random moment; each is killed up to three times. Every run has to end with the same bytes in its metrics,
histories, predictions and weights, with no litter in its directory or in the cache. With --damage every file
of a half-finished run's cache and checkpoints is altered, cut to half and deleted, alone, before the run goes
on: it has to end the same, or say what is wrong.

With --sweep_kills N sweeps of three runs in two workers are struck at random moments, the parent, one worker
and the whole group in turn, by SIGINT, SIGTERM and SIGKILL. A signal to the parent or the group has to end the
sweep, with 130 if it can, and nothing may be alive ten seconds later; one to a worker must not keep the sweep
from its end. The same command then goes on to the same bytes of every run.

Prints one JSON line; exit status 1 when a run or a sweep ended otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("", "tests")]

from support.fault_injection import (  # noqa: E402
    attempt,
    build_inputs,
    copy_inputs,
    damage_files,
    kill_runs,
    read_results,
)
from support.sweep_kills import kill_sweeps, read_sweep, run_untouched  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=150, help="how many times to kill, at least (default: %(default)s)")
    parser.add_argument("--sweep_kills", type=int, default=0, help="how many signals to send to sweeps (default: %(default)s)")
    parser.add_argument("--damage", action="store_true", help="also damage every file of the cache and the checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments (default: %(default)s)")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    inputs = build_inputs(folder / "inputs")
    result: dict[str, Any] = {}
    if arguments.kills or arguments.damage:
        untouched = copy_inputs(inputs, folder / "untouched")
        reference = attempt(untouched)
        assert reference.status == 0, reference.errors
        expected = read_results(untouched / "run")
        result |= kill_runs(folder, inputs, reference, expected, arguments.kills, arguments.seed)
        if arguments.damage:
            result |= damage_files(folder, inputs, reference, expected)
    if arguments.sweep_kills:
        untouched = copy_inputs(inputs, folder / "untouched_sweep")
        seconds = run_untouched(untouched)
        result |= kill_sweeps(folder, inputs, seconds, read_sweep(untouched), arguments.sweep_kills, arguments.seed)
    print(json.dumps({"benchmark": "kill", "settings": vars(arguments), **result}))
    if any(result.get(f"{kind}_that_differ") for kind in ("runs", "damages", "sweeps")):
        print(f"what they left stands in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
