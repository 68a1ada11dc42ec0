"""A sweep on a real Slurm of two nodes, one of which dies: RUN_SLURM=1 python -m pytest tests/slurm (as root, a few minutes)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.builders import ROOT, build_model_folder, make_table, make_texts

CLUSTER = Path(__file__).with_name("cluster.sh")
MISSING = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
pytestmark = [
    pytest.mark.skipif(os.environ.get("RUN_SLURM") != "1", reason="takes minutes; RUN_SLURM=1 runs it"),
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt install slurm-wlm slurmctld slurmd munge)"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
RUNS = [f"seed_{seed}_kd_alpha_{alpha}" for seed in (1, 2, 3, 4) for alpha in ("0.3", "0.7")]
SAME_BYTES = ("config.json", "metrics.json", "history.csv", "predictions.csv")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "slurm"
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    subprocess.run(["bash", CLUSTER, "start", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["bash", CLUSTER, "stop", folder], check=False)


def sweep(folder: Path, *more: str) -> list[str]:
    model, table = folder / "model", folder / "comments.csv"
    if not model.exists():
        build_model_folder("bert", "wordpiece", model, make_texts(80))
        make_table(table, rows=200)
    flags = f"--dataset_path {table} --teacher_path {model} --student_path {model} --student_layers 1 --max_length 24 --lr 1e-3"
    flags += " --epochs 40 --early_stopping_patience 40 --teacher_epochs 2 --allow_weak_teacher --num_threads 1"
    flags += " --checkpoint_minutes 0 --sweep seed=1,2,3,4 kd_alpha=0.3,0.7"
    return [sys.executable, str(ROOT / "research_main.py"), *flags.split(), *more]


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def wait_until(happened: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < end, ask("squeue", "-a")
        time.sleep(0.5)


def test_sweep_outlives_a_node_and_ends_in_the_bytes_of_a_local_one(tmp_path: Path, cluster: Path) -> None:
    grid, local = tmp_path / "grid", tmp_path / "local"
    flags = ["--cache_dir", str(tmp_path / "cache"), "--output_dir"]
    subprocess.run([*sweep(tmp_path), *flags, str(grid), "--jobs", "2", "--launcher", "slurm"], check=True)
    wait_until(lambda: ask("squeue", "-h", "-w", "n2", "-t", "running", "-o", "%i"), 120)
    wait_until(lambda: list(grid.glob("seed_*/checkpoint")), 120)
    subprocess.run(["bash", CLUSTER, "kill", cluster, "n2"], check=True)
    wait_until(lambda: not ask("squeue", "-h"), 400)
    assert sorted(path.parent.name for path in grid.glob("*/metrics.json")) == sorted(RUNS)
    assert (grid / "comparison" / "report.html").is_file()
    restarts = ask("scontrol", "show", "node", "n2")
    assert "DOWN" in restarts, restarts
    subprocess.run([*sweep(tmp_path), "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(local)], check=True)
    for name in RUNS:
        for file in SAME_BYTES:
            assert (grid / name / file).read_bytes() == (local / name / file).read_bytes(), f"{name}/{file}"
