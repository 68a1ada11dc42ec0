"""Worker processes do their tasks, survive each other's deaths, stop when told and end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.builders import ROOT
from support.worker_tasks import answer, train

from research.errors import StopRequest
from research.experiment.command import STOP_SIGNALS, catching_signals
from research.experiment.workers import Event, Pool

PATIENCE_S = 30.0


def do(tasks: Sequence[Any], num_workers: int = 2) -> list[Event]:
    return list(Pool(tasks, answer, num_workers, StopRequest()).run())


def ends(events: Sequence[Event]) -> dict[int, tuple[str, Any]]:
    return {event.task: (event.kind, event.value) for event in events}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_task_is_started_and_ended_once_and_says_what_it_says() -> None:
    events = do([("say", "first"), ("return", 2), ("return", 3)])
    assert sorted((event.task, event.kind) for event in events) == sorted(
        [(0, "said"), *((task, kind) for task in range(3) for kind in ("started", "ended"))]
    )
    assert [event.value for event in events if event.kind == "said"] == ["first"]
    assert {event.value[:2] for event in events if event.kind == "ended"} == {("say", "first"), ("return", 2), ("return", 3)}


def test_killed_worker_costs_its_one_task_which_is_tried_once_more(tmp_path: Path) -> None:
    events = do([("kill self once", str(tmp_path / "died")), ("return", 1), ("return", 2)])
    assert {task: kind for task, (kind, _) in ends(events).items()} == {0: "ended", 1: "ended", 2: "ended"}
    assert [(event.task, event.value) for event in events if event.kind == "died"] == [(0, "was killed by SIGKILL")]


def test_task_that_kills_every_worker_is_given_up_and_the_others_end() -> None:
    events = do([("exit", 7), ("kill self", signal.SIGTERM), ("return", 2)])
    assert ends(events)[0] == ("lost", "ended with exit status 7")
    assert ends(events)[1][0] == "lost"
    assert ends(events)[2][0] == "ended"


@pytest.mark.parametrize("by", STOP_SIGNALS)
def test_stop_reaches_every_worker_which_leave_checkpoints_and_nothing_is_begun(tmp_path: Path, by: signal.Signals) -> None:
    """The signal goes to the workers too, as Ctrl-C in a terminal does, and must not count as a second one."""
    places = [tmp_path / name for name in "abc"]
    stop = StopRequest(heeded=True)
    pool = Pool([str(place) for place in places], train, 2, stop)
    kinds = []
    with catching_signals(stop), closing(pool.run()) as events:
        for event in events:
            kinds.append(event.kind)
            if kinds == ["started", "started"]:
                wait_until(lambda: all(place.exists() and place.read_text(encoding="utf-8") for place in places[:2]))
                for process in (os.getpid(), *(int(place.read_text(encoding="utf-8")) for place in places[:2])):
                    os.kill(process, by)
    assert kinds == ["started", "started"]
    assert [place.with_suffix(".checkpoint").exists() for place in places] == [True, True, False]
    assert not pool.workers


def test_closing_the_events_kills_what_still_runs(tmp_path: Path) -> None:
    place = tmp_path / "process"
    with closing(Pool([("sleep", str(place))], answer, 1, StopRequest()).run()) as events:
        assert next(events).kind == "started"
        wait_until(lambda: place.exists() and place.read_text(encoding="utf-8") != "")
    assert not is_alive(int(place.read_text(encoding="utf-8")))


@pytest.mark.parametrize("help_of_linux", [True, False])
def test_workers_end_when_their_parent_is_killed(tmp_path: Path, help_of_linux: bool) -> None:
    places = [tmp_path / "one", tmp_path / "other"]
    program = "import sys; from support.worker_tasks import main; main()"
    if not help_of_linux:
        # The new processes take their platform for another one.
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.platform = 'other'\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests")))}
    parent = subprocess.Popen([sys.executable, "-c", program, *map(str, places)], env=environment)
    wait_until(lambda: all(place.exists() and place.read_text(encoding="utf-8") for place in places))
    workers = [int(place.read_text(encoding="utf-8")) for place in places]
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(is_alive, workers)))
