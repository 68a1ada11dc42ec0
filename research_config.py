"""Experiment settings: one frozen dataclass, one flag per field, every check before anything is loaded.

Only the standard library is imported here, so `--help` and a bad flag answer at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.components import LOSS_COMPONENTS
from research.errors import quote_value
from research.flags import (
    RaisingParser,
    as_tuple,
    between,
    check_fields,
    fields_of_kind,
    fields_that_decide,
    find_missing,
    find_obstacle,
    make_parser,
    parse_flags,
    setting,
)
from research.models.mapping import parse_layer_mapping
from research.names import BOTH_MODELS, number_name
from research.settings.augmentation import AugmentationSettings, check_augmentation_flags
from research.settings.data import DataSettings, check_data_flags
from research.settings.runtime import RuntimeSettings, check_runtime_flags
from research.settings.search import SearchSettings, check_search
from research.settings.student import StudentSettings, check_student_flags
from research.settings.sweep import SweepSettings, check_sweep_flags
from research.settings.teacher import TeacherSettings
from research.settings.training import TrainingSettings


@dataclass(frozen=True)
class KDMethod:
    """A distillation method: the loss components it adds to the soft and the hard loss, by their names."""

    components: tuple[str, ...]
    summary: str

    @property
    def hidden(self) -> bool:
        """Whether hidden states are compared."""
        return self._needs("hidden_states")

    @property
    def attention(self) -> bool:
        """Whether attention is compared."""
        return self._needs("attentions")

    def _needs(self, output: str) -> bool:
        return any(component.needs == output and component.name in self.components for component in LOSS_COMPONENTS)


KD_METHODS: dict[str, KDMethod] = {
    "logit": KDMethod((), "alpha * soft + (1 - alpha) * hard"),
    "hidden": KDMethod(("hidden_loss",), "logit + hidden_loss_weight * distance of hidden states"),
    "attention": KDMethod(("attention_loss",), "logit + attention_loss_weight * distance of attention maps"),
    "multi_level": KDMethod(("hidden_loss", "attention_loss"), "logit + both"),
}


@dataclass(frozen=True)
class Pipeline:
    """Which models a pipeline needs; `teacher`, `student` and `tfidf` say what is trained or evaluated."""

    teacher: bool
    student: bool
    summary: str
    tfidf: bool = False

    @property
    def trains(self) -> frozenset[str]:
        """Which of MODEL_PARTS there are."""
        present = {
            "tokens": self.teacher or self.student,
            "teacher": self.teacher,
            "ensemble": self.teacher,
            "student": self.student,
            "distillation": self.teacher and self.student,
            "tfidf": self.tfidf,
        }
        return frozenset(name for name, is_there in present.items() if is_there)


PIPELINES: dict[str, Pipeline] = {
    "kd_only": Pipeline(True, True, "get the teacher, verify it, distil the student, evaluate both"),
    "student_only": Pipeline(False, True, "train the same student on the labels alone"),
    "baseline": Pipeline(True, False, "get the teacher and evaluate it, no compression"),
    "tfidf": Pipeline(False, False, "logistic regression on character n-grams, without a pretrained model", tfidf=True),
}
# What a field may say that it decides; caches, sweeps and comparisons ask for fields by these words.
DECIDED = {
    "flags": "what other flags hold; settled before a run begins",
    "models": "which models there are",
    "data": "the rows, their labels and the parts they are in",
    "tokens": "what of a text reaches the models",
    "teacher": "the teacher's fine-tuning",
    "ensemble": "which teachers speak together, each of them as it would alone",
    "student": "the student's training, with a teacher or without",
    "distillation": "what the student learns from the teacher",
    "control": "the control beside the student, which changes no other model",
    "scores": "how the models are scored, which changes none of them",
    "tfidf": "the fit of the model on character n-grams",
    "machine": "the last digits of the results, by where and in which order they are computed",
    "place": "nothing in the results: where they are written, how the work is shared, whether it may begin",
}
# Of these, a pipeline has some and leaves the others out.
MODEL_PARTS = frozenset({"tokens", "teacher", "ensemble", "student", "distillation", "control", "tfidf"})
# The order of the sections of --help.
GROUPS = ("what to run", "sweep", "data", "teacher", "student", "distillation", "training", "runtime and output")


@dataclass(frozen=True)
class ExperimentConfig(
    DataSettings,
    AugmentationSettings,
    TrainingSettings,
    RuntimeSettings,
    TeacherSettings,
    StudentSettings,
    SearchSettings,
    SweepSettings,
):
    """Every setting of one run; a field and its flag have the same name.

    Those of the data, of training, of the machine, of a sweep, of teachers and of the student stand in
    `research.settings`. `None` means "found from the data or the machine" and is resolved before
    training. Variants come from `dataclasses.replace`.
    """

    pipeline: str = setting(
        "kd_only",
        "what to run",
        "; ".join(f"{name}: {entry.summary}" for name, entry in PIPELINES.items()),
        choices=tuple(PIPELINES),
        decides="models",
    )
    demo: bool = setting(
        False, "what to run", "run offline on a small synthetic corpus with tiny models built on the spot", decides="flags"
    )
    seed: int = setting(
        42, "what to run", "seed of the student's weights, its batches and its dropout", check=between(0), decides="student"
    )
    split_seed: int = setting(
        42,
        "what to run",
        "seed of the split, the views and the teacher's fine-tuning; runs that differ by --seed share these",
        check=between(0),
        decides=("data", "teacher"),
    )
    dry_run: bool = setting(False, "what to run", "say what would be run and what is there already, and stop", decides="place")
    prepare_only: bool = setting(
        False,
        "what to run",
        "fill the cache with tokens, teacher and teacher outputs of the run, or of all runs of --sweep; train no student",
        decides="place",
    )
    num_folds: int = setting(1, "what to run", "folds of cross-validation; 1 is one split", check=between(1), decides="data")

    kd_method: str = setting(
        "logit",
        "distillation",
        "; ".join(f"{name}: {entry.summary}" for name, entry in KD_METHODS.items()),
        choices=tuple(KD_METHODS),
        decides="distillation",
    )
    kd_alpha: float = setting(
        0.7,
        "distillation",
        "weight of the teacher's soft labels, 0 to 1; the rest goes to the hard labels",
        check=between(0, 1),
        decides="distillation",
    )
    kd_temperature: float = setting(
        4.0,
        "distillation",
        "softening of both models' logits, greater than 0",
        check=between(0, open_low=True, note="1 leaves logits unsoftened"),
        decides="distillation",
    )
    with_control: bool = setting(
        False,
        "distillation",
        "also train the student without the teacher, so the report says what distillation gained",
        decides="control",
    )
    control_labels: str = setting(
        "gold",
        "distillation",
        "gold: the control learns from the labelled rows; pseudo: also from the rows of --unlabelled_path, as the teacher "
        "decides them at its tuned thresholds, so that it takes as many steps as the student",
        choices=("gold", "pseudo"),
        decides="control",
    )
    label_alphas: tuple[str, ...] = setting(
        (),
        "distillation",
        "alpha of single labels instead of --kd_alpha, as in threat=0.9 bully=0.5",
        metavar="LABEL=A",
        decides="distillation",
    )
    hidden_loss_weight: float = setting(
        0.3, "distillation", "weight of the hidden-state loss, 0 or more", check=between(0), decides="distillation"
    )
    attention_loss_weight: float = setting(
        0.2, "distillation", "weight of the attention loss, 0 or more", check=between(0), decides="distillation"
    )
    hidden_objective: str = setting(
        "mse", "distillation", "distance of hidden states", choices=("mse", "cosine"), decides="distillation"
    )
    attention_objective: str = setting(
        "mse",
        "distillation",
        "mse: head-averaged maps; kl: row-wise divergence of the maps; relation: MiniLM self-attention relations",
        choices=("mse", "kl", "relation"),
        decides="distillation",
    )
    rank_loss_weight: float = setting(
        0.0,
        "distillation",
        "weight of the rank loss, 0 or more: within a batch, a label's logits should order the texts as the teacher's do",
        check=between(0),
        decides="distillation",
    )
    rank_objective: str = setting(
        "pearson",
        "distillation",
        "rank loss of a label: pearson: 1 - correlation of both models' logits; pairwise: RankNet over the pairs of texts, "
        "weighted by the difference of the teacher's probabilities",
        choices=("pearson", "pairwise"),
        decides="distillation",
    )
    layer_mapping: str = setting(
        "uniform",
        "distillation",
        "teacher:student layers, as in 2:1,4:2,12:6, or a strategy: uniform, last, first",
        decides="distillation",
    )
    t_squared: bool = setting(True, "distillation", "multiply the soft loss by the squared temperature", decides="distillation")
    anneal_labels: bool = setting(
        False,
        "distillation",
        "let the labels take over the teacher's share of the loss, from none of it at the first step to all at the last",
        decides="distillation",
    )
    undo_class_weights: bool = setting(
        False,
        "distillation",
        "take the logarithm of the class weights, which fine-tuning with --class_weights added, off the teacher's logits "
        "before the student learns from them",
        decides="distillation",
    )
    class_weights: bool = setting(
        True,
        "distillation",
        "weight positives by negatives / positives in the hard loss",
        decides=(*BOTH_MODELS, "tfidf"),
    )

    @property
    def label_alpha_map(self) -> dict[str, float]:
        """`--label_alphas` as {label: alpha}."""
        pairs = (entry.rsplit("=", 1) for entry in self.label_alphas)
        return {label: float(value) for label, value in pairs}

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """`--teacher_checkpoint` as a list."""
        return as_tuple(self.teacher_checkpoint)

    @property
    def num_fine_tuned(self) -> int:
        """How many teachers are fine-tuned from `--teacher_path`, in a pipeline that has any."""
        if self.checkpoints:
            return 0
        return self.teacher_seeds or (1 if self.teacher_probs_path is None else 0)

    @property
    def method(self) -> KDMethod:
        """What `--kd_method` compares."""
        return KD_METHODS[self.kd_method]

    @property
    def run_dir(self) -> Path:
        """`--output_dir`, or a folder under results/ named by what the run computes."""
        return Path(self.output_dir or f"results/{self.pipeline}_{self.fingerprint}")

    @property
    def fingerprint(self) -> str:
        """Ten hex digits of a hash over every flag that decides results."""
        text = json.dumps(saved_settings(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def saved_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return what `config.json` holds: every flag that can change a result."""
    places = fields_that_decide(config, "place")
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in places
    }


