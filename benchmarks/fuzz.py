"""Give the command thousands of bad tables, configs and model folders: each is read or refused in lines of its own, fast.

python benchmarks/fuzz.py --cases 10000
python benchmarks/fuzz.py --cases 0 --models 2000

Tables come in every text format with broken cells, quotes, encodings and bytes, configs as flags, JSON values
and bytes; the strategies are those of the tests. Model folders: see fuzz_models.py. What must not happen: an
exception other than InputError, a message of more than one line, a file left behind, or more than a few
seconds for a case. Prints one JSON line.

With --limits N, so many runs get a file-size limit at a write, as on a disk that fills up then: each has to end in
one error line, and the same command without the limit in the bytes of a run that nothing happened to. Exit status
1 when one ended otherwise, or a load of a model folder in a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("", "tests")]

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.configuration import set_hypothesis_home_dir  # noqa: E402
from support.fault_injection import attempt, build_inputs, copy_inputs, limit_runs, read_results  # noqa: E402
from support.strategies import ARGUMENTS, FIELDS, JSON_VALUES, TABLE_BYTES  # noqa: E402

from research.errors import FlagErrors, InputError  # noqa: E402
from research.experiment.dataset import load_dataset  # noqa: E402
from research.flags import HelpAsked  # noqa: E402
from research_config import parse_arguments  # noqa: E402

HANG_S = 20
OUTCOMES = ("refused", "accepted", "help")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".xlsx", ".parquet", ".txt", "")
LIKELY_SUFFIXES = (".csv", ".csv", ".tsv", ".jsonl")
NAMES = st.sampled_from(["text", "Text", "comment", "bully", "spam", "threat", "", "a b", '"', "১", "text "])
CELLS = st.sampled_from(
    ["0", "1", "", "1.0", "0.5", "yes", "nan", "-1", "2", "ভালো", "a,b", 'say "no"', "\x00", "\u200d", "x" * 300]
    + ["no", "true", "০", "a|b", '["a"]', "['a'", ";", "a;b"]
)
ENCODINGS = (*["utf-8"] * 6, "utf-8-sig", "utf-16", "latin-1")
LINE_ENDS = (*["\n"] * 4, "\r\n", "\r")
DELIMITERS = {".csv": (",", ",", ",", ";", "|", "\t"), ".tsv": ("\t", "\t", "\t", ",")}
ROW_COUNTS = (60, 30, 8, 2, 0)
TABLE_FLAGS: tuple[str, ...] = (
    "--text_column",
    "--label_columns",
    "--val_fraction",
    "--test_fraction",
    "--num_folds",
    "--text_normalization",
)
TABLE_FLAGS += ("--label_list_column", "--label_list_column", "--label_separator")
VALUES = st.sampled_from(["text", "bully", "spam", "none", "|", "space", "nfkc", "0", "0.5", "0.99", "3", "-1", "x"])


@st.composite
def tables(draw: st.DrawFn) -> tuple[bytes, str]:
    """Draw a table and its suffix that are nearly right, then break some of its cells, its encoding and its bytes."""
    suffix = draw(st.sampled_from(LIKELY_SUFFIXES))
    table = [["text", *draw(st.lists(NAMES, max_size=3, unique=draw(st.integers(0, 5)) > 0))]]
    labels = len(table[0]) - 1
    table += [
        [f"comment {number}", *(str(number * (place + 1) % 3 % 2) for place in range(labels))]
        for number in range(draw(st.sampled_from(ROW_COUNTS)))
    ]
    for _ in range(draw(st.sampled_from((0, 0, 1, 2)))):
        cells = table[draw(st.integers(0, len(table) - 1))]
        place = draw(st.integers(0, len(cells)))
        cells[place : place + draw(st.sampled_from((1, 1, 1, 0)))] = [draw(CELLS)]
    if suffix == ".jsonl":
        lines = [json.dumps(dict(zip(table[0], cells, strict=False)), ensure_ascii=False) for cells in table[1:]]
    else:
        delimiter = draw(st.sampled_from(DELIMITERS[suffix]))
        lines = [delimiter.join(cells) for cells in table]
    content = draw(st.sampled_from(LINE_ENDS)).join(lines).encode(draw(st.sampled_from(ENCODINGS)), errors="replace")
    if content and draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + draw(st.binary(max_size=3)) + content[place + draw(st.integers(0, 3)) :]
    return content, suffix


class Cases:
    """Runs cases in a folder and counts how they end.

    Args:
        folder: The current one, empty but for what a case puts there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0

    def run(self, argv: list[str], files: dict[str, bytes]) -> None:
        """Read flags and tables as a run does before it writes anything, and assert what must hold."""
        # What a case that failed has left would fail all that follow.
        for path in self.folder.iterdir():
            path.unlink()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        started = time.monotonic()
        with failing_after(HANG_S), contextlib.redirect_stdout(io.StringIO()):
            outcome = self.read(argv)
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        assert outcome in OUTCOMES, outcome
        self.outcomes[outcome] += 1
        left = {path.name for path in self.folder.iterdir()}
        assert left == set(files), f"{argv} left {left - set(files)} behind"

    def read(self, argv: list[str]) -> str:
        try:
            config = parse_arguments(argv).config
            load_dataset(config, 0 if config.num_folds > 1 else None)
        except InputError as error:
            problems = error.problems if isinstance(error, FlagErrors) else [str(error)]
            assert problems and all(len(problem.splitlines()) == 1 for problem in problems), problems
            return "refused"
        except HelpAsked:
            return "help"
        return "accepted"


