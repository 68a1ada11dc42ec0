"""A sweep of tiny students over two nodes of a real Slurm, of which something is killed again and again.

python benchmarks/slurm_sweep.py --runs 200

As root, with slurm-wlm, slurmctld, slurmd and munge installed; starts a cluster of its own on this machine and ends it.
An array of tasks shares out the runs (`--sweep_shard slurm`). At random moments, until all is done, a node dies with all
that runs on it and comes back, or a task's worker or its parent is killed, or a task is warned of its time limit. The plain
sweep command then does what killed parents have left. Every process writes down in one append-only log which run it begins
and finishes: each has to be begun once and finished once, and a sample of them has to have the bytes of a local sweep.

Prints one JSON line; exit status 1 when a run was lost, done twice, or has other bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.fault_injection import build_inputs, read_results  # noqa: E402
from support.slurm_cluster import Cluster, find_obstacle, wait_until  # noqa: E402

from research.experiment.slurm import SCRIPT  # noqa: E402

FLAGS = (
    "--dataset_path data/comments.csv --teacher_path models/teacher --student_path models/student --lr 1e-3 --teacher_epochs 1 "
    "--epochs 1 --batch 16 --max_length 32 --student_hidden_size 8 --num_threads 1 --allow_weak_teacher --checkpoint_minutes 0"
)
# Loaded by every Python of the jobs. A run's first file makes it begun, its last one finished.
WITNESS = """
import os, sys
marks = {{"config.json": "begun", "metrics.json": "finished"}}

def watch(event, arguments):
    if event == "os.rename":
        folder, name = os.path.split(os.fspath(arguments[1]))
        if name in marks and os.path.basename(folder).startswith("seed_"):
            log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(log, f"{{marks[name]}} {{os.path.basename(folder)}} {{os.getpid()}}\\n".encode())
            os.close(log)

sys.addaudithook(watch)
"""
PARENT, WORKER = b"research_main.py", b"multiprocessing.spawn"
BLOWS = ("node", "worker", "parent", "warning")


class Blows:
    """Strikes a cluster that is at work, and counts."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.generator = random.Random(seed)
        self.count: Counter[str] = Counter()
        self.dead: dict[str, float] = {}
        self.warnings: list[subprocess.Popen[bytes]] = []

    def strike(self) -> None:
        """Kill something of a node, or warn its task; let nodes that are dead long enough to be noticed come back."""
        for node, since in list(self.dead.items()):
            if time.monotonic() - since > 25:
                self.cluster.start_node(node)
                del self.dead[node]
        blow = self.generator.choice(BLOWS)
        node = self.generator.choice([node for node in self.cluster.nodes if node not in self.dead])
        if blow == "node":
            if not self.dead:
                self.cluster.kill_node(node)
                self.dead[node] = time.monotonic()
                self.count[blow] += 1
        elif blow == "warning":
            if job := self.cluster.run("squeue", "-h", "-w", node, "-t", "running", "-o", "%A"):
                command = ["scancel", "--batch", "--signal", "USR1", job.split()[0]]
                self.warnings.append(subprocess.Popen(command, env=self.cluster.environment, stderr=subprocess.DEVNULL))
                self.count[blow] += 1
        elif processes := self._find(node, WORKER if blow == "worker" else PARENT):
            with suppress(ProcessLookupError):
                os.kill(self.generator.choice(processes), signal.SIGKILL)
                self.count[blow] += 1

    def end(self) -> None:
        for process in self.warnings:
            process.wait()

    def _find(self, node: str, part: bytes) -> list[int]:
        found = []
        for process in self.cluster.processes(node):
            with suppress(OSError):
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                # The batch shell names the script too, in one word with all the others.
                found += [process] if part in b" ".join(words) and b"python" in words[0] else []
        return found


