"""The trainer: its losses, its frozen teacher, its guards and its resumption."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from research.errors import Interrupted, StopRequest, TrainingFault
from research.kd.loop import TrainingResult, schedule
from research.kd.objective import DistillationObjective
from research.kd.targets import KeptTeacher
from research.models.classifiers import ModelShape, StudentModel, TeacherModel
from research.models.encoders import prepare_encoder
from research.storage.checkpoints import CheckpointFolder
from research.text.batches import BatchLoader
from research.text.tokens import Tokens
from research_config import KD_METHODS, ExperimentConfig
from research_distillation import DistillationTrainer, choose_autocast_dtype, verify_teacher_performance

LABELS = ("bully", "threat", "spam")
VOCABULARY = 50


def tiny_encoder(layers: int, width: int = 16, seed: int = 0, dropout: float = 0.1) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return prepare_encoder(BertModel(config, add_pooling_layer=False))


def tiny_teacher() -> TeacherModel:
    return TeacherModel(num_labels=3, encoder=tiny_encoder(4, width=24, seed=1))


def tiny_student(seed: int = 2, dropout: float = 0.1) -> StudentModel:
    encoder = tiny_encoder(2, seed=seed, dropout=dropout)
    return StudentModel(num_labels=3, dropout=dropout, classifier_hidden_size=8, encoder=encoder)


def objective_of(trainer: DistillationTrainer) -> DistillationObjective:
    assert isinstance(trainer.objective, DistillationObjective)
    return trainer.objective


def tiny_config(**changes: object) -> ExperimentConfig:
    return dataclasses.replace(
        ExperimentConfig(epochs=2, batch=4, lr=1e-2, early_stopping_patience=9),
        **changes,  # type: ignore[arg-type]
    )


def tiny_loader(rows: int = 18, seed: int | None = 0, **extras: object) -> BatchLoader:
    generator = np.random.default_rng(5)
    lengths = generator.integers(3, 9, rows)
    tokens = Tokens(
        ids=generator.integers(3, VOCABULARY, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        words=None,
        pad_id=0,
        key="tiny",
    )
    labels = generator.integers(0, 2, (rows, 3)).astype(np.float32)
    labels[0, 1] = np.nan
    return BatchLoader(np.arange(rows), tokens, labels, 4, seed=seed, **extras)  # type: ignore[arg-type]


def constant_validation(model: torch.nn.Module) -> dict[str, float]:
    return {"f1_macro": 0.5, "f1_micro": 0.5, "average_precision_macro": 0.5}


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", KD_METHODS)
def test_training_leaves_every_teacher_parameter_and_buffer_bit_equal(method: str) -> None:
    teacher = tiny_teacher()
    before = weights_of(teacher) | {f"buffer {name}": buffer.clone() for name, buffer in teacher.named_buffers()}
    trainer = DistillationTrainer(teacher, tiny_student(), tiny_config(kd_method=method), "cpu")
    trainer.fit(tiny_loader(), constant_validation)
    after = weights_of(teacher) | {f"buffer {name}": buffer.clone() for name, buffer in teacher.named_buffers()}
    assert equal_weights(before, after)
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("method", KD_METHODS)
def test_train_step_returns_the_components_of_its_method(method: str) -> None:
    trainer = DistillationTrainer(tiny_teacher(), tiny_student(), tiny_config(kd_method=method), "cpu")
    batch = next(iter(tiny_loader()))
    components = trainer.train_step(batch, trainer.build_optimizer(), torch.ones(3))
    expected = {"total_loss", "soft_loss", "soft_excess", "hard_loss"}
    expected |= {"hidden_loss"} if KD_METHODS[method].hidden else set()
    expected |= {"attention_loss"} if KD_METHODS[method].attention else set()
    assert set(components) == expected
    assert all(isinstance(value, float) and value > 0 for value in components.values())


def test_total_is_the_weighed_sum_of_its_components() -> None:
    config = tiny_config(kd_method="multi_level", kd_alpha=0.4, hidden_loss_weight=0.6, attention_loss_weight=0.9)
    loader = tiny_loader()
    batch = loader.collate(np.arange(1, 5))
    trainer = DistillationTrainer(tiny_teacher(), tiny_student(), config, "cpu")
    losses = {name: value.item() for name, value in trainer.compute_losses(batch, None).items()}
    logit_part = 0.4 * losses["soft_loss"] + 0.6 * losses["hard_loss"]
    assert losses["total_loss"] == pytest.approx(
        logit_part + 0.6 * losses["hidden_loss"] + 0.9 * losses["attention_loss"], rel=1e-6
    )


def test_train_step_changes_the_student_and_lowers_the_loss_of_its_batch() -> None:
    trainer = DistillationTrainer(tiny_teacher(), tiny_student(dropout=0.0), tiny_config(kd_method="multi_level"), "cpu")
    optimizer = trainer.build_optimizer()
    batch = next(iter(tiny_loader()))
    losses = [trainer.train_step(batch, optimizer)["total_loss"] for _ in range(20)]
    assert losses[-1] < losses[0]


def test_projections_carry_the_width_and_are_trained() -> None:
    trainer = DistillationTrainer(tiny_teacher(), tiny_student(), tiny_config(kd_method="hidden"), "cpu")
    assert {name: (layer.in_features, layer.out_features) for name, layer in objective_of(trainer).projections.items()} == {
        "2_1": (16, 24),
        "4_2": (16, 24),
    }
    before = weights_of(objective_of(trainer).projections)
    trainer.train_step(next(iter(tiny_loader())), trainer.build_optimizer())
    assert not equal_weights(before, weights_of(objective_of(trainer).projections))
    assert not any("projection" in name for name in trainer.student.state_dict())


def test_equal_widths_need_no_projection() -> None:
    teacher = TeacherModel(num_labels=3, encoder=tiny_encoder(4, width=16))
    trainer = DistillationTrainer(teacher, tiny_student(), tiny_config(kd_method="hidden"), "cpu")
    assert len(objective_of(trainer).projections) == 0


def test_kept_logits_train_like_the_live_teacher() -> None:
    teacher = tiny_teacher().eval()
    loader = tiny_loader()
    logits = np.zeros((18, 3), dtype=np.float32)
    with torch.no_grad():
        for index in loader.plan(0):
            batch = loader.collate(index)
            logits[index] = teacher(batch["input_ids"], batch["attention_mask"])["logits"].numpy()
    histories = []
    for answers in (teacher, KeptTeacher(ModelShape.of(teacher.backbone_config), logits)):
        torch.manual_seed(0)
        trainer = DistillationTrainer(answers, tiny_student(), tiny_config(), "cpu")
        histories.append(trainer.fit(tiny_loader(), constant_validation).history)
    for live_row, cached_row in zip(*histories, strict=True):
        assert cached_row == pytest.approx(live_row, rel=1e-5)


def test_training_without_a_teacher_ignores_every_distillation_flag() -> None:
    results = []
    for changes in ({}, {"kd_alpha": 0.1, "kd_temperature": 9.0, "kd_method": "multi_level"}):
        torch.manual_seed(0)
        trainer = DistillationTrainer(None, tiny_student(), tiny_config(**changes), "cpu")
        results.append(trainer.fit(tiny_loader(), constant_validation).history)
    assert results[0] == results[1]
    assert "soft_loss" not in results[0][0]


def test_label_alphas_weigh_single_labels() -> None:
    config = tiny_config(kd_alpha=0.0, label_alphas=("threat=1",))
    trainer = DistillationTrainer(tiny_teacher(), tiny_student(), config, "cpu", label_names=LABELS)
    assert objective_of(trainer).criterion.alpha.tolist() == [0.0, 1.0, 0.0]


def test_accumulated_batches_give_the_gradient_of_one_large_batch() -> None:
    gradients: list[list[torch.Tensor]] = []
    for parts in ([np.arange(1, 9)], [np.arange(1, 5), np.arange(5, 9)]):
        trainer = DistillationTrainer(tiny_teacher(), tiny_student(dropout=0.0), tiny_config(gradient_clip_norm=1e6), "cpu")
        optimizer = torch.optim.SGD(trainer.parameters, lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_, parameters=trainer.parameters: gradients.append([parameter.grad.clone() for parameter in parameters])
        )
        loader = tiny_loader()
        trainer.take_step([loader.collate(index) for index in parts], optimizer, None, step=1)
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, summed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("largest_norm", [1e-3, 1e3])
def test_gradients_are_clipped_as_by_clip_grad_norm(largest_norm: float) -> None:
    config = tiny_config(gradient_clip_norm=largest_norm)
    weights: list[list[torch.Tensor]] = []
    for fused in (True, False):  # within the optimizer's step, and before it
        trainer = DistillationTrainer(tiny_teacher(), tiny_student(dropout=0.0), config, "cpu")
        # Adam's first step hides the gradients' scale, but for what is as small as its epsilon.
        optimizer = torch.optim.AdamW(trainer.parameters, lr=0.1, eps=1e-3, fused=fused)
        for step, index in enumerate([np.arange(1, 5), np.arange(5, 9)], 1):
            trainer.take_step([tiny_loader().collate(index)], optimizer, None, step=step)
        trainer.read_losses()
        weights.append([parameter.detach().clone() for parameter in trainer.parameters])
    for within, before in zip(*weights, strict=True):
        torch.testing.assert_close(within, before, rtol=1e-5, atol=1e-6)


def test_frozen_encoder_stays_and_classifier_learns() -> None:
    student = tiny_student()
    encoder, classifier = weights_of(student.encoder), weights_of(student.classifier)
    config = tiny_config(freeze_student_encoder=True)
    DistillationTrainer(tiny_teacher(), student, config, "cpu").fit(tiny_loader(), constant_validation)
    assert equal_weights(encoder, weights_of(student.encoder))
    assert not equal_weights(classifier, weights_of(student.classifier))


def test_float16_autocast_runs_with_a_gradscaler_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research_distillation.choose_autocast_dtype", lambda config, device: torch.float16)
    trainer = DistillationTrainer(tiny_teacher(), tiny_student(), tiny_config(kd_method="multi_level"), "cpu")
    assert trainer.scaler.is_enabled()
    before = weights_of(trainer.student)
    result = trainer.fit(tiny_loader(), constant_validation)
    assert all(np.isfinite(row["total_loss"]) for row in result.history)
    assert not equal_weights(before, weights_of(trainer.student))


def test_scaler_skip_is_counted_and_does_not_advance_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research_distillation.choose_autocast_dtype", lambda config, device: torch.float16)
    trainer = DistillationTrainer(tiny_teacher(), tiny_student(), tiny_config(), "cpu")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    result = trainer.fit(tiny_loader(), constant_validation)
    assert 0 < result.skipped_steps < 8
    taken = result.history[-1]["global_step"] - result.skipped_steps - 1
    assert result.history[-1]["learning_rate"] == pytest.approx(1e-2 * schedule(taken, 10, 0.1))


def test_autocast_is_float32_on_the_cpu_unless_bfloat16_is_asked_for() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_autocast_dtype(tiny_config(), cpu) is None
    assert choose_autocast_dtype(tiny_config(amp_dtype="bfloat16"), cpu) is torch.bfloat16
    assert choose_autocast_dtype(tiny_config(), cuda) is torch.float16
    assert choose_autocast_dtype(tiny_config(amp=False), cuda) is None


def after_each_step(trainer: DistillationTrainer, patch: pytest.MonkeyPatch, call: Callable[[int], None]) -> None:
    """Call something with each step's number once the step has been taken."""
    take_step = trainer.take_step

    def step_and_call(batches: Any, optimizer: Any, class_weights: Any, step: int) -> bool:
        updated = take_step(batches, optimizer, class_weights, step)
        call(step)
        return updated

    patch.setattr(trainer, "take_step", step_and_call)


