"""A Slurm of several one-core nodes on this machine, whose nodes can die: Debian's slurm-wlm, slurmctld, slurmd and munge.

Everything it starts carries a variable of its own in its environment, by which it is found and ended.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
PATHS = "/usr/sbin:/usr/bin:/sbin:/bin"
READY_S = 60
FIRST_PORT = 17000
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def find_obstacle() -> str | None:
    """Say why there can be no Slurm here, None when there can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in NEEDED if shutil.which(name, path=PATHS) is None]
    return f"not installed: {', '.join(missing)} (apt install slurm-wlm slurmctld slurmd munge)" if missing else None


class Cluster:
    """Nodes n1, n2, ... and their controller, from `start` to `stop`."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.conf = folder / "slurm.conf"
        mark = f"SLURM_UNDER_TEST={secrets.token_hex(8)}"
        self.mark = mark.encode()
        self.environment = os.environ | {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:{PATHS}"}
        self.environment |= dict([mark.split("=")])

    def start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munged.pid", "log-file": "munged.log"}
        flags = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self.run("munged", "--force", f"--seed-file={self.folder / 'munge.seed'}", *flags)
        host = socket.gethostname()
        lines = [CONFIG.format(host=host, port=FIRST_PORT, folder=self.folder)]
        for number, node in enumerate(self.nodes, 1):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={FIRST_PORT + number} CPUs=1 State=UNKNOWN"
            )
        self.conf.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.run("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(self.nodes)), READY_S)

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def run(self, *words: str) -> str:
        """Run a command of Slurm and return what it prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def processes(self, node: str | None = None) -> list[int]:
        """Return the processes of the cluster, or of a node: its daemon, and the jobs there with all they have started."""
        found = []
        for place in Path("/proc").iterdir():
            with suppress(OSError):  # it has ended
                if not place.name.isdigit() or self.mark not in (environment := (place / "environ").read_bytes().split(b"\0")):
                    continue
                line = (place / "cmdline").read_bytes().split(b"\0")
                there = f"SLURMD_NODENAME={node}".encode() in environment or line[1:3] == [b"-N", str(node).encode()]
                if line[0] and (node is None or there):
                    found.append(int(place.name))
        return found

    def kill_node(self, node: str) -> None:
        """Let a node die with all that runs on it."""
        self._kill(lambda: [*self.processes(node), *self._steps(node)])

    def stop(self) -> None:
        self._kill(self.processes)

    def _steps(self, node: str) -> list[int]:
        """Return the keepers of a node's jobs, whom only their sockets in the node's folder tell apart."""
        sockets = (self.folder / f"spool_{node}").glob(f"{node}_*.*")
        jobs = {path.name.removeprefix(f"{node}_").partition(".")[0] for path in sockets}
        keepers = {process: Path(f"/proc/{process}/cmdline") for process in self.processes()}
        found = []
        for process, line in keepers.items():
            with suppress(OSError):
                words = line.read_text(encoding="utf-8", errors="replace")
                found += [process] if words.startswith("slurmstepd: [") and words[13:].partition(".")[0] in jobs else []
        return found

    def _kill(self, processes: Callable[[], Sequence[int]]) -> None:
        """Kill until none is left, since a dying one may have just started another."""
        deadline = time.monotonic() + READY_S
        while found := processes():
            assert time.monotonic() < deadline, f"{found} cannot be killed"
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)


def wait_until(happened: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"it did not happen in {seconds:g} s"
        time.sleep(0.3)
