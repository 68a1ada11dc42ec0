"""What is wrong, told in one line: the user's input before a run, and what can stop a run that began."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Exit statuses.
DONE, FAILED, BAD_INPUT, WEAK_TEACHER, INTERRUPTED = 0, 1, 2, 3, 130
JOINERS = "\u200c\u200d"
LONGEST_VALUE = 120
LONGEST_REASON = 300
ROWS_SHOWN = 8


class InputError(ValueError):
    """What the user supplied cannot be used: one line naming what was found, where, and what to do."""


class FlagErrors(InputError):
    """Every problem found in the flags, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(map(escape_controls, problems))
        super().__init__("\n".join(self.problems))


def list_problems(error: InputError) -> tuple[str, ...]:
    """Return what is wrong, one text a problem."""
    return error.problems if isinstance(error, FlagErrors) else (str(error),)


@contextmanager
def naming_flag(name: str) -> Iterator[None]:
    """Put the flag whose value is being used in front of what is wrong with it.

    Raises:
        InputError: as the code below it does, with `--name: ` before it.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"--{name}: {error}") from error


def escape_controls(text: str) -> str:
    """Return a text as one line without control characters, which a flag, a path or a cell may hold.

    The joiners that Bangla words are spelled with count as none.
    """
    return "".join(char if char.isprintable() or char in JOINERS else char.encode("unicode_escape").decode() for char in text)


def quote_value(value: Any, longest: int = LONGEST_VALUE) -> str:
    """Return a value as an error line shows it: on one line, and not at any length."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _shorten(repr(value), longest)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its class when it says nothing.

    Libraries go on with advice for programmers, which does not apply to a flag's value.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # "Class validation error for validator 'x':" is followed by the reason.
    text = " ".join(map(str.strip, lines[:2])) if lines[0].endswith(":") else lines[0]
    # A LookupError's text is the bare key, which reads as if it were the reason.
    text = f"{type(error).__name__} {text}" if isinstance(error, LookupError) else text
    return _shorten(escape_controls(text), LONGEST_REASON)


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "..."


class TrainingFault(RuntimeError):
    """Training cannot go on: one line naming the step, what was found and what to try."""


class WeakTeacher(Exception):
    """The teacher's validation macro-F1 is under --min_teacher_f1."""


class StoppedElsewhere(Exception):
    """Another process of the same run has stopped it and says why."""


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint has been written."""


@dataclass
class StopRequest:
    """Set by a signal handler; the trainer looks at it between steps.

    Attributes:
        requested: Whether a signal has come.
        heeded: True while someone does look at it, so that a handler knows when to stop the process by itself.
        told_twice: Whether a second signal says nothing new: a sweep's worker hears a Ctrl-C from the terminal
            and again from its parent, and must not take that for a user who will not wait for the step.
    """

    requested: bool = False
    heeded: bool = False
    told_twice: bool = False


def describe_fault(step: int, names: Sequence[str], values: Iterable[float], bad: Iterable[bool], rows: Tensor) -> str:
    """Say which components of a step's loss, or its gradient norm, are not finite, and on which rows."""
    found = [f"{name} is {value:g}" for name, value, is_bad in zip(names, values, bad, strict=False) if is_bad]
    causes = [entry for entry in found if not entry.startswith(("total_loss", "grad_norm"))] or found
    shown = ", ".join(str(int(row)) for row in rows[:ROWS_SHOWN]) + (", ..." if len(rows) > ROWS_SHOWN else "")
    return (
        f"step {step}: {', '.join(causes)}; the weights are those before this step. Rows {shown}. "
        "Try a lower --lr, --no-amp or a lower --gradient_clip_norm."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch's allocator for the CPU has no error of its own."""
    if isinstance(error, MemoryError):
        return True
    # A torch error can only come from a torch that is loaded; reading a table must not load it.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def naming_lack_of_memory(step: int, batches: Sequence[dict[str, Tensor]]) -> Iterator[None]:
    """Turn running out of memory in a step into an error that says how large the step was.

    Raises:
        TrainingFault: memory ran out; any other error passes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        rows = max(len(batch["labels"]) for batch in batches)
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        raise TrainingFault(
            f"step {step}: out of memory with a batch of {rows} rows, the longest of {longest} tokens. Lower --batch "
            "(--gradient_accumulation makes up for it) or --max_length, in another --output_dir; if others took the "
            "memory, the same command goes on from the last checkpoint."
        ) from error


def is_process_lost(error: BaseException) -> bool:
    """Whether another process of the run ended while this one was waiting for it.

    gloo and nccl raise what they like for that, and name themselves in the text.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or any(name in str(error) for name in ("gloo", "Gloo", "NCCL"))


def describe_lost_process() -> str:
    """Say that the run cannot go on without its other processes, and how it will."""
    return (
        "another process of this run ended or does not answer, so this one stops; what that one said, if anything, stands "
        "beside this line. The same command goes on from the last checkpoint."
    )


def describe_lack_of_memory(max_length: int) -> str:
    """Say what to do when memory ran out outside training, where --batch has no say."""
    return (
        f"out of memory while a model was run without training, on rows of up to --max_length {max_length} tokens. Free "
        "memory and run the same command again, which goes on from here, or lower --max_length in another --output_dir."
    )


def describe_os_error(error: OSError, folder: str) -> str:
    """Say which file could not be written or read, and that nothing is lost."""
    # numpy's own error for a short write carries no number.
    what = error.strerror or f"a write came to a stop, as on a full disk ({error})"
    return (
        f"{what}: {error.filename or folder}. Make room or mend it, then run the same command again: it goes on from the "
        "last checkpoint."
    )