def test_epochs_of_teacher_and_student_are_told_apart_with_their_losses_and_times(caplog: pytest.LogCaptureFixture) -> None:
    """The total of a student moves from 7.95 to 7.69 while it learns all it will: the excess over the floor is shown."""
    caplog.set_level("INFO")
    config = tiny_config(kd_method="multi_level", epochs=2)
    DistillationTrainer(None, tiny_student(), config, "cpu").fit(tiny_loader(), constant_validation, name="teacher")
    DistillationTrainer(tiny_teacher(), tiny_student(), config, "cpu").fit(tiny_loader(), constant_validation)
    number = r"[\d.e+-]+"
    epochs = [line for line in caplog.messages if "epoch" in line]
    for line, name, epoch in zip(epochs, ["teacher"] * 2 + ["student"] * 2, [1, 2] * 2, strict=True):
        losses = ["hard loss"] if name == "teacher" else ["soft excess", "hard loss", "hidden loss", "attention loss"]
        shown = ", ".join(f"{loss} {number}" for loss in losses)
        best = r" \(best\)" if epoch == 1 else ""
        assert re.fullmatch(rf"{name} epoch {epoch} of 2: {shown}, validation mAP {number}{best}, \d+\.\d s", line), line


@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
def test_non_finite_loss_stops_before_the_step_and_names_step_component_and_rows(
    amp_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("research_distillation.choose_autocast_dtype", lambda config, device: amp_dtype)
    logits = np.zeros((18, 3), dtype=np.float32)
    logits[7] = np.nan
    answers = KeptTeacher(ModelShape(4, 24, 2, VOCABULARY), logits)
    trainer = DistillationTrainer(answers, tiny_student(), tiny_config(), "cpu")
    seen: list[dict[str, torch.Tensor]] = []
    after_each_step(trainer, monkeypatch, lambda step: seen.append(weights_of(trainer.student)))
    with pytest.raises(TrainingFault, match=r"^step \d+: soft_loss is nan.*Rows .*\b7\b") as caught:
        trainer.fit(tiny_loader(), constant_validation)
    assert "\n" not in str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in trainer.student.state_dict().values())
    assert len(seen) < 2 or equal_weights(seen[-1], seen[-2])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_train_step_leaves_the_student_as_it_was_and_can_go_on_after_a_bad_batch(kind: Any) -> None:
    trainer = DistillationTrainer(None, tiny_student(), tiny_config(), "cpu")
    optimizer = kind(trainer.parameters, lr=0.1)
    batch = tiny_loader().collate(np.arange(1, 5))
    before = weights_of(trainer.student)
    with pytest.raises(TrainingFault, match="step 1: hard_loss is"):
        trainer.train_step(batch, optimizer, torch.full((3,), torch.inf))
    assert equal_weights(before, weights_of(trainer.student))
    trainer.train_step(batch, optimizer)
    assert not equal_weights(before, weights_of(trainer.student))


