"""One run from table to results directory: inputs, teacher, student, evaluation, files."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from research.errors import InputError, StopRequest
from research.evaluation.calibration import sigmoid
from research.evaluation.efficiency import compare_efficiency, measure_efficiency
from research.evaluation.gain import measure_gain
from research.evaluation.metrics import DEFAULT_THRESHOLD, build_metrics, compute_metrics
from research.evaluation.predict import predict_logits
from research.experiment.inputs import Inputs, hash_rows, load_inputs
from research.kd.loop import TrainingResult
from research.kd.teacher import Teacher, estimate_bytes, fetch_layers, fetch_logits
from research.models.classifiers import ModelShape, StudentModel, TeacherModel, TextClassifier
from research.models.cutting import cut_layers
from research.models.encoders import fingerprint_model, load_encoder
from research.models.saved import load_classifier, save_classifier
from research.report.run_page import write_report
from research.report.trackers import track_run
from research.runs.directory import RunDirectory
from research.runs.folds import aggregate_folds
from research.runs.run import load_run
from research.storage.arrays import release_pages, return_free_memory
from research.storage.cache import MANIFEST, Cache, digest_key
from research.storage.checkpoints import CheckpointFolder
from research.storage.files import link_folder, publish_folder, remove
from research.text.batches import BatchLoader
from research.text.diagnostics import report_alignment, report_sizes, report_tokenizer
from research.text.tokens import Tokens, fingerprint_tokenizer, tokenize
from research.text.words import WordPairs, pair_words
from research_config import PIPELINES, ExperimentConfig, saved_settings
from research_data import compute_class_weights, describe
from research_distillation import DistillationTrainer, judge_teacher

log = logging.getLogger(__name__)
EVAL_BATCH = 1024
# Padded tokens of an evaluation batch: what stays in a CPU's cache, what fills a GPU.
EVAL_TOKENS = {"cpu": 1024, "cuda": 32768}
EFFICIENCY_BATCHES = 8
EFFICIENCY_BUDGET_S = 0.5
SCORES_PER_EPOCH = ("f1_macro", "f1_micro", "average_precision_macro")
TEACHER_FIELDS = (
    "teacher_epochs", "pooling", "class_weights", "batch", "gradient_accumulation", "lr", "weight_decay", "warmup_ratio",
    "dropout", "gradient_clip_norm", "early_stopping_patience", "amp", "amp_dtype", "split_seed",
)  # fmt: skip


class WeakTeacher(Exception):
    """The teacher's validation macro-F1 is under --min_teacher_f1."""


@dataclass
class Runtime:
    """Where a run computes, and what it shares with others."""

    device: torch.device
    cache: Cache
    stop: StopRequest
    command_line: list[str]
    timing_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.timing_s[phase] = self.timing_s.get(phase, 0.0) + time.monotonic() - started


def choose_device(config: ExperimentConfig) -> torch.device:
    """Return the device of --device.

    Raises:
        InputError: a CUDA device is asked for and there is none of that number.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device: {config.device} is not there; {torch.cuda.device_count()} CUDA devices were found")
    return device


@functools.cache
def open_cache(folder: str) -> Cache:
    """Return one Cache a folder and process, so what a sweep's worker has verified it need not verify again."""
    return Cache(Path(folder))


