"""A sweep on a real Slurm of two nodes, one of which dies: RUN_SLURM=1 python -m pytest tests/slurm (as root, a few minutes)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.builders import ROOT
from support.fault_injection import FLAGS, build_inputs, read_results
from support.slurm_cluster import Cluster, find_obstacle, wait_until

OBSTACLE = find_obstacle()
pytestmark = [
    pytest.mark.skipif(os.environ.get("RUN_SLURM") != "1", reason="takes minutes; RUN_SLURM=1 runs it"),
    pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE)),
]
# Long enough that a run can be met in the middle.
LONG = ["--epochs", "12", "--early_stopping_patience", "12"]
SWEEP = [*FLAGS, *LONG, "--sweep", "kd_alpha=0.3,0.7", "--sweep", "seed=1,2,3,4"]
PATIENCE_S = 600


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    build_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    cluster = Cluster(tmp_path / "slurm")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        assert cluster.processes() == []


def launch(cluster: Cluster) -> None:
    flags = [*SWEEP, "--jobs", "2", "--launcher", "slurm"]
    subprocess.run([sys.executable, str(ROOT / "research_main.py"), *flags], env=cluster.environment, check=True)


def running(cluster: Cluster, node: str) -> str:
    """Return the number of the job that runs on a node, nothing when none does."""
    return cluster.run("squeue", "-h", "-w", node, "-t", "running", "-o", "%A")


def test_sweep_outlives_a_node_and_a_time_limit_and_ends_in_the_bytes_of_a_local_one(tmp_path: Path, cluster: Cluster) -> None:
    launch(cluster)
    wait_until(lambda: len(list(tmp_path.glob("run/kd_alpha_*/checkpoint"))) == 2, PATIENCE_S)
    warned = running(cluster, "n1")
    # What Slurm does a minute before a job's time limit; scancel tries again where the job is back in the queue already.
    command = ["scancel", "--batch", "--signal", "USR1", warned]
    with subprocess.Popen(command, env=cluster.environment, stderr=subprocess.DEVNULL):
        cluster.kill_node("n2")
    wait_until(lambda: "Restarts=1" in cluster.run("scontrol", "show", "job", warned), PATIENCE_S)
    wait_until(lambda: not cluster.run("squeue", "-h"), PATIENCE_S)
    assert "DOWN" in cluster.run("scontrol", "show", "node", "n2")
    jobs = cluster.run("scontrol", "show", "job", "-o").splitlines()
    assert len([job for job in jobs if "JobState=COMPLETED" in job]) == 10, "\n".join(jobs)
    assert sum("Restarts=0" not in job for job in jobs) >= 2, "the dead node's task and the warned one"
    assert (tmp_path / "run" / "comparison" / "report.html").is_file()
    spread = {path.name: read_results(path) for path in tmp_path.glob("run/kd_alpha_*")}
    local = [sys.executable, str(ROOT / "research_main.py"), *SWEEP, "--output_dir", "local"]
    subprocess.run(local, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert len(spread) == 8
    assert spread == {path.name: read_results(path) for path in tmp_path.glob("local/kd_alpha_*")}
    assert not [path for path in [*tmp_path.glob("run/**/*.lock*"), *tmp_path.glob("cache/[a-z]*/*.lock*")]]


def test_cancelled_job_stays_cancelled(tmp_path: Path, cluster: Cluster) -> None:
    launch(cluster)
    wait_until(lambda: running(cluster, "n1") and list(tmp_path.glob("run/kd_alpha_*/config.json")), PATIENCE_S)
    cluster.run("scancel", "-u", "root")
    wait_until(lambda: not cluster.run("squeue", "-h"), PATIENCE_S)
    time.sleep(5)
    assert cluster.run("squeue", "-h") == ""
    states = {job.partition("JobState=")[2].split()[0] for job in cluster.run("scontrol", "show", "job", "-o").splitlines()}
    assert states <= {"COMPLETED", "CANCELLED"}