@pytest.mark.parametrize(
    "flags",
    [
        {"kd_method": "multi_level"},
        {"anneal_labels": True, "ema_decay": 0.9},
        {"rank_loss_weight": 0.5, "rank_objective": "pairwise", "undo_class_weights": True},
    ],
)
def test_resumed_training_matches_uninterrupted_training_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, object]
) -> None:
    config = tiny_config(epochs=3, **flags)
    class_weights = torch.tensor([2.0, 3.0, 0.5])

    def train(folder: Path, stop: StopRequest, stop_at: int) -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        student = tiny_student()
        trainer = DistillationTrainer(tiny_teacher(), student, config, "cpu")
        torch.manual_seed(9)
        after_each_step(trainer, monkeypatch, lambda step: setattr(stop, "requested", step == stop_at))
        checkpoints = CheckpointFolder(folder)
        result = trainer.fit(tiny_loader(), constant_validation, class_weights, checkpoints=checkpoints, stop=stop)
        return result.history, weights_of(student)

    whole_history, whole_weights = train(tmp_path / "whole", StopRequest(), -1)
    for stop_at in (2, 7):
        folder = tmp_path / f"stopped_{stop_at}"
        with pytest.raises(Interrupted):
            train(folder, StopRequest(), stop_at)
        history, weights = train(folder, StopRequest(), -1)
        assert history == whole_history
        assert equal_weights(weights, whole_weights)


