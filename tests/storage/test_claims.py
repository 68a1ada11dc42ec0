"""One process at a time holds a claim, and a dead one's goes to exactly one other, on any file system with exclusive names."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.builders import ROOT

from research.storage import claims
from research.storage.claims import Claim, Owner, read_record, remove_dead_claims, this_process

# Takes the claim time and again, and writes down when it does and when it lets go.
CONTENDER = """
import os, sys, time
from pathlib import Path
from research.storage.claims import Claim

def say(word):
    os.write(log, f"{word} {os.getpid()}\\n".encode())

place, rounds = Path(sys.argv[1]), int(sys.argv[2])
log = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
done = 0
while done < rounds:
    claim = Claim(place)
    if claim.acquire():
        say("takes")
        time.sleep(0.002)
        say("leaves")
        claim.release()
        done += 1
    else:
        time.sleep(0.001)
"""
# Holds a claim until it is killed.
HOLDER = """
import sys, time
from pathlib import Path
from research.storage.claims import Claim

assert Claim(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "entry.lock"


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def claimed_elsewhere(place: Path, silent_s: float = 0.0) -> Owner:
    """Leave the claim of a process on another machine that touched it some seconds ago."""
    owner = replace(this_process(), machine="another boot of another machine", host="node7")
    place.write_text(json.dumps(asdict(owner)), encoding="utf-8")
    then = place.stat().st_mtime - silent_s
    os.utime(place, (then, then))
    return owner


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def test_second_claim_is_refused_until_the_first_is_released_and_nothing_is_left(place: Path) -> None:
    first, second = Claim(place), Claim(place)
    assert first.acquire()
    assert not second.acquire()
    holder = second.holder()
    assert holder is not None and (holder.pid, holder.is_here) == (os.getpid(), True)
    first.release()
    assert second.holder() is None
    assert second.acquire()
    second.release()
    second.release()
    assert list(place.parent.iterdir()) == []


def test_claim_of_a_killed_process_is_free_at_once(place: Path) -> None:
    with start(HOLDER, place) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert not Claim(place).acquire()
        process.kill()
    claim = Claim(place)
    assert claim.holder() is None
    assert claim.acquire()
    assert len(claim.chain()) == 2
    claim.release()
    assert list(place.parent.iterdir()) == []


def test_number_of_a_dead_process_given_to_another_one_is_not_taken_for_it(place: Path) -> None:
    owner = this_process()
    assert owner.is_alive
    place.write_text(json.dumps(asdict(replace(owner, start="0"))), encoding="utf-8")
    assert Claim(place).acquire()


def test_silence_of_another_machine_is_measured_by_the_clock_of_the_file_system(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock is a day ahead, then a day behind."""
    now = time.time()
    for shift in (86400, -86400):
        monkeypatch.setattr(time, "time", lambda shift=shift: now + shift)
        claimed_elsewhere(place, silent_s=claims.STALE_S - 20)
        assert not Claim(place).acquire()
        claimed_elsewhere(place, silent_s=claims.STALE_S + 20)
        claim = Claim(place)
        assert claim.acquire()
        claim.release()


def test_owner_touches_its_claim_while_it_lives(place: Path) -> None:
    claim = Claim(place, heartbeat_s=0.02)
    assert claim.acquire()
    os.utime(place, (1, 1))
    wait_until(lambda: place.stat().st_mtime > 1)
    claim.release()


def test_owner_that_stood_still_learns_that_it_has_lost_and_leaves_the_new_one_alone(place: Path) -> None:
    """A record is put behind the owner's, as a machine does that has not seen it touched for long."""
    lost: list[Owner | None] = []
    told = threading.Event()

    def on_loss(_path: Path, owner: Owner | None) -> None:
        lost.append(owner)
        told.set()

    claim = Claim(place, on_loss, heartbeat_s=0.05)
    assert claim.acquire()
    record = read_record(place)
    assert record is not None
    new = claimed_elsewhere(place.with_name(f"{place.name}.{record.owner.token}"))
    assert told.wait(20)
    claim.release()
    assert lost == [new]
    assert Claim(place).holder() == new


def test_owner_whose_files_are_removed_learns_it(place: Path) -> None:
    told = threading.Event()
    claim = Claim(place, lambda _path, _owner: told.set(), heartbeat_s=0.05)
    assert claim.acquire()
    place.unlink()
    assert told.wait(20)


def test_process_that_has_lost_its_claim_ends_with_one_line(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from research.storage.claims import Claim\n"
        "Claim(Path(sys.argv[1]), heartbeat_s=0.05).acquire(); Path(sys.argv[1]).unlink(); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run.lock")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1 and "run.lock was removed; this process ends" in done.stderr


def test_of_two_that_see_the_same_dead_owner_one_takes_over(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one acts between this one's look and its deed."""
    claimed_elsewhere(place, silent_s=1000)
    faster, link = Claim(place), claims.create_exclusively

    def late(temporary: Path, target: Path) -> bool:
        monkeypatch.setattr(claims, "create_exclusively", link)
        assert faster.acquire()
        return link(temporary, target)

    monkeypatch.setattr(claims, "create_exclusively", late)
    assert not Claim(place).acquire()
    faster.release()
    assert list(place.parent.iterdir()) == []


def test_takeover_of_a_claim_that_was_released_meanwhile_is_void(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between this one's look and its deed the dead owner's claim is taken over and released, and a third one claims."""
    claimed_elsewhere(place, silent_s=1000)
    third, link = Claim(place), claims.create_exclusively

    def late(temporary: Path, target: Path) -> bool:
        monkeypatch.setattr(claims, "create_exclusively", link)
        second = Claim(place)
        assert second.acquire()
        second.release()
        assert third.acquire()
        return link(temporary, target)

    monkeypatch.setattr(claims, "create_exclusively", late)
    assert not Claim(place).acquire()
    third.release()
    assert list(place.parent.iterdir()) == []


def test_release_that_a_kill_cut_short_frees_the_claim(place: Path) -> None:
    for target in ("first", "second", "third"):
        program = (
            "import os, sys; from pathlib import Path; from research.storage.claims import Claim\n"
            "claim = Claim(Path(sys.argv[1])); assert claim.acquire(); calls = iter(['first', 'second', 'third'])\n"
            "Path.unlink = lambda path, missing_ok=False: "
            "os._exit(9) if next(calls) == sys.argv[2] else os.unlink(path)\n"
            "claim.release()"
        )
        done = subprocess.run([sys.executable, "-c", program, str(place), target], cwd=ROOT, check=False)
        assert done.returncode == 9
        claim = Claim(place)
        assert claim.holder() is None
        assert claim.acquire()
        claim.release()
        remove_dead_claims(place.parent)
        assert list(place.parent.iterdir()) == []


def test_file_system_without_hard_links_will_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first, second = Claim(place), Claim(place)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()
    assert list(place.parent.iterdir()) == []


def test_lost_answer_to_a_link_that_was_made_is_no_refusal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(*arguments: Any) -> None:
        link(*arguments)
        link(*arguments)

    monkeypatch.setattr(os, "link", twice)
    claim = Claim(place)
    assert claim.acquire()
    claim.release()
    assert list(place.parent.iterdir()) == []


def test_file_that_names_nobody_is_free_once_it_is_old(place: Path) -> None:
    """As earlier versions left them, and as a claim without hard links is for a moment."""
    place.touch()
    assert not Claim(place).acquire()
    then = time.time() - claims.STALE_S - 10
    os.utime(place, (then, then))
    remove_dead_claims(place.parent)
    assert list(place.parent.iterdir()) == []


def test_many_processes_never_hold_it_together_whoever_of_them_is_killed(tmp_path: Path) -> None:
    """Six take it over and over; three of them are killed while they do."""
    place, log = tmp_path / "work.lock", tmp_path / "log"
    doomed = [start(CONTENDER, place, 10**6, log) for _ in range(3)]
    steady = [start(CONTENDER, place, 30, log) for _ in range(3)]
    generator = random.Random(0)
    for process in doomed:
        wait_until(lambda process=process: log.exists() and f"takes {process.pid}\n" in log.read_text())  # type: ignore[misc]
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [process.wait(60) for process in steady] == [0, 0, 0]
    holder = None
    killed = {str(process.pid) for process in doomed}
    for line in log.read_text().splitlines():
        word, process_id = line.split()
        if word == "takes":
            assert holder is None or holder in killed, f"{process_id} took it from {holder}"
            holder = process_id
        else:
            assert holder == process_id
            holder = None
    assert log.read_text().count("leaves") >= 90
    # A process that was killed between making a file and writing into it left one that names nobody.
    then = time.time() - claims.STALE_S - 10
    for path in tmp_path.glob(".*.tmp"):
        if path.stat().st_size == 0:
            os.utime(path, (then, then))
    remove_dead_claims(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