def settings_that_decide(config: ExperimentConfig, what: str) -> dict[str, Any]:
    """Return {field: value} of the fields that decide something of DECIDED by their value.

    A model or table is left out: what decides is its content, not its name. So is a field at its default that came
    after cache keys were made of the others.
    """
    left_out = {*fields_of_kind(config, "model"), *fields_of_kind(config, "table"), *_unkeyed_defaults(config)}
    return {name: getattr(config, name) for name in fields_that_decide(config, what) if name not in left_out}


def _unkeyed_defaults(config: ExperimentConfig) -> list[str]:
    """Return the fields that cache keys name only away from their defaults, and that are at them."""
    return [
        entry.name
        for entry in dataclasses.fields(config)
        if not entry.metadata["keyed_at_default"] and getattr(config, entry.name) == entry.default
    ]


def table_paths(config: ExperimentConfig) -> dict[str, Path]:
    """Return the tables that a run reads, by what their rows are called: main, ..., unlabelled, unlabelled_2, teacher_probs."""
    return {
        number_name(entry.metadata["rows"], number): Path(path)
        for entry in dataclasses.fields(config)
        if entry.metadata["rows"] is not None
        for number, path in enumerate(as_tuple(getattr(config, entry.name)), 1)
    }


def unused_fields(pipeline: str, config: Any = ExperimentConfig) -> frozenset[str]:
    """Return the fields that a pipeline never reads: those that decide only what it does not train."""
    if pipeline not in PIPELINES:
        return frozenset()
    untrained = MODEL_PARTS - PIPELINES[pipeline].trains
    return frozenset(entry.name for entry in dataclasses.fields(config) if entry.metadata["decides"] <= untrained)