def run_sweep(folder: Path, cluster: Cluster, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let the array do the sweep under blows, then the plain command; return what is to be told of them."""
    grid = ["--sweep", "seed=" + ",".join(map(str, range(1, arguments.runs + 1)))]
    command = [sys.executable, str(ROOT / "research_main.py"), *FLAGS.split(), *grid, "--output_dir", "run"]
    environment = cluster.environment | {"PYTHONPATH": str(folder / "witness"), "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"env": environment, "cwd": folder, "check": True, "capture_output": True}
    subprocess.run([*command, "--prepare_only"], **quiet)
    started = time.monotonic()
    script = SCRIPT.format(command=shlex.join([*command, "--sweep_shard", "slurm"]))
    options = ["--requeue", "--open-mode=append", "--output=task_%a.out", f"--array=1-{arguments.tasks}"]
    subprocess.run(["sbatch", *options], input=script.encode(), **quiet)
    blows = Blows(cluster, arguments.seed)
    while cluster.run("squeue", "-h"):
        time.sleep(blows.generator.uniform(0.5, 1.5) * arguments.interval)
        if cluster.run("squeue", "-h") and time.monotonic() - started < arguments.strike_s:
            blows.strike()
        elif blows.dead:
            wait_until(lambda: time.monotonic() - max(blows.dead.values()) > 25, 60)
            for node in blows.dead:
                cluster.start_node(node)
            blows.dead.clear()
    blows.end()
    jobs = cluster.run("scontrol", "show", "job", "-o").splitlines()
    left = arguments.runs - len(list(folder.glob("run/seed_*/metrics.json")))
    subprocess.run(command, **quiet)
    seconds = time.monotonic() - started
    log = Counter(" ".join(line.split()[:2]) for line in (folder / "witness.log").read_text(encoding="utf-8").splitlines())
    names = [f"seed_{seed}" for seed in range(1, arguments.runs + 1)]
    sample = names[:: max(1, arguments.runs // arguments.sample)]
    return {
        "blows": dict(blows.count),
        "restarts_of_tasks": sum(int(job.partition("Restarts=")[2].split()[0]) for job in jobs),
        "left_to_the_last_command": left,
        "runs_begun": sum(log[f"begun {name}"] > 0 for name in names),
        "runs_finished": sum(log[f"finished {name}"] > 0 for name in names),
        "lost": [name for name in names if not (folder / "run" / name / "metrics.json").exists()],
        "begun_twice": [name for name in names if log[f"begun {name}"] > 1],
        "finished_twice": [name for name in names if log[f"finished {name}"] > 1],
        "sampled": len(sample),
        "sampled_that_differ": compare_sample(folder, sample),
        "seconds": round(seconds, 1),
    }


def compare_sample(folder: Path, sample: Sequence[str]) -> list[str]:
    """Do some runs in a local sweep and return those whose bytes differ."""
    seeds = "seed=" + ",".join(name.removeprefix("seed_") for name in sample)
    command = [sys.executable, str(ROOT / "research_main.py"), *FLAGS.split(), "--sweep", seeds, "--output_dir", "local"]
    subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return [name for name in sample if read_results(folder / "run" / name) != read_results(folder / "local" / name)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="runs of the sweep (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=20, help="tasks of the array (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=12.0, help="mean seconds between two blows (default: %(default)s)")
    parser.add_argument("--strike_s", type=float, default=1e9, help="seconds after which there are no more (default: no end)")
    parser.add_argument("--sample", type=int, default=10, help="runs to compare with a local sweep (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the blows (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if obstacle := find_obstacle():
        print(f"there can be no Slurm here: {obstacle}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="slurm-sweep-"))
    build_inputs(folder)
    (folder / "witness").mkdir()
    witness = WITNESS.format(log=str(folder / "witness.log"))
    (folder / "witness" / "sitecustomize.py").write_text(witness, encoding="utf-8")
    cluster = Cluster(folder / "slurm")
    try:
        cluster.start()
        result = run_sweep(folder, cluster, arguments)
    finally:
        cluster.stop()
    print(json.dumps({"benchmark": "slurm_sweep", "settings": vars(arguments), **result}))
    if any(result[name] for name in ("lost", "begun_twice", "finished_twice", "sampled_that_differ")):
        print(f"what they left stands in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
