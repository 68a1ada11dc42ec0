"""Processes that do one task after another, stop when they are told to, and never outlive the one that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from research.errors import StopRequest
from research.experiment.command import STOP_SIGNALS, answer_signals

SPAWN = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
MOST_TRIES = 2
POLL_S = 0.2  # how soon a stop is noticed
EXIT_S = 10.0
PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]
# perform(task, the worker's number, stop, say) returns the task's result; say(text) makes an event of a text.
Perform = Callable[[Any, int, StopRequest, Say], Any]


@dataclass(frozen=True)
class Event:
    """What happened to a task.

    Attributes:
        task: Its place among the tasks.
        kind: "said" comes with a text and "ended" with the result; "died" and "lost" with how the task's process
            ended. After "died" it is tried once more, after "lost" it is not.
    """

    task: int
    kind: Literal["started", "said", "ended", "died", "lost"]
    value: Any = None


class Worker:
    """One process, and the number of the task it is at."""

    def __init__(self, number: int, perform: Perform) -> None:
        self.task = -1
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=work, args=(theirs, perform, number))
        # Starting multiprocessing's tracker unblocks the signals, so it must be running before they are blocked.
        resource_tracker.ensure_running()
        # The new process inherits the mask: a signal waits until there is a handler for it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def dismiss(self, timeout_s: float = EXIT_S) -> int:
        """Wait for the process to end, and kill it if it does not; return its exit code."""
        self.pipe.close()
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


class Pool:
    """Tasks shared out to worker processes.

    A task whose process dies goes to the end of the queue, once. Once a stop is requested every worker is told
    by a SIGTERM and awaited.

    Args:
        perform: A function that another process can import.
    """

    def __init__(self, tasks: Sequence[Any], perform: Perform, num_workers: int, stop: StopRequest) -> None:
        self.tasks = tasks
        self.perform = perform
        self.num_workers = num_workers
        self.stop = stop
        self.waiting = deque(range(len(tasks)))
        self.tries: Counter[int] = Counter()
        self.workers: dict[int, Worker] = {}

    def run(self) -> Generator[Event, None, None]:
        """Do the tasks and yield what happens as it happens; closing the iterator kills what still runs."""
        told = False
        try:
            while True:
                if not self.stop.requested:
                    yield from self._start_workers()
                elif not told:
                    told = True
                    for worker in self.workers.values():
                        worker.process.terminate()
                if not self.workers:
                    return
                numbers = {worker.pipe: number for number, worker in self.workers.items()}
                for pipe in wait(list(numbers), POLL_S):
                    yield from self._listen(numbers[pipe])  # type: ignore[index]  # wait gives back what it was given
        finally:
            for worker in self.workers.values():
                worker.dismiss(0)

    def _start_workers(self) -> Iterator[Event]:
        for number in range(self.num_workers):
            if self.waiting and number not in self.workers:
                self.workers[number] = Worker(number, self.perform)
                yield self._give_task(self.workers[number])

    def _give_task(self, worker: Worker) -> Event:
        worker.task = self.waiting.popleft()
        self.tries[worker.task] += 1
        with suppress(OSError):  # of a process that has died meanwhile, which is noticed when it is listened to
            worker.pipe.send(self.tasks[worker.task])
        return Event(worker.task, "started")

    def _listen(self, number: int) -> Iterator[Event]:
        worker = self.workers[number]
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            del self.workers[number]
            yield from self._explain_death(worker.task, worker.dismiss())
            return
        yield Event(worker.task, kind, value)
        if kind != "ended":
            return
        if self.waiting and not self.stop.requested:
            yield self._give_task(worker)
        else:  # the memory of a worker without work is better used by the others
            del self.workers[number]
            worker.dismiss()

    def _explain_death(self, task: int, exit_code: int) -> Iterator[Event]:
        if self.stop.requested:
            return
        again = self.tries[task] < MOST_TRIES
        if again:
            self.waiting.append(task)
        yield Event(task, "died" if again else "lost", describe_exit(exit_code))


def describe_exit(code: int) -> str:
    """Say how a process ended, after its name."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


def work(pipe: Connection, perform: Perform, number: int) -> None:
    """Do what comes through the pipe; the whole life of a worker."""
    end_with_parent()
    stop = StopRequest(told_twice=True)
    answer_signals(stop)
    # An end of the pipe means that there is no more to do.
    with suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        while True:
            result = perform(pipe.recv(), number, stop, lambda text: pipe.send(("said", text)))
            if stop.requested:  # what a stopped task returns is no result of it
                return
            pipe.send(("ended", result))


def end_with_parent() -> None:
    """See to it that this process is killed when its parent is gone, even if that was killed itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    if sys.platform == "linux":  # at once, and whatever this process is doing
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Anywhere else, and for a parent that was gone before the line above.
    threading.Thread(target=watch, daemon=True).start()