@dataclass(frozen=True)
class Arguments:
    """The parsed command line: the config, and the fields that a flag or the --config file set."""

    config: ExperimentConfig
    explicit: frozenset[str]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse and check the command line.

    Raises:
        FlagErrors: every problem found, together; nothing has been loaded or written.
        HelpAsked: for --help.
    """
    # A fold's config.json says which fold it is; repeating it repeats the whole cross-validation.
    return Arguments(*parse_flags(ExperimentConfig, build_parser(), argv, check_config, other_keys=("fold",)))


EPILOG = """Examples:
  python research_main.py --demo
  python research_main.py --dataset_path comments.csv --student_path csebuetnlp/banglabert --student_layers 3 --pooling mean
  python research_main.py --dataset_path tweets.csv --label_list_column labels --pipeline tfidf
  python research_main.py --sweep kd_alpha=0.3,0.5,0.7 --sweep seed=1,2,3 --jobs 2 --output_dir results/grid

Exit status: 0 done, 1 failed while running, 2 bad flags or input, 3 teacher too weak, 130 interrupted: run it again and
it goes on."""


def build_parser() -> RaisingParser:
    """Build the command line's parser from the fields of ExperimentConfig."""
    return make_parser(
        ExperimentConfig,
        GROUPS,
        prog="research_main.py",
        usage="python %(prog)s [--flag VALUE ...]",
        description="Distil a large multi-label text classifier into a small one. One command is one run.",
        epilog=EPILOG,
    )