def test_training_that_is_over_keeps_its_best_weights_alone_and_is_taken_again_without_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(epochs: int = 2) -> tuple[TrainingResult, dict[str, torch.Tensor], list[int]]:
        student, steps = tiny_student(), list[int]()
        trainer = DistillationTrainer(tiny_teacher(), student, tiny_config(kd_method="multi_level", epochs=epochs), "cpu")
        after_each_step(trainer, monkeypatch, steps.append)
        torch.manual_seed(0)
        result = trainer.fit(tiny_loader(), constant_validation, checkpoints=CheckpointFolder(tmp_path))
        return result, weights_of(student), steps

    first, weights, steps = train()
    (kept,) = tmp_path.iterdir()
    assert len(steps) == 10 and kept.stat().st_size < 1.2 * sum(tensor.nbytes for tensor in weights.values()) + 50_000
    drawn = torch.rand(4)
    second, again, steps = train()
    assert (second.history, second.best_epoch, steps) == (first.history, first.best_epoch, [])
    assert equal_weights(again, weights) and torch.equal(torch.rand(4), drawn)
    with pytest.raises(ValueError, match="student: its training ended after 2 epochs and cannot go on"):
        train(epochs=3)


@pytest.mark.parametrize("select_by", ["f1_macro", "average_precision_macro"])
def test_student_ends_with_the_weights_of_its_best_epoch(select_by: str) -> None:
    scores = iter([0.2, 0.9, 0.3])
    kept: list[dict[str, torch.Tensor]] = []

    def validate(model: torch.nn.Module) -> dict[str, float]:
        kept.append(weights_of(model))
        return {"f1_macro": 0.0, "f1_micro": 0.0, "average_precision_macro": 0.0} | {select_by: next(scores)}

    trainer = DistillationTrainer(tiny_teacher(), tiny_student(), tiny_config(epochs=3, select_by=select_by), "cpu")
    result = trainer.fit(tiny_loader(), validate)
    assert (result.best_epoch, result.best_score) == (2, 0.9)
    assert equal_weights(weights_of(trainer.student), kept[1])


