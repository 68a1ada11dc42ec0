"""Messages on stderr and in the log file, and how a phase says how far it is."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from research import logs
from research.logs import PhaseProgress, format_duration, log_to_file, start_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_phase(patch: pytest.MonkeyPatch, seconds_a_step: float, steps: int, done: int = 0) -> None:
    """Count the steps of a phase of 200, each of which takes some seconds."""
    now = [1000.0]
    patch.setattr(logs.time, "monotonic", lambda: now[0])
    with PhaseProgress("student training", 200, "steps", done) as progress:
        for _ in range(steps):
            now[0] += seconds_a_step
            progress.advance()


def test_phase_says_every_30_seconds_how_far_it_is_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run_phase(monkeypatch, 10.0, 7)
    assert caplog.messages == [
        "student training: 1 % (3 of 200 steps), 32 min 50 s left",
        "student training: 3 % (6 of 200 steps), 32 min 20 s left",
    ]


def test_time_left_of_a_resumed_phase_goes_by_the_steps_of_this_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run_phase(monkeypatch, 30.0, 1, done=198)
    assert caplog.messages == ["student training: 99 % (199 of 200 steps), 30 s left"]


def test_short_phase_says_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run_phase(monkeypatch, 0.1, 200)
    assert caplog.messages == []


def test_a_terminal_shows_a_bar_and_the_log_file_still_has_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    start_logging()
    with log_to_file(tmp_path / "run.log"):
        logs.log.info("begins")
        run_phase(monkeypatch, 30.0, 1)
    shown = terminal.getvalue()
    assert "begins" in shown and "student training:   0%|" in shown and "min" not in shown
    assert "student training: 0 % (1 of 200 steps), 1 h 39 min left" in (tmp_path / "run.log").read_text(encoding="utf-8")


def test_durations_are_as_exact_as_they_are_long() -> None:
    assert [format_duration(seconds) for seconds in (0.4, 59.4, 59.6, 200, 3599.6, 7500)] == [
        "0.4 s", "59 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
