"""A checkpoint that is loaded is one that was saved, whatever was killed, damaged or full in between."""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import multiprocessing
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fault_injection import file_size_limit

from research.storage.checkpoints import CheckpointFolder


def state_of(step: int) -> dict[str, object]:
    return {"student": {"weight": torch.full((64, 16), float(step))}, "progress": {"global_step": step}, "rng": None}


def loaded_step(folder: Path) -> int | None:
    """Return the step of what is loaded, having checked that all its parts belong to that step."""
    state = CheckpointFolder(folder).load()
    if state is None:
        return None
    step = state["progress"]["global_step"]
    assert torch.equal(state["student"]["weight"], torch.full((64, 16), float(step)))
    return step


def save_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        CheckpointFolder(folder).save(state_of(step), step)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"))


def put(folder: Path, step: int, content: bytes) -> Path:
    """Write a file whose name holds the right checksum of any content."""
    path = folder / f"step-{step:010d}.{hashlib.sha256(content).hexdigest()}.ckpt"
    path.write_bytes(content)
    return path


def flip_middle_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


class Hostile:
    """Runs code when it is unpickled without a guard."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.witness,)


def test_folder_without_checkpoints_loads_none(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "absent").load() is None


def test_newest_step_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 9, 10, 100)
    assert loaded_step(tmp_path) == 100
    assert [path.name.split(".")[0] for path in checkpoints(tmp_path)] == ["step-0000000010", "step-0000000100"]


def test_the_last_one_stands_alone(tmp_path: Path) -> None:
    save_steps(tmp_path, 9, 10)
    CheckpointFolder(tmp_path).save(state_of(11), 11, last=True)
    assert loaded_step(tmp_path) == 11 and len(checkpoints(tmp_path)) == 1


def test_the_last_of_each_process_leaves_the_one_before_it(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, of_each=True)
    for step in (9, 10, 11):
        folder.save(state_of(step), step, last=step == 11)
    assert len(checkpoints(folder.folder)) == 2


def test_saving_a_step_again_keeps_it_loadable(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 10)
    assert loaded_step(tmp_path) == 10


@pytest.mark.parametrize("damage", [flip_middle_byte, truncate_to_half, empty])
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    save_steps(tmp_path, 10, 20)
    newest = checkpoints(tmp_path)[-1]
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert loaded_step(tmp_path) == 10
    assert len(caplog.records) == 1
    assert str(newest) in caplog.text
    assert "bytes changed" in caplog.text


def test_checkpoint_renamed_to_another_content_is_not_trusted(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    older, newer = checkpoints(tmp_path)
    older.replace(newer)
    assert loaded_step(tmp_path) is None


def test_every_checkpoint_damaged_loads_none_with_a_warning_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 10, 20)
    for path in checkpoints(tmp_path):
        flip_middle_byte(path)
    with caplog.at_level(logging.WARNING):
        assert loaded_step(tmp_path) is None
    assert len(caplog.records) == 2


def test_damaged_checkpoint_does_not_crowd_out_a_good_one(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 30)
    flip_middle_byte(checkpoints(tmp_path)[-1])
    assert loaded_step(tmp_path) == 10
    save_steps(tmp_path, 20)
    flip_middle_byte(checkpoints(tmp_path)[-1])
    assert loaded_step(tmp_path) == 10


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"step": 1}, protocol=2), b"PK\x05\x06" + bytes(18)])
def test_whole_file_that_cannot_be_decoded_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    save_steps(tmp_path, 10)
    path = put(tmp_path, 20, content)
    with caplog.at_level(logging.WARNING):
        assert loaded_step(tmp_path) == 10
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert "\n" not in caplog.records[0].getMessage()


PICKLE_CODES = b".()]}0123ajtRbQqrhMKJGXUuse\x80\x85\x86\x87\x88\x8a\x81\x02\x00"
PICKLES = st.lists(st.sampled_from(PICKLE_CODES), max_size=30).map(lambda codes: b"\x80\x02" + bytes(codes))


def replace_pickle(archive: Path, content: bytes) -> bytes:
    """Return a checkpoint's bytes with another pickle inside, as a forger would make it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, content if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=60) | PICKLES, st.booleans())
@example(b"\x80\x02.", False)
@example(b"\x80\x02.", True)
@example(b"\x80\x02K", True)
@example(b"\x80\x02h\x00.", True)
@example(b"\x80\x02]}Ns.", True)
def test_no_forged_content_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, in_archive: bool
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_steps(folder, 10)
    put(folder, 20, replace_pickle(checkpoints(folder)[0], content) if in_archive else content)
    state = CheckpointFolder(folder).load()
    # A forged pickle may well be an empty dict; anything else is passed over.
    assert state == {} or loaded_step(folder) == 10


def test_checkpoint_that_is_no_state_is_passed_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    torch.save([1, 2], tmp_path / "list")
    put(tmp_path, 20, (tmp_path / "list").read_bytes())
    assert loaded_step(tmp_path) == 10


def test_hostile_checkpoint_runs_no_code(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    torch.save({"student": Hostile(witness)}, tmp_path / "hostile")
    torch.load(tmp_path / "hostile", weights_only=False)
    assert witness.exists(), "the attack itself does not work"
    witness.unlink()
    put(tmp_path, 20, (tmp_path / "hostile").read_bytes())
    assert CheckpointFolder(tmp_path).load() is None
    assert not witness.exists()


def test_full_disk_keeps_the_checkpoint_before_and_leaves_no_litter(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    before = sorted(tmp_path.iterdir())
    with file_size_limit(2000), pytest.raises(OSError, match="File too large"):
        save_steps(tmp_path, 30)
    assert sorted(tmp_path.iterdir()) == before
    assert loaded_step(tmp_path) == 20


def test_litter_of_a_killed_save_goes_with_the_next_one(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    (tmp_path / ".step-0000000020.00ff.ckpt.4242.tmp").write_bytes(b"half")
    save_steps(tmp_path, 20)
    assert sorted(tmp_path.iterdir()) == checkpoints(tmp_path)


def save_for_ever(folder: Path, first: int, pipe: Connection) -> None:
    for step in itertools.count(first):
        save_steps(folder, step)
        pipe.send(step)


def test_killed_at_any_moment_the_last_finished_save_or_a_newer_one_is_loaded(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    last = 0
    for kill in range(6):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(tmp_path, last + 1, sender))
        process.start()
        sender.close()
        receiver.poll(timeout=20)
        time.sleep(0.003 * kill)
        process.kill()
        process.join()
        finished = []
        while receiver.poll():
            try:
                finished.append(receiver.recv())
            except EOFError:
                break
        assert finished, "killed before anything was saved"
        step = loaded_step(tmp_path)
        assert step is not None
        assert step >= finished[-1]
        assert not list(tmp_path.glob("*.damaged"))
        last = step


def test_checkpoint_of_another_identity_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CheckpointFolder(tmp_path, "one table").save({"step": 1}, 1)
    assert CheckpointFolder(tmp_path, "an edited table").load() is None
    assert "other data" in caplog.text