def start_runtime(config: ExperimentConfig, command_line: list[str]) -> Runtime:
    """Choose device and threads.

    Raises:
        InputError: the device is not there.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return Runtime(choose_device(config), open_cache(config.cache_dir), StopRequest(), command_line)


class Experiment:
    """One run over checked inputs, writing into a run directory it holds.

    The methods stand in the order in which they run.
    """

    def __init__(self, inputs: Inputs, runtime: Runtime, run_dir: RunDirectory) -> None:
        self.config = inputs.config
        self.inputs = inputs
        self.comments = inputs.comments
        self.split = inputs.split
        self.runtime = runtime
        self.run_dir = run_dir
        self.label_names = inputs.comments.label_names
        self.settings = {
            "labels": list(self.label_names),
            "max_length": self.config.max_length,
            "text_normalization": self.config.text_normalization,
        }
        self.teacher_tokens: Tokens | None = None
        self.student_tokens: Tokens | None = None
        self.words: WordPairs | None = None

    def run(self) -> dict[str, Any]:
        """Do everything and return the content of metrics.json, which is written last.

        Raises:
            WeakTeacher: the teacher is under --min_teacher_f1 and --allow_weak_teacher was not given.
        """
        with self.runtime.timed("tokenize"):
            self.tokenize()
        probs: dict[str, dict[str, Any]] = {}
        training: dict[str, Any] = {}
        teacher = teacher_logits = student = None
        if PIPELINES[self.config.pipeline].teacher:
            with self.runtime.timed("teacher"):
                teacher = self.get_teacher()
            with self.runtime.timed("teacher_outputs"):
                teacher_logits = self.compute_teacher_logits(teacher)
            probs["teacher"] = {part: sigmoid(teacher_logits[getattr(self.split, part)]) for part in ("validation", "test")}
            release_pages(teacher_logits)
            self.verify_teacher(probs["teacher"]["validation"])
            training["teacher"] = teacher.training
        if PIPELINES[self.config.pipeline].student:
            with self.runtime.timed("student"):
                student, result = self.train_student(teacher, teacher_logits)
                probs["student"] = self.predict_student(student)
            self.run_dir.write_history(result.history)
            training["student"] = summarize(result)
        if self.config.with_control:
            with self.runtime.timed("control"):
                probs["control"], result = self.train_control(teacher)
            self.run_dir.write_history(result.history, "history_control.csv")
            training["control"] = summarize(result)
        labels = {part: self.comments.labels[getattr(self.split, part)] for part in ("train", "validation", "test")}
        metrics = self.score(labels, probs, training)
        return_free_memory()  # of training, before the report reads every prediction
        with self.runtime.timed("save"):
            self.save(metrics, labels, probs, teacher, student)
        return metrics

    def tokenize(self) -> None:
        """Tokenise every text with each model's own tokenizer, and pair the words when the ids differ."""
        inputs, cache = self.inputs, self.runtime.cache
        config = self.config
        two_tokenizers = (
            inputs.teacher_tokenizer is not None
            and inputs.student_tokenizer is not None
            and fingerprint_tokenizer(inputs.teacher_tokenizer) != fingerprint_tokenizer(inputs.student_tokenizer)
        )
        with_words = two_tokenizers and (config.method.hidden or config.method.attention)
        for side in ("teacher", "student"):
            tokenizer = getattr(inputs, f"{side}_tokenizer")
            if tokenizer is not None:
                tokens = tokenize(self.comments, tokenizer, config.max_length, cache, with_words=with_words)
                check_vocabulary(side, tokens, inputs.shapes[side])
                setattr(self, f"{side}_tokens", tokens)
                if side == "teacher" or two_tokenizers or inputs.teacher_tokenizer is None:
                    report_tokenizer(side, tokenizer, self.comments.iter_texts())
        if self.teacher_tokens is not None and self.student_tokens is not None and not two_tokenizers:
            # One memory map for both, so that its pages count once.
            self.student_tokens = dataclasses.replace(self.teacher_tokens, pad_id=self.student_tokens.pad_id)
        if with_words:
            assert self.student_tokens is not None and self.teacher_tokens is not None
            if not self.student_tokens.same_ids(self.teacher_tokens):
                self.words = pair_words(self.student_tokens, self.teacher_tokens, cache)
                report_alignment(self.words.aligned_share)

    def get_teacher(self) -> Teacher:
        """Return the teacher of --teacher_checkpoint, or the fine-tuned one, from the cache when it is there."""
        checkpoint = self.inputs.checkpoint
        if checkpoint is not None:
            assert self.config.teacher_checkpoint is not None
            identity = {
                "files": fingerprint_model(self.config.teacher_checkpoint),
                "labels": list(self.label_names),
                # That of the flag, where the files do not say.
                "pooling": getattr(checkpoint.model, "pooling", None),
            }
            return Teacher(
                identity,
                self.inputs.shapes["teacher"],
                lambda: checkpoint.model,
                lambda folder: self.save_model(checkpoint.model, checkpoint.tokenizer, folder, self.settings),
                {"source": "checkpoint"},
            )
        folder = self.runtime.cache.fetch("teachers", self.teacher_key(), self.fine_tune_teacher)
        identity = {"files": json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]}
        return Teacher(
            identity,
            self.inputs.shapes["teacher"],
            lambda: load_classifier(str(folder / "model"), self.label_names).model,
            lambda target: link_folder(folder / "model", target),
            json.loads((folder / "training.json").read_text(encoding="utf-8")),
        )

    def teacher_key(self) -> dict[str, Any]:
        """Return everything the fine-tuned teacher's bytes depend on."""
        assert self.inputs.teacher_tokenizer is not None
        parts = {part: hash_rows(self.comments, getattr(self.split, part)) for part in ("train", "validation")}
        return {
            "model": fingerprint_model(self.config.teacher_path),
            "tokenizer": fingerprint_tokenizer(self.inputs.teacher_tokenizer),
            "settings": self.settings,
            "rows": parts,
            "training": {name: getattr(self.config, name) for name in TEACHER_FIELDS},
            "device": self.runtime.device.type,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def fine_tune_teacher(self, folder: Path, scratch: Path) -> None:
        """Fine-tune the teacher on the labels and leave its best epoch in `folder`."""
        assert self.teacher_tokens is not None
        config = dataclasses.replace(
            self.config,
            pipeline="student_only",
            epochs=self.config.teacher_epochs,
            seed=self.config.split_seed,
            freeze_student_encoder=False,
        )
        log.info("fine-tuning the teacher %s on %d rows", config.teacher_path, len(self.split.train))
        encoder = load_encoder(config.teacher_path)
        torch.manual_seed(config.seed)
        model = TeacherModel(num_labels=len(self.label_names), dropout=config.dropout, pooling=config.pooling, encoder=encoder)
        trainer = DistillationTrainer(None, model, config, self.runtime.device)
        loader = self.build_loader(self.split.train, self.teacher_tokens, seed=config.seed)
        result = self.fit(trainer, loader, self.teacher_tokens, CheckpointFolder(scratch), "teacher")
        save_classifier(model.cpu(), self.inputs.teacher_tokenizer, folder / "model", self.settings)
        (folder / "training.json").write_text(json.dumps(summarize(result), sort_keys=True), encoding="utf-8")

    def fit(
        self, trainer: DistillationTrainer, loader: BatchLoader, tokens: Tokens, checkpoints: CheckpointFolder, name: str
    ) -> TrainingResult:
        """Train with class weights, choosing the best epoch on validation, with a progress bar on stderr.

        Validation runs in float32 whatever the training's precision, as the final evaluation does.
        """
        class_weights = None
        if self.config.class_weights:
            weights, warnings = compute_class_weights(self.comments.labels[self.split.train], self.label_names)
            class_weights = torch.from_numpy(weights)
            for warning in warnings:
                log.warning("%s", warning)
        validation = self.build_loader(self.split.validation, tokens)
        labels = self.comments.labels[self.split.validation]

        def validate(model: nn.Module) -> dict[str, float]:
            probs = sigmoid(predict_logits(model, validation, self.runtime.device))
            scores = compute_metrics(labels, probs, DEFAULT_THRESHOLD, self.label_names)
            return {score: scores[score] for score in SCORES_PER_EPOCH}

        torch.manual_seed(trainer.config.seed)
        with tqdm(desc=name, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:

            def on_step(step: int, total: int) -> None:
                bar.total = total
                bar.update(step - bar.n)

            return trainer.fit(loader, validate, class_weights, checkpoints=checkpoints, stop=self.runtime.stop, on_step=on_step)

    def build_loader(self, rows: NDArray[np.int64], tokens: Tokens, *, seed: int | None = None, **extras: Any) -> BatchLoader:
        """Return training batches, shuffled by `seed`, or without one batches for evaluation."""
        if seed is not None:
            return BatchLoader(rows, tokens, self.comments.labels, self.config.batch, seed=seed, **extras)
        budget = EVAL_TOKENS[self.runtime.device.type]
        return BatchLoader(rows, tokens, self.comments.labels, EVAL_BATCH, token_budget=budget, **extras)

    def compute_teacher_logits(self, teacher: Teacher) -> NDArray[np.float32]:
        """Return the teacher's logits of every row, (N, C)."""
        assert self.teacher_tokens is not None
        loader = self.build_loader(np.arange(len(self.comments)), self.teacher_tokens)
        return fetch_logits(teacher, loader, self.runtime.device, self.runtime.cache)

    def verify_teacher(self, probs: NDArray[np.float64]) -> None:
        """Stop before any distillation when the teacher is too weak to learn from."""
        config = self.config
        strong_enough, scores = judge_teacher(self.comments.labels[self.split.validation], probs, config.min_teacher_f1)
        log.info("teacher: validation macro-F1 %.4f", scores["f1"])
        if not strong_enough and not config.allow_weak_teacher and PIPELINES[config.pipeline].student:
            raise WeakTeacher(
                f"the teacher is too weak to distil: validation macro-F1 {scores['f1']:.4f} is under --min_teacher_f1 "
                f"{config.min_teacher_f1:g}. Train it longer (--teacher_epochs, --lr), or go on with --allow_weak_teacher."
            )

    def train_student(
        self, teacher: Teacher | None, teacher_logits: NDArray[np.float32] | None
    ) -> tuple[StudentModel, TrainingResult]:
        """Build the student and train it, from the teacher or from the labels alone."""
        assert self.student_tokens is not None
        student = self.build_student(teacher)
        # Right after the student, which seeded torch: its projections must not depend on whether a cold
        # cache had a teacher loaded in between, which draws random numbers.
        trainer = DistillationTrainer(
            None,
            student,
            self.config,
            self.runtime.device,
            teacher_shape=None if teacher is None else teacher.shape,
            label_names=self.label_names,
        )
        rows, extras = self.split.train, {}
        if teacher is not None:
            report_sizes(int(self.measure_teacher(teacher)["parameters_total"]), student)
            rows = np.concatenate([self.split.train, self.split.unlabelled])
            extras["teacher_logits"] = teacher_logits
            if trainer.comparison is not None:
                extras |= self.teacher_layers(teacher, trainer, rows)
        loader = self.build_loader(rows, self.student_tokens, seed=self.config.seed, **extras)
        checkpoints = CheckpointFolder(self.run_dir.path / "checkpoint", digest_key(self.training_identity(teacher, rows)))
        return student, self.fit(trainer, loader, self.student_tokens, checkpoints, "student")

    def train_control(self, teacher: Teacher | None) -> tuple[dict[str, NDArray[np.float64]], TrainingResult]:
        """Train the same student without the teacher and return its probabilities.

        It starts from the same weights with the same seed and sees the same batches, as a student_only run
        of the same flags does; unlabelled rows, which have nothing to teach it, are left out.
        """
        assert self.student_tokens is not None
        log.info("training the control: the same student on the labels alone")
        config = dataclasses.replace(self.config, pipeline="student_only")
        control = self.build_student(teacher)
        trainer = DistillationTrainer(None, control, config, self.runtime.device)
        loader = self.build_loader(self.split.train, self.student_tokens, seed=config.seed)
        identity = digest_key(self.training_identity(teacher, self.split.train))
        checkpoints = CheckpointFolder(self.run_dir.path / "checkpoint_control", identity)
        result = self.fit(trainer, loader, self.student_tokens, checkpoints, "control")
        return self.predict_student(control), result

    def score(self, labels: Mapping[str, Any], probs: dict[str, dict[str, Any]], training: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of metrics.json, with what distillation gained when there is a control."""
        config = self.config
        metrics = build_metrics(
            self.label_names, labels, probs, training, kd_temperature=config.kd_temperature, t_squared=config.t_squared
        )
        if "control" in probs:
            thresholds = {model: list(cuts.values()) for model, cuts in metrics["thresholds"].items()}
            of_test = {model: parts["test"] for model, parts in probs.items()}
            metrics["kd_gain"] = measure_gain(labels["test"], of_test, thresholds)
        return metrics

    def fetch_texts(self, index: Sequence[int]) -> dict[int, str]:
        """Return the texts of some test rows by their `index` in predictions.csv; none if the table has changed."""
        wanted = set(index)
        rows = {int(row): int(place) for row in self.split.test if (place := self.comments.source_row[row]) in wanted}
        try:
            return {rows[row]: text for row, text in enumerate(self.comments.iter_texts()) if row in rows}
        except InputError as error:
            log.warning("report.html goes without texts: %s", error)
            return {}

    def training_identity(self, teacher: Teacher | None, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return what a checkpoint must share, beside the config, with the run that goes on from it."""
        assert self.student_tokens is not None
        config = self.config
        return {
            "teacher": None if teacher is None else teacher.identity,
            "student": fingerprint_model(config.student_path) if config.student_init == "pretrained" else config.student_init,
            "tokens": [tokens.key for tokens in (self.student_tokens, self.teacher_tokens) if tokens is not None],
            "rows": [hash_rows(self.comments, part) for part in (rows, self.split.validation)],
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def teacher_layers(self, teacher: Teacher, trainer: DistillationTrainer, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return what the training loader needs to carry the teacher's layers, or to run it live past the budget."""
        assert self.student_tokens is not None and self.teacher_tokens is not None and trainer.comparison is not None
        extras: dict[str, Any] = {}
        if self.words is not None:
            extras = {"teacher_tokens": self.teacher_tokens, "words": self.words}
        # A word has at least one token, so the tokens bound the positions of both paths from above.
        size = estimate_bytes(trainer.comparison, self.teacher_tokens.lengths[rows], teacher.shape.hidden_size)
        if size > self.config.cache_budget_gb * 1e9:
            log.info(
                "the teacher runs live: its layers would take %.2f GB of cache, over --cache_budget_gb %g",
                size / 1e9,
                self.config.cache_budget_gb,
            )
            trainer.attach_teacher(teacher.model)
            return extras
        loader = self.build_loader(rows, self.student_tokens, **extras)
        with self.runtime.timed("teacher_outputs"):
            layers = fetch_layers(teacher, trainer.comparison, loader, self.runtime.device, self.runtime.cache)
        return {"words": self.words, "teacher_layers": layers}

    def build_student(self, teacher: Teacher | None) -> StudentModel:
        config = self.config
        torch.manual_seed(config.seed)
        if config.student_init == "teacher":
            assert teacher is not None
            encoder = copy.deepcopy(cast(nn.Module, teacher.model.encoder)).requires_grad_(True)
        else:
            encoder = load_encoder(config.student_path, random_init=config.student_init == "random")
        if config.student_layers is not None:
            encoder = cut_layers(encoder, config.student_layers)
        # Seeded again here, so the head does not depend on how many numbers loading the encoder drew.
        torch.manual_seed(config.seed)
        return StudentModel(
            num_labels=len(self.label_names),
            dropout=config.dropout,
            classifier_hidden_size=config.student_hidden_size,
            pooling=config.pooling,
            encoder=encoder,
        )

    def predict_student(self, student: StudentModel) -> dict[str, NDArray[np.float64]]:
        assert self.student_tokens is not None
        probs = {}
        for part in ("validation", "test"):
            loader = self.build_loader(getattr(self.split, part), self.student_tokens)
            probs[part] = sigmoid(predict_logits(student, loader, self.runtime.device))
        return probs

    def save(
        self,
        metrics: dict[str, Any],
        labels: Mapping[str, Any],
        probs: Mapping[str, Mapping[str, Any]],
        teacher: Teacher | None,
        student: StudentModel | None,
    ) -> None:
        """Write the run directory; metrics.json comes last and means finished."""
        run_dir = self.run_dir
        for part in ("validation", "test"):
            index = self.comments.source_row[getattr(self.split, part)]
            of_part = {model: parts[part] for model, parts in probs.items()}
            run_dir.write_predictions(part, index, self.label_names, labels[part], of_part)
        run_dir.write_efficiency(self.measure_efficiency(teacher, student))
        if teacher is not None:
            teacher.store(run_dir.path / "teacher")
        if student is not None:
            settings = self.settings | {"thresholds": metrics["thresholds"]["student"]}
            self.save_model(student, self.inputs.student_tokenizer, run_dir.path / "student", settings)
        run_dir.write_environment(self.describe_environment())
        write_report(run_dir.path, metrics, self.fetch_texts)
        run_dir.write_metrics(metrics)
        # Only now: a run killed before this line resumes from its last checkpoint.
        run_dir.drop_checkpoints()
        if self.config.track != "none":
            track_run(self.config.track, load_run(run_dir.path))

    def save_model(self, model: TextClassifier, tokenizer: Any, folder: Path, settings: Mapping[str, Any]) -> None:
        temporary = folder.with_name(f".{folder.name}.tmp")
        remove(temporary)
        save_classifier(model.cpu(), tokenizer, temporary, settings)
        publish_folder(temporary, folder)

    def measure_efficiency(self, teacher: Teacher | None, student: StudentModel | None) -> dict[str, Any]:
        """Measure each model's size and speed on test rows; the teacher's figures are shared by a sweep."""
        result: dict[str, Any] = {}
        if teacher is not None:
            result["teacher"] = self.measure_teacher(teacher)
        if student is not None:
            assert self.student_tokens is not None
            result["student"] = self.measure_model(student, self.student_tokens)
        if teacher is not None and student is not None:
            result |= compare_efficiency(result["teacher"], result["student"])
        return result

    def measure_teacher(self, teacher: Teacher) -> dict[str, float]:
        assert self.teacher_tokens is not None
        tokens = self.teacher_tokens
        key = {"teacher": teacher.identity, "tokens": tokens.key, "machine": machine_name(self.runtime.device),
               "threads": torch.get_num_threads()}  # fmt: skip

        def build(folder: Path, _scratch: Path) -> None:
            figures = self.measure_model(teacher.model, tokens)
            (folder / "efficiency.json").write_text(json.dumps(figures), encoding="utf-8")

        folder = self.runtime.cache.fetch("efficiency", key, build)
        return json.loads((folder / "efficiency.json").read_text(encoding="utf-8"))

    def measure_model(self, model: TextClassifier, tokens: Tokens) -> dict[str, float]:
        loader = BatchLoader(self.split.test, tokens, self.comments.labels, 32, seed=0)
        batches = [loader.collate(index) for index in loader.plan(0)[:EFFICIENCY_BATCHES]]
        loader.release_pages()
        model.to(self.runtime.device)
        return measure_efficiency(model, batches, self.runtime.device, time_budget_s=EFFICIENCY_BUDGET_S)

    def describe_environment(self) -> dict[str, Any]:
        names = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn", "iterative-stratification")
        return {
            "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
            "device": machine_name(self.runtime.device),
            "num_threads": torch.get_num_threads(),
            "command_line": self.runtime.command_line,
            "dataset": describe(self.comments, self.split),
            "data": {
                "dataset_sha256": self.comments.file_sha256["main"],
                "file_sha256": self.comments.file_sha256,
                "test_sha256": hash_rows(self.comments, self.split.test),
            },
            "timing_s": {phase: round(seconds, 2) for phase, seconds in self.runtime.timing_s.items()},
        }


def check_vocabulary(side: str, tokens: Tokens, shape: ModelShape) -> None:
    """Refuse token ids that the model has no embedding for."""
    largest = int(tokens.ids.max(initial=0))
    release_pages(tokens.ids)
    if largest >= shape.vocabulary:
        raise InputError(
            f"--{side}_path: its tokenizer gives ids up to {largest}, its model has {shape.vocabulary} embeddings; "
            "they do not belong together"
        )


def summarize(result: TrainingResult) -> dict[str, int]:
    """Return what metrics.json says of a training: only what repeats exactly."""
    return {"best_epoch": result.best_epoch, "epochs_run": len(result.history), "skipped_steps": result.skipped_steps}


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def run_folds(config: ExperimentConfig, runtime: Runtime, run_dir: RunDirectory, first: Inputs) -> dict[str, Any]:
    """Run every fold in a directory of its own and write their mean and standard deviation beside them."""
    metrics = []
    for fold in range(config.num_folds):
        inputs = first if fold == 0 else load_inputs(config, fold)
        with RunDirectory(run_dir.path / f"fold_{fold + 1}") as fold_dir:
            status = fold_dir.claim(saved_settings(inputs.config) | {"fold": fold + 1})
            if status == "finished":
                fold_dir.check_tables(inputs.comments.file_sha256, inputs.config)
            else:
                log.info("fold %d of %d", fold + 1, config.num_folds)
                runtime.timing_s.clear()
                Experiment(inputs, runtime, fold_dir).run()
        metrics.append(json.loads((fold_dir.path / "metrics.json").read_text(encoding="utf-8")))
    total = aggregate_folds(metrics)
    write_report(run_dir.path, total)
    run_dir.write_metrics(total)
    return total
