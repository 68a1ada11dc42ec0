"""A model is known by what its files hold, links followed, and no weights pass under another's hash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import build_encoder, build_hub_cache

from research.errors import InputError
from research.models import fingerprint
from research.models.encoders import load_encoder
from research.models.fingerprint import (
    ModelFiles,
    check_unchanged,
    find_model_folder,
    load_settled,
    read_model_files,
    read_records,
    resolve_model_folder,
)

VOCABULARY = 50


def change_weights(path: Path, factor: float = 2.0) -> None:
    """Write other weights of the same size into the very same file."""
    other = path.with_name("other")
    save_file({name: tensor * factor for name, tensor in load_file(path).items()}, other, {"format": "pt"})
    content = other.read_bytes()
    other.unlink()
    assert len(content) == path.stat().st_size
    with open(path.resolve(), "r+b") as file:
        file.write(content)


def link_files(folder: Path, store: Path) -> Path:
    """Move a folder's files away and leave links to them, as the hub's cache does with its blobs."""
    store.mkdir()
    for path in list(folder.iterdir()):
        path.rename(store / path.name)
        path.symlink_to(os.path.relpath(store / path.name, folder))
    return folder


def link_folder(folder: Path, store: Path) -> Path:
    folder.rename(store)
    folder.symlink_to(store)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_encoder("bert", tmp_path / "model", VOCABULARY, seed=1)


def test_fingerprint_changes_with_the_weights_and_not_with_the_readme(model: Path) -> None:
    before = read_model_files(str(model))
    (model / "README.md").write_text("a model", encoding="utf-8")
    assert read_model_files(str(model)).sha256 == before.sha256
    change_weights(model / "model.safetensors")
    assert read_model_files(str(model)).changed_since(before.files) == ["model.safetensors"]


@pytest.mark.parametrize("part", ["", "encoder", "sequence_classifier", "tokenizer"])
@pytest.mark.parametrize("link", [link_files, link_folder])
def test_weights_behind_a_link_are_part_of_it(model: Path, tmp_path: Path, part: str, link: Callable[[Path, Path], Path]) -> None:
    folder = model
    if part:
        folder = tmp_path / "checkpoint" / part
        folder.parent.mkdir()
        model.rename(folder)
    root = folder.parent if part else folder
    link(folder, tmp_path / "store")
    before = read_model_files(str(root))
    weights = "/".join(filter(None, (part, "model.safetensors")))
    assert weights in before.files
    change_weights(tmp_path / "store" / "model.safetensors")
    assert read_model_files(str(root)).changed_since(before.files) == [weights]


def test_link_to_its_own_folder_ends(model: Path) -> None:
    (model / "encoder").symlink_to(model)
    assert {Path(file).name for file in read_model_files(str(model)).files} == {"config.json", "model.safetensors"}


def test_checkpoints_and_optimizer_of_a_trainer_are_no_part_of_it(model: Path) -> None:
    before = read_model_files(str(model))
    shutil.copytree(model, model / "checkpoint-500")
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json"):
        (model / name).write_bytes(b"of the trainer")
    assert read_model_files(str(model)) == before


def test_files_are_hashed_again_only_where_size_time_or_inode_has_moved(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = fingerprint.hash_file
    monkeypatch.setattr(fingerprint, "hash_file", lambda path: hashed.append(path.name) or real(path))  # type: ignore[func-returns-value]
    first = read_model_files(str(model))
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    read_model_files(str(model))
    fingerprint._hash_once.cache_clear()  # as in another process
    read_model_files(str(model), known=read_records(json.loads(json.dumps(first.describe()))))
    assert len(hashed) == 2
    os.utime(model / "model.safetensors")
    assert read_model_files(str(model), known=first.files).changed_since(first.files) == []
    assert hashed[2:] == ["model.safetensors"]


def test_another_file_of_the_same_size_and_time_is_noticed(model: Path, tmp_path: Path) -> None:
    before = read_model_files(str(model))
    weights, other = model / "model.safetensors", tmp_path / "other.safetensors"
    shutil.copy2(weights, other)
    change_weights(other)
    os.utime(other, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns))
    os.replace(other, weights)
    assert read_model_files(str(model), known=before.files).changed_since(before.files) == ["model.safetensors"]


@pytest.mark.parametrize("described", [None, 3, {}, {"files": []}, {"files": {"a": 1}}, {"files": {"a": {"sha256": "0"}}}])
def test_records_that_are_none_are_none(described: Any) -> None:
    assert read_records(described) == {}


def test_file_that_cannot_be_read_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(fingerprint, "hash_file", refuse)
    with pytest.raises(InputError, match=f"^model '{model}': {model}/config.json cannot be read: Permission denied$"):
        read_model_files(str(model))


# Weights that change while they are read


def test_weights_that_change_while_they_are_loaded_are_loaded_again(model: Path) -> None:
    loads: list[Any] = []

    def load() -> Any:
        loads.append(load_encoder(str(model)))
        if len(loads) == 1:
            change_weights(model / "model.safetensors")
        return loads[-1]

    loaded, files = load_settled(str(model), load)
    assert loaded is loads[1] and len(loads) == 2
    assert files.sha256 == read_model_files(str(model)).sha256
    torch.testing.assert_close(loaded.state_dict(), load_encoder(str(model)).state_dict(), rtol=0, atol=0)


def test_weights_that_never_stop_changing_are_one_line(model: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors changed while the run was reading it\. Run .* again when"):
        load_settled(str(model), lambda: change_weights(model / "model.safetensors"))


def test_weights_that_changed_since_they_were_hashed_are_refused(model: Path) -> None:
    files = read_model_files(str(model))
    check_unchanged(files)
    change_weights(model / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors changed while the run was reading it"):
        check_unchanged(files)


def test_loaded_weights_do_not_follow_what_is_written_into_their_file(model: Path) -> None:
    encoder = load_encoder(str(model))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    change_weights(model / "model.safetensors")
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)


# The hub's cache


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the model, its files links to blobs; returns the snapshot's folder."""
    build_hub_cache(tmp_path / "hub", {"someone/model": model})
    root = tmp_path / "hub" / "hub" / "models--someone--model"
    snapshot = next((root / "snapshots").iterdir())
    link_files(snapshot, root / "blobs")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))
    return snapshot


def test_model_in_the_hubs_cache_is_found_without_asking_the_hub(hub: Path) -> None:
    assert find_model_folder("someone/model") == hub
    assert find_model_folder("someone/other") is None
    assert find_model_folder("no/such/folder") is None


def test_file_that_joins_a_model_of_the_hub_is_no_change_and_one_that_joins_a_folder_is(hub: Path) -> None:
    for name, changes in (("someone/model", []), (str(hub), ["tokenizer.json"])):
        (hub / "tokenizer.json").unlink(missing_ok=True)
        before = read_model_files(name, folder=hub)
        (hub / "tokenizer.json").write_text("{}")
        assert read_model_files(name, folder=hub).changed_since(before.files) == changes


def test_random_weights_need_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert set(read_model_files(str(model), weights=False).files) == {"config.json"}
    assert resolve_model_folder(str(model)) == model
    assert ModelFiles("x").sha256 == {}