def test_the_average_is_validated_and_kept_and_training_goes_on_from_the_weights() -> None:
    judged: list[dict[str, torch.Tensor]] = []

    def train(decay: float) -> tuple[DistillationTrainer, list[dict[str, torch.Tensor]]]:
        judged.clear()

        def validate(model: torch.nn.Module) -> dict[str, float]:
            judged.append(weights_of(model))
            return constant_validation(model) | {"average_precision_macro": len(judged) / 10}

        trainer = DistillationTrainer(tiny_teacher(), tiny_student(dropout=0.0), tiny_config(ema_decay=decay), "cpu")
        steps: list[dict[str, torch.Tensor]] = []
        with pytest.MonkeyPatch.context() as patch:
            after_each_step(trainer, patch, lambda _: steps.append(weights_of(trainer.student)))
            trainer.fit(tiny_loader(), validate)
        return trainer, steps

    _, plain_steps = train(0.0)
    trainer, steps = train(0.5)
    assert all(equal_weights(*pair) for pair in zip(steps, plain_steps, strict=True))
    name = "classifier.0.weight" if "classifier.0.weight" in steps[0] else next(iter(steps[0]))
    shares = 0.5 ** np.arange(len(steps), 0, -1)
    expected = sum(share * taken[name].double() for share, taken in zip(shares, steps, strict=True)) / shares.sum()
    torch.testing.assert_close(judged[-1][name].double(), expected, rtol=1e-5, atol=1e-6)
    assert equal_weights(weights_of(trainer.student), judged[-1])


