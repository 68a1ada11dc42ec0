"""What a student starts as: chosen layers of an encoder or of its teacher, or the student of an earlier run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import LABELS
from support.tiny_lab import TinyLab, columns_of, read_metrics

from research.models.cutting import cut_layers
from research.models.encoders import load_encoder, load_tokenizer
from research.models.mapping import LAYER_CHOICES, map_layers
from research.models.saved import load_classifier


def layers_of(encoder: object) -> list[dict[str, torch.Tensor]]:
    return [layer.state_dict() for layer in encoder.encoder.layer]  # type: ignore[attr-defined]


# Which layers


@pytest.mark.parametrize(
    ("choice", "wanted", "kept"),
    [
        ("uniform", 3, [4, 8, 12]),
        ("lowest", 3, [1, 2, 3]),
        ("ends", 3, [1, 2, 12]),
        ("ends", 4, [1, 2, 11, 12]),
        ("ends", 1, [1]),
        ("lowest", 12, [*range(1, 13)]),
        ("ends", 12, [*range(1, 13)]),
    ],
)
def test_choice_of_layers(choice: str, wanted: int, kept: list[int]) -> None:
    assert LAYER_CHOICES[choice](12, wanted) == kept


@pytest.mark.parametrize("choice", LAYER_CHOICES)
@pytest.mark.parametrize("total", [1, 2, 7, 12])
def test_every_choice_keeps_as_many_layers_as_asked_for_each_once_and_in_order(choice: str, total: int) -> None:
    for wanted in range(1, total + 1):
        kept = LAYER_CHOICES[choice](total, wanted)
        assert kept == sorted(set(kept)) and len(kept) == wanted and 1 <= kept[0] <= kept[-1] <= total


@pytest.mark.parametrize(("choice", "kept"), [("uniform", [1, 2]), ("lowest", [0, 1]), ("ends", [0, 2])])
def test_cut_encoder_holds_the_chosen_layers(choice: str, kept: list[int], materials: Path) -> None:
    place = str(materials / "models" / "teacher")
    before, after = (layers_of(encoder) for encoder in (load_encoder(place), cut_layers(load_encoder(place), 2, choice)))
    assert len(after) == 2
    for found, layer in zip(after, kept, strict=True):
        assert all(torch.equal(found[name], tensor) for name, tensor in before[layer].items())


def test_mapping_pairs_by_depth_whichever_layers_the_student_kept() -> None:
    assert map_layers("uniform", 12, 3) == ((4, 1), (8, 2), (12, 3))
    assert map_layers("first", 12, 3) == ((1, 1), (2, 2), (3, 3))  # what lowest_layers started as


@pytest.mark.parametrize("start", ["--student_path models/teacher", "--student_init teacher"])
@pytest.mark.parametrize(("choice", "kept"), [("lowest", [0, 1]), ("ends", [0, 2])])
def test_frozen_student_holds_the_chosen_layers_of_its_start(lab: TinyLab, start: str, choice: str, kept: list[int]) -> None:
    flags = f"{start} --student_layers 2 --student_layer_choice {choice} --freeze_student_encoder --kd_method hidden"
    run = lab.done("run", flags)
    student = layers_of(load_classifier(str(run / "student"), LABELS).model.encoder)
    place = run / "teacher" if "init" in start else lab.folder / "models" / "teacher"
    source = layers_of(load_encoder(str(place)))
    for found, layer in zip(student, kept, strict=True):
        assert all(torch.equal(found[name], source[layer][name]) for name in found)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--student_layer_choice lowest", "needs --student_layers"),
        ("--student_layer_choice ends --student_layers 1 --student_init random", "--student_init random has none"),
        ("--student_layer_choice top --student_layers 1", "must be one of uniform, lowest, ends, got 'top'"),
    ],
)
def test_choice_without_layers_to_choose_from_is_refused(lab: TinyLab, flags: str, part: str) -> None:
    error = lab.refused(flags)
    assert error.startswith("error: --student_layer_choice: ") and part in error


# The student of an earlier run


def test_a_run_s_student_gives_its_encoder_and_its_tokenizer(lab: TinyLab) -> None:
    first = lab.done("first")
    encoder = load_encoder(str(first / "student"))
    trained = load_classifier(str(first / "student"), LABELS)
    assert all(
        torch.equal(tensor, trained.model.encoder.state_dict()[name])  # type: ignore[union-attr]
        for name, tensor in encoder.state_dict().items()
    )
    assert load_tokenizer(str(first / "student")).get_vocab() == trained.tokenizer.get_vocab()


def test_distilling_in_two_steps(lab: TinyLab) -> None:
    """Three layers, two of them, one of those: each step's student is teacher and start of the next."""
    first = lab.done("first", "--student_path models/teacher --student_layers 2")
    step = "--teacher_checkpoint results/first/student --student_path results/first/student --student_layers 1"
    second = lab.done("second", f"{step} --kd_method multi_level")
    assert load_classifier(str(second / "student"), LABELS).model.num_layers == 1
    np.testing.assert_allclose(
        columns_of(second / "predictions.csv", "teacher_"), columns_of(first / "predictions.csv", "student_"), atol=1e-6
    )
    metrics = read_metrics(second)
    assert metrics["training"]["teacher"] == {"source": "checkpoint", "training_texts": "known"}
    frozen = lab.done("frozen", f"{step} --freeze_student_encoder --student_layer_choice lowest")
    found = layers_of(load_classifier(str(frozen / "student"), LABELS).model.encoder)[0]
    expected = layers_of(load_classifier(str(first / "student"), LABELS).model.encoder)[0]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    third = lab.done("third", "--student_init teacher --teacher_checkpoint results/second/student")
    assert load_classifier(str(third / "student"), LABELS).model.num_layers == 1


@pytest.mark.parametrize(
    "flags",
    [
        "--pipeline student_only --student_path results/first/student",
        "--student_path results/first/student",
        "--pipeline baseline --teacher_path results/first/student",
    ],
)
def test_start_that_has_learned_test_texts_is_refused_or_they_are_left_out(lab: TinyLab, flags: str) -> None:
    first = lab.done("first")
    error = lab.refused(f"{flags} --split_seed 7")
    flag = "--teacher_path" if "--teacher_path" in flags else "--student_path"
    assert f"{flag}: results/first/student was trained on the texts of" in error and "--drop_seen_rows" in error
    run = lab.done("dropped", f"{flags} --split_seed 7 --drop_seen_rows --test_fraction 0.5 --val_fraction 0.3")
    seen = set(np.load(first / "student" / "training_texts.npy").tolist())
    for side in ("student", "teacher"):
        if (run / side).exists() and side in flag:
            assert seen <= set(np.load(run / side / "training_texts.npy").tolist())
    assert read_metrics(run)["rows"]["test"] < 40


def test_start_that_does_not_say_its_texts_is_warned_about_and_its_student_says_none(lab: TinyLab) -> None:
    first = lab.done("first")
    (first / "student" / "training_texts.npy").unlink()
    status, errors = lab.run("--student_path results/first/student --split_seed 7 --output_dir results/second")
    assert status == 0 and "--student_path results/first/student does not say which texts it was trained on" in errors
    assert not (lab.folder / "results/second/student/training_texts.npy").exists()


def test_pretrained_encoder_is_not_asked_which_labels_it_has_seen(lab: TinyLab) -> None:
    status, errors = lab.run("--output_dir results/run")
    assert status == 0 and "does not say which texts" not in errors