def check_config(config: ExperimentConfig) -> list[str]:
    """Return every problem that can be seen without reading a file, as `--flag: what` lines."""
    return [
        *check_fields(config),
        *check_distillation(config),
        *check_teachers(config),
        *check_start(config),
        *check_student_flags(config),
        *check_data_flags(config),
        *check_augmentation_flags(config, PIPELINES.get(config.pipeline), has_layers(config)),
        *check_sweep_flags(config),
        *(check_search(config, list_trained(config), check_config) if config.search else ()),
        *check_runtime_flags(config),
        *check_places(config),
    ]


def list_trained(config: ExperimentConfig) -> list[str]:
    """Return which of teacher and student a run trains."""
    if config.pipeline not in PIPELINES:
        return []
    pipeline = PIPELINES[config.pipeline]
    trained = {"teacher": pipeline.teacher and config.num_fine_tuned > 0, "student": pipeline.student}
    return [model for model, is_trained in trained.items() if is_trained]


def check_distillation(config: ExperimentConfig) -> list[str]:
    """Return the problems with the distillation flags, by themselves and together."""
    problems = []
    labels = [entry.rpartition("=")[0] for entry in config.label_alphas]
    for entry in config.label_alphas:
        label, _, alpha = entry.rpartition("=")
        try:
            valid = label != "" and 0 <= float(alpha) <= 1
        except ValueError:
            valid = False
        if not valid:
            problems.append(
                f"--label_alphas: {quote_value(entry)} is not LABEL=ALPHA with an alpha from 0 to 1, as in threat=0.9"
            )
    repeated = sorted({label for label in labels if label and labels.count(label) > 1})
    problems += [f"--label_alphas: {quote_value(label)} is given twice" for label in repeated]
    problems += check_losses(config)
    try:
        parse_layer_mapping(config.layer_mapping)
    except ValueError as error:
        problems.append(f"--layer_mapping: {error}")
    compares_layers = config.kd_method in KD_METHODS and bool(config.method.components)
    if config.student_kind == "static" and compares_layers and config.pipeline == "kd_only":
        problems.append(f"--student_kind: static has no layers for --kd_method {config.kd_method} to compare; use logit")
    if config.with_control and config.pipeline in PIPELINES and config.pipeline != "kd_only":
        problems.append(f"--with_control: needs --pipeline kd_only, whose student it is compared with, got {config.pipeline}")
    if config.control_labels == "pseudo" and not (config.with_control and config.unlabelled_path):
        missing = "--unlabelled_path" if config.with_control else "--with_control"
        problems.append(f"--control_labels: pseudo labels the rows of --unlabelled_path for the control; set {missing} too")
    return problems