def test_annealing_ends_on_the_labels_alone() -> None:
    trainer = DistillationTrainer(tiny_teacher(), tiny_student(), tiny_config(anneal_labels=True), "cpu")
    shares: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        after_each_step(trainer, patch, lambda _: shares.append(objective_of(trainer).progress))
        trainer.fit(tiny_loader(), constant_validation)
    np.testing.assert_allclose(shares, np.linspace(0, 1, 10))


def test_rank_loss_has_a_column_where_it_is_asked_for() -> None:
    for weight in (0.0, 0.5):
        trainer = DistillationTrainer(tiny_teacher(), tiny_student(), tiny_config(rank_loss_weight=weight), "cpu")
        history = trainer.fit(tiny_loader(), constant_validation).history
        assert all(("rank_loss" in row) is (weight > 0) for row in history)
    assert all(row["rank_loss"] > 0 for row in history)


@pytest.mark.parametrize("name", ["teacher", "control", "student"])
def test_a_best_epoch_that_is_the_last_is_warned_of(caplog: pytest.LogCaptureFixture, name: str) -> None:
    scores = iter([0.1, 0.2, 0.2, 0.1])

    def validate(model: torch.nn.Module) -> dict[str, float]:
        return constant_validation(model) | {"average_precision_macro": next(scores)}

    flag = "--teacher_epochs" if name == "teacher" else "--epochs"
    for improving in (True, False):
        caplog.clear()
        DistillationTrainer(None, tiny_student(), tiny_config(), "cpu").fit(tiny_loader(), validate, name=name)
        found = [line for line in caplog.messages if "still improving" in line]
        assert len(found) == improving
        assert all(f"{name}: its best epoch is the last of 2" in line and f"Raise {flag}." in line for line in found)


def test_training_stops_when_validation_no_longer_improves() -> None:
    config = tiny_config(epochs=10, early_stopping_patience=2)
    result = DistillationTrainer(tiny_teacher(), tiny_student(), config, "cpu").fit(tiny_loader(), constant_validation)
    assert len(result.history) == 3


def test_schedule_warms_up_and_ends_at_nothing() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] > 0
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 90)


def test_weak_teacher_is_told_from_a_strong_one() -> None:
    class Oracle(torch.nn.Module):
        def __init__(self, answers: torch.Tensor) -> None:
            super().__init__()
            self.answers = torch.nan_to_num(answers)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.answers * 8 - 4}

    batch = tiny_loader(rows=4, seed=None).collate(np.arange(4))
    strong, weak = (cast(TeacherModel, Oracle(answers)) for answers in (batch["labels"], 1 - batch["labels"]))
    assert verify_teacher_performance(strong, [batch], "cpu", 0.9) == (True, {"f1": 1.0})
    passed, scores = verify_teacher_performance(weak, [batch], "cpu", 0.4)
    assert not passed
    assert scores == {"f1": 0.0}


def test_a_kept_teacher_gives_the_same_projections_as_the_model() -> None:
    kept = KeptTeacher(ModelShape(4, 24, 2, VOCABULARY), np.zeros((18, 3), dtype=np.float32))
    trainers = [
        DistillationTrainer(answers, tiny_student(), tiny_config(kd_method="hidden"), "cpu") for answers in (tiny_teacher(), kept)
    ]
    by_model, by_shape = (objective_of(trainer).projections for trainer in trainers)
    assert by_model.keys() == by_shape.keys()