@contextlib.contextmanager
def failing_after(seconds: int, error: type[BaseException] = AssertionError) -> Iterator[None]:
    def fail(_number: int, _frame: Any) -> None:
        raise error(f"still busy after {seconds} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def get_flag(pair: tuple[str, str]) -> str:
    return pair[0]


def fuzz(cases: Cases, count: int) -> dict[str, int]:
    """Run `count` cases, spread over what is fuzzed; return how many of each there were."""
    pairs = st.tuples(st.sampled_from(TABLE_FLAGS), VALUES)
    no_flags: st.SearchStrategy[list[tuple[str, str]]] = st.just([])
    flags = no_flags | no_flags | st.lists(pairs, max_size=2, unique_by=get_flag)
    objects = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON_VALUES, max_size=6)

    def table(drawn: tuple[bytes, str], given_flags: list[tuple[str, str]]) -> None:
        content, suffix = drawn
        name = f"table{suffix}"
        cases.run(["--dataset_path", name, *(word for pair in given_flags for word in pair)], {name: content})

    def config_object(content: dict[str, Any]) -> None:
        cases.run(["--config", "fuzz.json"], {"fuzz.json": json.dumps(content).encode()})

    def config_bytes(content: bytes) -> None:
        cases.run(["--config", "fuzz.json"], {"fuzz.json": content})

    def arguments(argv: list[str]) -> None:
        cases.run(argv, {})

    plans: dict[str, tuple[float, Callable[..., None], tuple[Any, ...]]] = {
        "nearly right tables": (0.4, table, (tables(), flags)),
        "tables of any bytes": (0.2, table, (st.tuples(TABLE_BYTES, st.sampled_from(SUFFIXES)), flags)),
        "config objects": (0.2, config_object, (objects,)),
        "config files of any bytes": (0.05, config_bytes, (st.binary(max_size=60),)),
        "arguments": (0.15, arguments, (st.lists(ARGUMENTS, max_size=8),)),
    }
    done = {}
    for name, (share, check, strategies) in plans.items():
        before = cases.outcomes.total()
        run_examples(check, strategies, max(1, round(share * count)))
        done[name] = cases.outcomes.total() - before
    return done


def run_examples(check: Callable[..., None], strategies: tuple[Any, ...], wanted: int) -> None:
    """Check that many examples; hypothesis makes the smallest of one that fails."""
    options = settings(
        max_examples=wanted,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    options(given(*strategies)(check))()


def limit_files(wanted: int) -> dict[str, Any]:
    """Run with a file-size limit so many times; a run that ended otherwise than it has to is kept."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-limits-"))
    inputs = build_inputs(folder / "inputs")
    untouched = copy_inputs(inputs, folder / "untouched")
    reference = attempt(untouched)
    assert reference.status == 0, reference.errors
    result = limit_runs(folder, inputs, untouched, reference, read_results(untouched / "run"), wanted)
    if result["limits_that_differ"]:
        print(f"what they left stands in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="how many tables and configs (default: %(default)s)")
    parser.add_argument("--models", type=int, default=0, help="how many loads of damaged model folders (default: none)")
    parser.add_argument("--limits", type=int, default=0, help="how many runs get a file-size limit (default: none)")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        set_hypothesis_home_dir(Path(folder) / "hypothesis")
        home, cases = os.getcwd(), Cases(Path(folder) / "cases")
        cases.folder.mkdir()
        os.chdir(cases.folder)
        try:
            done = fuzz(cases, arguments.cases) if arguments.cases else {}
        finally:
            os.chdir(home)
        if arguments.models:
            # Imports torch, which the cases above must not need.
            from fuzz_models import fuzz_models

            models = fuzz_models(arguments.models, Path(folder) / "models", failing_after)
        else:
            models = {"tracebacks": 0}
    result = {
        "benchmark": "fuzz",
        "cases": cases.outcomes.total(),
        "by_kind": done,
        **{name: cases.outcomes[name] for name in OUTCOMES},
        "models": models,
        "tracebacks": models["tracebacks"],  # the first of a table or config ends this program
        "slowest_s": round(cases.slowest_s, 2),
        **(limit_files(arguments.limits) if arguments.limits else {}),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result))
    return 1 if result.get("limits_that_differ") or models["tracebacks"] else 0


if __name__ == "__main__":
    sys.exit(main())