def check_losses(config: ExperimentConfig) -> list[str]:
    """Return the problems with the flags of what the student learns from the teacher's logits."""
    problems = []
    if config.rank_loss_weight > 0 and config.batch < 2:
        problems.append(f"--rank_loss_weight: orders the texts of a batch, so --batch must be at least 2, got {config.batch}")
    if config.anneal_labels and not any([config.kd_alpha, *config.label_alpha_map.values()]):
        problems.append("--anneal_labels: hands alpha's share to the labels, and --kd_alpha is 0; raise it, or drop the flag")
    if config.undo_class_weights and not config.class_weights:
        problems.append("--undo_class_weights: takes back what --class_weights does; drop --no-class_weights, or this flag")
    foreign = "--teacher_checkpoint" if config.checkpoints else "--teacher_probs_path" if config.teacher_probs_path else None
    if config.undo_class_weights and foreign is not None:
        problems.append(
            f"--undo_class_weights: needs teachers fine-tuned by this run; {foreign} does not say with which class weights "
            "it was made. Fine-tune one from --teacher_path, or drop the flag."
        )
    if config.rank_loss_weight > 0 and not has_layers(config) and not config.teacher_tfidf:
        problems.append(
            "--rank_loss_weight: orders all texts of a batch, and --teacher_probs_path alone may say nothing of some; add "
            "--teacher_checkpoint, --teacher_seeds or --teacher_tfidf"
        )
    return problems


def check_teachers(config: ExperimentConfig) -> list[str]:
    """Return the problems of the teachers that a run has by its flags."""
    problems = []
    checkpoints = config.checkpoints
    if checkpoints and config.teacher_seeds is not None:
        problems.append(
            f"--teacher_seeds: {config.teacher_seeds} would be fine-tuned from --teacher_path, and --teacher_checkpoint gives "
            "teachers that are; drop one of the two"
        )
    if config.pipeline in PIPELINES and PIPELINES[config.pipeline].student and not has_layers(config):
        wanting = {f"--kd_method: {config.kd_method}": config.kd_method in KD_METHODS and config.kd_method != "logit"}
        wanting["--student_init: teacher"] = config.student_init == "teacher"
        problems += [
            f"{flag} needs the layers of a teacher, and --teacher_probs_path alone has none; add --teacher_checkpoint or "
            "--teacher_seeds"
            for flag, is_asked in wanting.items()
            if is_asked and PIPELINES[config.pipeline].teacher
        ]
    return problems


def has_layers(config: ExperimentConfig) -> bool:
    """Whether a run of this config has a teacher that is a model, and not a table of probabilities only."""
    return bool(config.checkpoints) or config.num_fine_tuned > 0


def check_start(config: ExperimentConfig) -> list[str]:
    """Return the problems of what the student starts as."""
    problems = []
    if config.student_init == "teacher" and config.pipeline in PIPELINES and not PIPELINES[config.pipeline].teacher:
        problems.append(f"--student_init: teacher needs a pipeline with a teacher, got --pipeline {config.pipeline}")
    default = ExperimentConfig.__dataclass_fields__["student_layer_choice"].default
    if config.student_layer_choice != default and config.student_layers is None:
        problems.append(
            f"--student_layer_choice: {config.student_layer_choice} needs --student_layers, the number of layers to keep"
        )
    elif config.student_layer_choice != default and config.student_init == "random":
        problems.append(
            f"--student_layer_choice: {config.student_layer_choice} chooses among trained layers; --student_init random has none"
        )
    return problems


def check_places(config: ExperimentConfig) -> list[str]:
    """Return the problems of the paths: tables that are not there, folders that cannot be written."""
    problems = []
    for entry in dataclasses.fields(config):
        path, kind = getattr(config, entry.name), entry.metadata["kind"]
        if kind == "folder":
            obstacle = find_obstacle(config.run_dir if entry.name == "output_dir" else Path(path))
            found = [obstacle and f"{obstacle}. Choose another folder."]
        # The demo builds each table and model that a run cannot do without.
        elif path is None or (config.demo and entry.default is not None):
            continue
        else:
            found = [find_missing(place, kind) for place in (path if isinstance(path, tuple) else (path,))]
        problems += [f"--{entry.name}: {problem}" for problem in found if problem]
    return problems
