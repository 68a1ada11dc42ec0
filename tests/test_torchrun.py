"""Several processes compute what one does, act together, and leave one run behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import ROOT
from support.fault_injection import FLAGS, attempt, build_inputs, copy_inputs, find_litter, read_results, stop_half_way
from support.processes import Ranks, launch, said
from support.shared_steps import (
    CASES,
    build_loader,
    differ,
    shard_teacher,
    take_all_steps,
    take_steps,
    take_steps_of_teacher,
)

from research.components import COMPONENT_NAMES
from research.distributed import ALONE, World, check_launch
from research.errors import InputError
from research.models.saved import load_classifier
from research.settings.search import smallest_batch
from research_config import ExperimentConfig


@pytest.fixture(scope="module", params=[(2, 5), (3, 4)], ids=["2 processes", "3 processes, one without a row at times"])
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """Return where processes left the losses and weights of every case, how many there were and their batch."""
    folder, (size, batch) = tmp_path_factory.mktemp("steps"), request.param
    assert Ranks(size, take_all_steps, folder, batch).wait() == [0] * size
    return folder, size, batch


@pytest.mark.parametrize("name", CASES)
def test_processes_take_the_steps_of_one_process(name: str, steps: tuple[Path, int, int]) -> None:
    folder, size, batch = steps
    expected = take_steps(ALONE, CASES[name], batch)
    of_ranks = [dict(np.load(folder / f"{list(CASES).index(name)}_{rank}.npz")) for rank in range(size)]
    # The excess is a difference of two losses of about 11, each of them equal to 1e-6 of itself.
    tolerances = [1e-6 * expected["losses"][:, 1].max() if name == "soft_excess" else 1e-6 for name in COMPONENT_NAMES]
    for column, tolerance in enumerate(tolerances):
        left, right = of_ranks[0]["losses"][:, column], expected["losses"][:, column]
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=tolerance)
    # Gradients cancel: their norm is some digits less exact, most of all that of a correlation of nearly equal logits.
    np.testing.assert_allclose(of_ranks[0]["losses"][:, -1], expected["losses"][:, -1], rtol=1e-5)
    # A step of Adam is up to lr = 1e-3 however small the gradient, so rounding shows where that is next to nothing.
    np.testing.assert_allclose(of_ranks[0]["weights"], expected["weights"], rtol=0, atol=1e-4)
    assert np.ptp(expected["losses"][:, 0]) > 1e-3, "a training that does not move proves nothing"
    for other in of_ranks[1:]:
        np.testing.assert_array_equal(other["losses"], of_ranks[0]["losses"])
        np.testing.assert_array_equal(other["weights"], of_ranks[0]["weights"])


def test_shares_of_a_batch_add_up_to_one_and_are_what_an_independent_count_finds() -> None:
    class Second(World):
        rank, size = 1, 2

        def split(self, items: Any) -> Any:
            return items[1::2]

    loader = build_loader(Second(), batch=5, two_tokenizers=True)
    whole = build_loader(ALONE, batch=5, two_tokenizers=True)
    for part, full in zip(loader.iterate(0), whole.iterate(0), strict=True):
        taken = np.isin(full["row"].numpy(), part["row"].numpy())
        positions = full["student_words"].numpy().max(axis=1) + 1
        known = np.isfinite(full["labels"].numpy()).sum(axis=1)
        for name, counts in {"rows": np.ones(5), "known": known, "positions": positions, "pairs": positions**2}.items():
            counts = counts[: len(taken)]
            assert part[f"{name}_share"].item() == pytest.approx(counts[taken].sum() / counts.sum())
        np.testing.assert_array_equal(part["whole_rows"].numpy(), full["row"].numpy())


@dataclasses.dataclass(frozen=True)
class Lab:
    """A table and two models, and an undisturbed run of two processes on them."""

    folder: Path
    inputs: Path
    expected: dict[str, bytes]

    def place(self, name: str) -> Path:
        return copy_inputs(self.inputs, self.folder / name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    inputs = build_inputs(folder / "inputs")
    whole = copy_inputs(inputs, folder / "whole")
    assert launch(whole, FLAGS).wait() == [0, 0], said(whole)
    return Lab(folder, inputs, read_results(whole / "run"))


def wait_for(found: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not found():
        assert time.monotonic() < until, "it did not come so far"
        time.sleep(0.005)


def signal_half_way(
    place: Path, rank: int, number: signal.Signals, phase: str = "run/checkpoint", flags: Sequence[str] = FLAGS
) -> list[int | None]:
    """Send a signal to one of two processes after some steps of the student, or of a teacher in the cache."""
    ranks = launch(place, flags)
    wait_for(lambda: list(place.glob(f"{phase}/step-*[2-9].*.ckpt")))
    pid = ranks.processes[rank].pid
    assert pid is not None
    os.kill(pid, number)
    return ranks.wait()


def test_first_process_speaks_and_writes_for_all(lab: Lab) -> None:
    whole = lab.folder / "whole"
    assert said(whole).count("1 thread in each of 2 processes") == 1
    assert said(whole, 1) == "" and (whole / "stdout_1.txt").read_text() == ""
    assert (whole / "stdout_0.txt").read_text().startswith("run ")
    environment = json.loads((whole / "run" / "environment.json").read_text())
    assert environment["num_processes"] == 2
    assert environment["command_line"][:5] == ["torchrun", "--nproc_per_node", "2", "research_main.py", "--dataset_path"]
    assert not find_litter(whole) and not list(whole.glob("run/.teacher_processes"))


def test_teacher_outputs_are_bit_equal_to_those_of_one_process(lab: Lab) -> None:
    """One teacher, asked by one process and by two: every row is computed in the same batch."""
    kept: dict[str, list[dict[str, bytes]]] = {}
    flags = [*FLAGS, "--teacher_checkpoint", str(lab.folder / "whole" / "run" / "teacher")]
    for name in ("asked by one", "asked by two"):
        place = lab.place(name)
        if name == "asked by one":
            assert attempt(place, flags).status == 0
        else:
            assert launch(place, flags).wait() == [0, 0], said(place)
        for kind in ("logits", "layers"):
            entries = sorted(path.parent for path in place.glob(f"cache/{kind}/*/manifest.json"))
            files = {f"{entry.name}/{path.name}": path.read_bytes() for entry in entries for path in entry.iterdir()}
            assert files
            kept.setdefault(kind, []).append(files)
    for one, two in kept.values():
        assert one == two


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_teacher_takes_the_steps_and_gives_the_logits_of_a_whole_one(size: int, tmp_path: Path) -> None:
    """With a checkpoint half way, of which each process keeps its own pieces."""
    expected = take_steps_of_teacher(ALONE, tmp_path / "alone", sharded=False)
    assert Ranks(size, shard_teacher, tmp_path).wait() == [0] * size
    of_ranks = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(size)]
    for found in of_ranks:
        np.testing.assert_allclose(found["losses"][:, :-1], expected["losses"][:, :-1], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found["losses"][:, -1], expected["losses"][:, -1], rtol=1e-5)
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["weights"], expected["weights"], rtol=0, atol=1e-4)
        # A row of a matrix is not cut, so pieces differ by a few rows.
        assert found["held"] < expected["held"] * (1 / size + 0.06)
    assert sum(found["held"] for found in of_ranks) == expected["held"]
    assert np.ptp(expected["losses"][:, 0]) > 1e-3, "a training that does not move proves nothing"


def test_run_of_a_sharded_teacher_goes_on_where_it_was_killed_and_leaves_an_ordinary_teacher(lab: Lab) -> None:
    flags = [*FLAGS, "--shard_teacher", "--cache_budget_gb", "0"]
    whole, killed = lab.place("sharded"), lab.place("sharded, killed")
    assert launch(whole, flags).wait() == [0, 0], said(whole)
    assert "the teacher runs live" in said(whole)
    ranks = launch(killed, flags)
    wait_for(lambda: list(killed.glob("cache/teachers/*.work/process_1/step-*[2-9].*.ckpt")))
    os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)
    ranks.wait()
    assert launch(killed, flags).wait() == [0, 0], said(killed)
    assert "teacher: resuming at step" in said(killed)
    assert read_results(killed / "run") == read_results(whole / "run")
    assert not find_litter(whole) and not find_litter(killed)
    folders = [place / "run" / "teacher" for place in (whole, lab.folder / "whole")]
    saved, plain = (load_classifier(str(folder)).model.state_dict() for folder in folders)
    assert saved.keys() == plain.keys()
    # The same steps, dropout included, but for sums in another order.
    assert all(torch.allclose(tensor, plain[name], rtol=0, atol=1e-3) for name, tensor in saved.items())
    assert set(json.loads((whole / "run" / "efficiency.json").read_text())) == {"student"}


def test_outputs_of_a_sharded_teacher_are_bit_equal_to_those_of_a_whole_one(lab: Lab) -> None:
    flags = [*FLAGS, "--epochs", "1", "--teacher_checkpoint", str(lab.folder / "whole" / "run" / "teacher")]
    kept = {}
    for name, further in {"whole": [], "in pieces": ["--shard_teacher", "--student_init", "teacher"]}.items():
        place = lab.place(f"outputs {name}")
        assert launch(place, [*flags, *further]).wait() == [0, 0], said(place)
        # Under other names, since the second student reads the teacher's tokens, of which no words have to be known.
        kept[name] = {path.read_bytes() for path in place.glob("cache/logits/*/logits.npy")}
    assert kept["whole"] == kept["in pieces"] and len(kept["whole"]) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_run_whose_process_is_killed_stops_in_one_line_and_goes_on_to_the_same_bytes(rank: int, lab: Lab) -> None:
    place = lab.place(f"killed {rank}")
    ends = signal_half_way(place, rank, signal.SIGKILL)
    assert ends[rank] == -signal.SIGKILL and ends[1 - rank] == 1
    assert said(place, 1 - rank).count("error: another process of this run ended") == 1
    assert "Traceback" not in said(place, 1 - rank)
    assert launch(place, FLAGS).wait() == [0, 0], said(place)
    assert "student: resuming at step" in said(place)
    assert read_results(place / "run") == lab.expected and not find_litter(place)


def test_signal_to_one_process_stops_all_after_the_step_and_nothing_is_lost(lab: Lab) -> None:
    place = lab.place("told")
    assert signal_half_way(place, 1, signal.SIGTERM, "cache/teachers/*.work") == [130, 130], said(place)
    assert said(place).count("interrupted: the same command goes on from here") == 1
    assert launch(place, FLAGS).wait() == [0, 0], said(place)
    assert "teacher: resuming at step" in said(place)
    assert read_results(place / "run") == lab.expected


def test_processes_read_the_same_views_and_go_on_with_them(lab: Lab) -> None:
    flags, results = [*FLAGS, "--augment", "1"], {}
    for name in ("views", "views, killed", "views, alone"):
        place = lab.place(name)
        if "killed" in name:
            signal_half_way(place, 1, signal.SIGKILL, flags=flags)
        if "alone" in name:
            assert attempt(place, flags).status == 0
        else:
            assert launch(place, flags).wait() == [0, 0], said(place)
        results[name] = read_results(place / "run")
        results[name]["views"] = next(place.glob("cache/views/*/views.jsonl")).read_bytes()
    assert "student: resuming at step" in said(lab.folder / "views, killed")
    assert results["views"] == results["views, killed"]
    assert results["views"]["views"] == results["views, alone"]["views"]
    together, alone = (read_losses(results[name]["history.csv"]) for name in ("views", "views, alone"))
    np.testing.assert_allclose(together, alone, rtol=1e-3)


def read_losses(history: bytes) -> Any:
    return np.genfromtxt(history.decode().splitlines(), delimiter=",", names=True)["total_loss"]


def test_run_of_two_processes_goes_on_in_one_and_back_with_its_teacher(lab: Lab) -> None:
    place = lab.place("moved")
    signal_half_way(place, 0, signal.SIGTERM)
    assert "to compute: student" in (one := attempt(place, kill_after_s=None)).errors and one.status == 0
    assert "student: resuming at step" in one.errors and "fine-tuning the teacher" not in one.errors
    teacher = next((lab.folder / "whole" / "run" / "teacher").rglob("*.safetensors")).relative_to(lab.folder / "whole")
    assert (place / teacher).read_bytes() == (lab.folder / "whole" / teacher).read_bytes()
    half = stop_half_way(lab.folder, lab.inputs, attempt(lab.place("back")))
    assert launch(half, FLAGS).wait() == [0, 0], said(half)
    assert "student: resuming at step" in said(half) and "fine-tuning the teacher" not in said(half)


def test_fault_of_the_training_stops_all_in_one_line(lab: Lab) -> None:
    place = lab.place("fault")
    assert launch(place, [*FLAGS, "--lr", "1e30"]).wait() == [1, 1]
    assert "step" in said(place).splitlines()[-1] and said(place).count("error: ") == 1
    assert said(place, 1) == ""


def test_what_one_process_cannot_use_is_said_by_the_first_before_anything_is_written(lab: Lab) -> None:
    place = lab.place("flags")
    assert launch(place, [*FLAGS, "--student_path", "models/nowhere"]).wait()[0] == 2
    assert said(place).count("error: ") == 1 and said(place, 1) == ""
    assert not (place / "run").exists()
    assert launch(place, [*FLAGS, "--sweep", "seed=1,2"]).wait() == [2, 2]
    assert said(place).splitlines()[-1].startswith("error: --sweep: torchrun starts several processes for one run")


def test_processes_that_differ_are_refused(tmp_path: Path) -> None:
    assert Ranks(2, differ, tmp_path).wait() == [0, 0]
    assert "device: process 1 of 2 has cuda, process 0 has cpu" in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == "StoppedElsewhere "


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"batch": 1}, "--batch: 1 rows cannot be shared by the 2"),
        ({"search": ("batch=8,1",)}, "--batch: 1 rows cannot be shared by the 2"),
        ({"device": "cuda:1"}, "--device: each process takes the card"),
    ],
)
def test_flags_that_processes_cannot_share_are_refused(
    flags: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(ExperimentConfig(), **flags)
    smallest = smallest_batch(config)
    check_launch(config, smallest)
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=found):
        check_launch(config, smallest)


def test_sharding_over_one_process_is_refused() -> None:
    with pytest.raises(InputError, match="--shard_teacher: .* start it as torchrun --nproc_per_node N"):
        check_launch(dataclasses.replace(ExperimentConfig(), shard_teacher=True), 32)


def test_torchrun_itself_runs_the_folds_of_a_teacher_that_runs_live(lab: Lab) -> None:
    place = lab.place("torchrun")
    flags = [*FLAGS, "--num_folds", "2", "--cache_budget_gb", "0", "--epochs", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(ROOT / "research_main.py"), *flags]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["run"]
    assert done.stderr.count("fold 2 of 2") == 1 and done.stderr.count("the teacher runs live") == 2
    assert (place / "run" / "fold_2" / "metrics.json").is_file() and not find_litter(place)
