"""Experiment settings: one frozen dataclass, one flag per field, every check before anything is loaded.

Only the standard library is imported here, so `--help` and a bad flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import stat
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from research.errors import FlagErrors
from research.flags import describe
from research.models.mapping import parse_layer_mapping
from research.models.pooling import POOLINGS


@dataclass(frozen=True)
class KDMethod:
    """What a distillation method compares beside the labels and the teacher's logits."""

    hidden: bool
    attention: bool
    summary: str


KD_METHODS: dict[str, KDMethod] = {
    "logit": KDMethod(False, False, "alpha * soft + (1 - alpha) * hard"),
    "hidden": KDMethod(True, False, "logit + hidden_loss_weight * distance of hidden states"),
    "attention": KDMethod(False, True, "logit + attention_loss_weight * distance of attention maps"),
    "multi_level": KDMethod(True, True, "logit + both"),
}


@dataclass(frozen=True)
class Pipeline:
    """Which models a pipeline needs; `teacher` and `student` say what is trained or evaluated."""

    teacher: bool
    student: bool
    summary: str


PIPELINES: dict[str, Pipeline] = {
    "kd_only": Pipeline(True, True, "get the teacher, verify it, distil the student, evaluate both"),
    "student_only": Pipeline(False, True, "train the same student on the labels alone"),
    "baseline": Pipeline(True, False, "get the teacher and evaluate it, no compression"),
}
# Each is its own library, installed by those who use it: none of them is a requirement.
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
# Past this a seed, a size or a count overflows in one of the libraries below.
LARGEST_WHOLE_NUMBER = 2**31 - 1
Check = Callable[[Any], str | None]


def between(low: float, high: float = math.inf, *, open_low: bool = False, note: str = "") -> Check:
    """Return a check that a number lies in [low, high], or in (low, high] with `open_low`."""
    bounds = [f"greater than {low}" if open_low else f"at least {low}"]
    if high < math.inf:
        bounds.append(f"at most {high}")

    def check(value: float) -> str | None:
        inside = (low < value if open_low else low <= value) and value <= high
        return None if inside else f"must be {' and '.join(bounds)}, got {value}" + (f" ({note})" if note else "")

    return check


def setting(
    default: Any,
    group: str,
    help_text: str,
    *,
    choices: Sequence[str] | None = None,
    check: Check | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare one config field together with everything its flag needs."""
    metadata = {"group": group, "help": help_text, "choices": choices, "check": check, "metavar": metavar}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ExperimentConfig:
    """Every setting of one run; a field and its flag have the same name.

    `None` means "found from the data or the machine" and is resolved before training. Variants
    come from `dataclasses.replace`.
    """

    pipeline: str = setting(
        "kd_only",
        "what to run",
        "; ".join(f"{name}: {entry.summary}" for name, entry in PIPELINES.items()),
        choices=tuple(PIPELINES),
    )
    demo: bool = setting(False, "what to run", "run offline on a small synthetic corpus with tiny models built on the spot")
    seed: int = setting(42, "what to run", "seed of the student's weights, its batches and its dropout", check=between(0))
    split_seed: int = setting(
        42,
        "what to run",
        "seed of the split and of the teacher's fine-tuning; runs that differ by --seed share test part and teacher",
        check=between(0),
    )
    sweep: tuple[str, ...] = setting(
        (),
        "what to run",
        "run the product of these values, as in kd_alpha=0.3,0.5 kd_temperature=2,4; each run gets a folder below --output_dir",
        metavar="FLAG=V1,V2",
    )
    jobs: int = setting(1, "what to run", "worker processes of --sweep", check=between(1))
    num_folds: int = setting(1, "what to run", "folds of cross-validation; 1 is one split", check=between(1))

    dataset_path: str = setting(
        "data/comments.csv", "data", "table of comments: .csv, .tsv, .jsonl (or .xlsx, .parquet with pandas)"
    )
    text_column: str | None = setting(None, "data", "column holding the text (default: found by its name)")
    label_columns: tuple[str, ...] | None = setting(
        None,
        "data",
        "columns holding the 0/1 labels (default: bully sexual religious threat spam when all are present, "
        "else every other column that holds only 0 and 1)",
        metavar="NAME",
    )
    unlabelled_path: str | None = setting(
        None, "data", "table of further texts without labels, for the soft, hidden and attention losses"
    )
    val_fraction: float = setting(
        0.1, "data", "share of the texts for validation, 0 to 0.9", check=between(0, 0.9, open_low=True)
    )
    test_fraction: float = setting(
        0.1, "data", "share of the texts for the test part, 0 to 0.9", check=between(0, 0.9, open_low=True)
    )
    val_path: str | None = setting(None, "data", "a table of its own for validation, instead of a share")
    test_path: str | None = setting(None, "data", "a table of its own for the test part, instead of a share")
    data_fraction: float = setting(
        1.0,
        "data",
        "share of the training texts to use, 0 to 1; validation and test stay whole",
        check=between(0, 1, open_low=True),
    )
    max_length: int = setting(128, "data", "longest text in tokens, special tokens included", check=between(4))
    text_normalization: str = setting(
        "nfc", "data", "Unicode normalisation of the texts before tokenising", choices=("none", "nfc", "nfkc")
    )

    teacher_path: str = setting("csebuetnlp/banglabert", "teacher", "pretrained encoder to fine-tune: folder or hub name")
    teacher_checkpoint: str | None = setting(
        None,
        "teacher",
        "a fine-tuned teacher: a run's teacher/ folder, an AutoModelForSequenceClassification folder or hub name, "
        "or a folder with encoder/ and a head file",
    )
    teacher_epochs: int = setting(10, "teacher", "most epochs of the teacher's fine-tuning", check=between(1))
    min_teacher_f1: float = setting(
        0.4, "teacher", "validation macro-F1 under which the teacher is too weak, 0 to 1", check=between(0, 1)
    )
    allow_weak_teacher: bool = setting(False, "teacher", "distil even from a teacher under --min_teacher_f1")

    student_path: str = setting(
        "distilbert-base-multilingual-cased", "student", "pretrained encoder of the student: folder or hub name"
    )
    student_hidden_size: int = setting(256, "student", "hidden width of the student's classifier", check=between(1))
    student_init: str = setting(
        "pretrained",
        "student",
        "start of the student's encoder: its pretrained weights, the fine-tuned teacher's own layers, or random",
        choices=("pretrained", "teacher", "random"),
    )
    student_layers: int | None = setting(
        None,
        "student",
        "keep this many of the encoder's layers, those the uniform mapping would pair (default: all)",
        check=between(1),
    )
    pooling: str = setting(
        "cls",
        "student",
        "text vector of both models; " + "; ".join(f"{name}: {meaning}" for name, meaning in POOLINGS.items()),
        choices=tuple(POOLINGS),
    )
    freeze_student_encoder: bool = setting(False, "student", "train the student's classifier only")

    kd_method: str = setting(
        "logit",
        "distillation",
        "; ".join(f"{name}: {entry.summary}" for name, entry in KD_METHODS.items()),
        choices=tuple(KD_METHODS),
    )
    kd_alpha: float = setting(
        0.7,
        "distillation",
        "weight of the teacher's soft labels, 0 to 1; the rest goes to the hard labels",
        check=between(0, 1),
    )
    kd_temperature: float = setting(
        4.0,
        "distillation",
        "softening of both models' logits, greater than 0",
        check=between(0, open_low=True, note="1 leaves logits unsoftened"),
    )
    with_control: bool = setting(
        False, "distillation", "also train the student without the teacher, so the report says what distillation gained"
    )
    label_alphas: tuple[str, ...] = setting(
        (), "distillation", "alpha of single labels instead of --kd_alpha, as in threat=0.9 bully=0.5", metavar="LABEL=A"
    )
    hidden_loss_weight: float = setting(0.3, "distillation", "weight of the hidden-state loss, 0 or more", check=between(0))
    attention_loss_weight: float = setting(0.2, "distillation", "weight of the attention loss, 0 or more", check=between(0))
    hidden_objective: str = setting("mse", "distillation", "distance of hidden states", choices=("mse", "cosine"))
    attention_objective: str = setting(
        "mse",
        "distillation",
        "mse: head-averaged maps; kl: row-wise divergence of the maps; relation: MiniLM self-attention relations",
        choices=("mse", "kl", "relation"),
    )
    layer_mapping: str = setting(
        "uniform",
        "distillation",
        "teacher:student layers, as in 2:1,4:2,12:6, or a strategy: uniform, last, first",
    )
    t_squared: bool = setting(True, "distillation", "multiply the soft loss by the squared temperature")
    class_weights: bool = setting(True, "distillation", "weigh positives by negatives / positives in the hard loss")

    epochs: int = setting(15, "training", "most epochs of the student", check=between(1))
    batch: int = setting(32, "training", "rows in a batch", check=between(1))
    gradient_accumulation: int = setting(1, "training", "batches summed up before an optimizer step", check=between(1))
    lr: float = setting(2e-5, "training", "peak learning rate, greater than 0", check=between(0, open_low=True))
    weight_decay: float = setting(0.01, "training", "decoupled weight decay, 0 or more", check=between(0))
    warmup_ratio: float = setting(0.1, "training", "share of the steps with a rising learning rate, 0 to 1", check=between(0, 1))
    dropout: float = setting(0.1, "training", "dropout in both classifiers, 0 to 0.9", check=between(0, 0.9))
    gradient_clip_norm: float = setting(
        1.0, "training", "largest norm of the gradient, greater than 0", check=between(0, open_low=True)
    )
    early_stopping_patience: int = setting(
        5, "training", "epochs without a better validation macro-F1 before stopping", check=between(1)
    )
    amp: bool = setting(True, "training", "automatic mixed precision (float16 is used on CUDA only)")
    amp_dtype: str = setting(
        "float16", "training", "precision of --amp; bfloat16 also works on CPUs that have it", choices=("float16", "bfloat16")
    )

    device: str = setting("auto", "runtime and output", "auto (cuda when there is one), cpu, cuda, cuda:1")
    num_threads: int | None = setting(None, "runtime and output", "CPU threads (default: torch's own choice)", check=between(1))
    checkpoint_minutes: float = setting(
        10.0,
        "runtime and output",
        "minutes between checkpoints inside an epoch; one is also written after each",
        check=between(0),
    )
    output_dir: str | None = setting(
        None, "runtime and output", "where the run is written (default: results/<pipeline>_<fingerprint>)"
    )
    cache_dir: str = setting("cache", "runtime and output", "what runs share: tokenised text, teachers, teacher outputs")
    cache_budget_gb: float = setting(
        20.0,
        "runtime and output",
        "most GB (10^9 bytes) of cached teacher states and maps of one run; past it the teacher runs live",
        check=between(0),
    )
    track: str = setting(
        "none", "runtime and output", "also send config, history and final scores to a tracker", choices=("none", *TRACKERS)
    )
    overwrite: bool = setting(False, "runtime and output", "start afresh in an output_dir that already holds a run")

    @property
    def label_alpha_map(self) -> dict[str, float]:
        """`--label_alphas` as {label: alpha}."""
        pairs = (entry.rsplit("=", 1) for entry in self.label_alphas)
        return {label: float(value) for label, value in pairs}

    @property
    def method(self) -> KDMethod:
        return KD_METHODS[self.kd_method]

    @property
    def run_dir(self) -> Path:
        """`--output_dir`, or a folder under results/ named by what the run computes."""
        return Path(self.output_dir or f"results/{self.pipeline}_{self.fingerprint}")

    @property
    def fingerprint(self) -> str:
        text = json.dumps(saved_settings(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


# Where a run is written, how it shares its work and whether it may begin decide nothing in its results.
PLACE_FIELDS = frozenset({
    "output_dir", "cache_dir", "overwrite", "checkpoint_minutes", "sweep", "jobs", "track",
    "min_teacher_f1", "allow_weak_teacher",
})  # fmt: skip


def saved_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return what `config.json` holds: every flag that can change a result."""
    values = dataclasses.asdict(config)
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if name not in PLACE_FIELDS
    }


class _RaisingParser(argparse.ArgumentParser):
    """An argparse parser that raises its complaint, so it can be reported together with the others."""

    def error(self, message: str) -> NoReturn:
        raise FlagErrors([message.removeprefix("argument ")])


def build_parser() -> argparse.ArgumentParser:
    """Build the parser from the fields of ExperimentConfig; values stay text until `convert`."""
    parser = _RaisingParser(
        prog="research_main.py",
        usage="python %(prog)s [--flag VALUE ...]",
        description="Distil a large multi-label text classifier into a small one. One command is one run.",
        epilog="Exit status: 0 done, 1 failed while running, 2 bad flags or input, 3 teacher too weak, 130 interrupted.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="take the flags of an earlier run's config.json; flags given beside it win"
    )
    for title, entries in itertools.groupby(dataclasses.fields(ExperimentConfig), lambda entry: entry.metadata["group"]):
        group = parser.add_argument_group(title)
        for entry in entries:
            group.add_argument(f"--{entry.name}", **flag_options(entry))
    return parser


def flag_options(entry: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return what argparse needs to know of a field's flag."""
    meta, default = entry.metadata, entry.default
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
    help_text = meta["help"] if shown is None or shown == () else f"{meta['help']} (default: {shown})"
    options: dict[str, Any] = {"help": help_text.replace("%", "%%")}
    if isinstance(default, bool):
        return options | {"action": argparse.BooleanOptionalAction}
    if meta["choices"]:
        return options | {"metavar": "{" + ",".join(meta["choices"]) + "}"}
    if accepts(entry.name, tuple):
        return options | {"metavar": meta["metavar"], "nargs": "+"}
    return options | {"metavar": "N" if accepts(entry.name, int) else "X" if accepts(entry.name, float) else "TEXT"}


@functools.cache
def field_types() -> dict[str, tuple[Any, ...]]:
    """Return the types each field accepts, as {"student_layers": (int, NoneType)}."""
    hints = typing.get_type_hints(ExperimentConfig)
    options = {name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for name, hint in hints.items()}
    return {name: tuple(typing.get_origin(option) or option for option in found) for name, found in options.items()}


def accepts(name: str, kind: type) -> bool:
    return kind in field_types()[name]


@dataclass(frozen=True)
class Arguments:
    """The parsed command line: the config, and the fields that a flag or the --config file set."""

    config: ExperimentConfig
    explicit: frozenset[str]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse and check the command line.

    Raises:
        FlagErrors: every fault found, together; nothing has been loaded or written.
        SystemExit: after --help.
    """
    given, faults = read_flags(argv)
    values: dict[str, Any] = {}
    if (path := given.pop("config", None)) is not None:
        values, config_faults = read_config_file(Path(path))
        faults += config_faults
    for name, value in given.items():
        try:
            values[name] = convert(name, value)
        except ValueError as error:
            faults.append(f"--{name}: {error}")
    config = ExperimentConfig(**values)
    # A flag that could not be read holds its default here: what is wrong with that is not the user's doing.
    unread = tuple(fault.partition(":")[0] + ":" for fault in faults)
    faults += [fault for fault in check_config(config) if not fault.startswith(unread)]
    if faults:
        raise FlagErrors(faults)
    return Arguments(config, frozenset(values))


def read_flags(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the flags' values, as text, and the faults; each flag is parsed on its own, so none hides another."""
    parser = build_parser()
    given: dict[str, Any] = {}
    faults: list[str] = []
    for words in split_at_flags(argv):
        try:
            found, extra = parser.parse_known_args(words)
        except FlagErrors as error:
            faults += error.faults
            continue
        if not vars(found):
            faults.append(describe_unknown(words[0]))
        elif extra:
            faults.append(f"{words[0].partition('=')[0]}: has no place for {describe(' '.join(extra))}")
        for name, value in vars(found).items():
            if name == "sweep":
                value = [*given.get(name, []), *value]
            elif isinstance(value, list) and name in given:
                faults.append(f"--{name}: is given twice; list its values after one --{name}")
            given[name] = value
    return given, faults


def split_at_flags(argv: Sequence[str]) -> Iterator[list[str]]:
    """Yield each flag together with its values."""
    starts = [position for position, word in enumerate(argv) if position == 0 or word.startswith("--") or word == "-h"]
    for start, end in itertools.pairwise([*starts, len(argv)]):
        words = list(argv[start:end])
        # Joined, since argparse takes a lone -1e-5 for a flag.
        yield ["=".join(words)] if len(words) == 2 and words[0].startswith("--") and "=" not in words[0] else words


def describe_unknown(word: str) -> str:
    if not word.startswith("--"):
        return f"{describe(word)}: a value without a flag"
    from difflib import get_close_matches  # only a mistake pays for importing it

    flag = word.partition("=")[0]
    near = get_close_matches(flag, [f"--{entry.name}" for entry in dataclasses.fields(ExperimentConfig)], n=1)
    return f"{flag}: unknown flag; " + (f"did you mean {near[0]}?" if near else "--help lists them")


def read_config_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read an earlier run's config.json into field values and the faults found in it."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}, [f"--config: no such file: {path}"]
    except OSError as error:
        return {}, [f"--config: {path} cannot be read: {error.strerror}"]
    except (ValueError, RecursionError) as error:
        return {}, [f"--config: {path} is not JSON: {error}"]
    if not isinstance(loaded, dict):
        return {}, [f"--config: {path} holds no settings: expected an object with a key per flag"]
    values, faults = {}, []
    # A fold's config.json says which fold it is; repeating it repeats the whole cross-validation.
    loaded.pop("fold", None)
    for name, value in loaded.items():
        if name not in field_types():
            faults.append(f"--config: {path} names an unknown flag {describe(name)}")
            continue
        try:
            values[name] = convert(name, value)
        except ValueError as error:
            faults.append(f"--{name}: {error}, in {path}")
    return values, faults


def convert(name: str, value: Any) -> Any:
    """Turn a flag's text or a JSON value into the field's type.

    Raises:
        ValueError: what was expected and what came, without the flag's name.
    """
    if value is None and accepts(name, type(None)):
        return None
    if accepts(name, bool):
        if isinstance(value, bool):
            return value
        raise ValueError(f"must be true or false, got {describe(value)}")
    if accepts(name, tuple):
        if isinstance(value, list) and all(map(is_plain_text, value)):
            return tuple(value)
        raise ValueError(f"must be a list of names, got {describe(value)}")
    if accepts(name, str):
        if is_plain_text(value):
            return value
        raise ValueError(f"must be a text that is not empty, got {describe(value)}")
    return convert_number(value, int if accepts(name, int) else float)


def is_plain_text(value: Any) -> bool:
    """Whether a value is a text that can name a file or a column."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell but nothing can write
        return False
    return True


def convert_number(value: Any, kind: type[int] | type[float]) -> int | float:
    word = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = kind(value)
        if isinstance(value, float) and number != value:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"must be {word}, got {describe(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {describe(value)}")
    if kind is int and number > LARGEST_WHOLE_NUMBER:
        raise ValueError(f"must be at most {LARGEST_WHOLE_NUMBER}, got {describe(value)}")
    return number


def check_config(config: ExperimentConfig) -> list[str]:
    """Return every fault that can be seen without reading a file, as `--flag: what` lines."""
    faults = []
    for entry in dataclasses.fields(config):
        value, meta = getattr(config, entry.name), entry.metadata
        if meta["choices"] and value not in meta["choices"]:
            faults.append(f"--{entry.name}: must be one of {', '.join(meta['choices'])}, got {describe(value)}")
        elif meta["check"] and value is not None and (fault := meta["check"](value)):
            faults.append(f"--{entry.name}: {fault}")
    return (
        faults
        + check_distillation(config)
        + check_data_flags(config)
        + check_device(config)
        + check_tracker(config)
        + check_places(config)
    )


def check_distillation(config: ExperimentConfig) -> list[str]:
    faults = []
    labels = [entry.rpartition("=")[0] for entry in config.label_alphas]
    for entry in config.label_alphas:
        label, _, alpha = entry.rpartition("=")
        try:
            valid = label != "" and 0 <= float(alpha) <= 1
        except ValueError:
            valid = False
        if not valid:
            faults.append(f"--label_alphas: {describe(entry)} is not LABEL=ALPHA with an alpha from 0 to 1, as in threat=0.9")
    for label in sorted({label for label in labels if label and labels.count(label) > 1}):
        faults.append(f"--label_alphas: {describe(label)} is given twice")
    try:
        parse_layer_mapping(config.layer_mapping)
    except ValueError as error:
        faults.append(f"--layer_mapping: {error}")
    if config.student_init == "teacher" and config.pipeline in PIPELINES and not PIPELINES[config.pipeline].teacher:
        faults.append(f"--student_init: teacher needs a pipeline with a teacher, got --pipeline {config.pipeline}")
    if config.with_control and config.pipeline in PIPELINES and config.pipeline != "kd_only":
        faults.append(f"--with_control: needs --pipeline kd_only, whose student it is compared with, got {config.pipeline}")
    return faults


def check_data_flags(config: ExperimentConfig) -> list[str]:
    faults = []
    columns = config.label_columns
    if columns == ():
        faults.append("--label_columns: names no column; leave it out to have the columns found")
    elif columns is not None and len(set(columns)) < len(columns):
        faults.append(f"--label_columns: a column is named twice in {describe(' '.join(columns))}")
    if config.text_column is not None and config.text_column in (columns or ()):
        faults.append(f"--text_column: {describe(config.text_column)} is also one of --label_columns")
    if config.num_folds > 1 and config.test_path:
        faults.append("--num_folds: folds make their own test parts; drop --test_path")
    shares = (0 if config.val_path else config.val_fraction) + (0 if config.test_path else config.test_fraction)
    if shares >= 1:
        faults.append(f"--val_fraction: must be under 1 together with --test_fraction, got {shares:g}")
    return faults


def check_device(config: ExperimentConfig) -> list[str]:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", config.device):
        return []
    return [f"--device: must be auto, cpu, cuda or cuda:N, got {describe(config.device)}"]


def check_tracker(config: ExperimentConfig) -> list[str]:
    """Say so before anything is computed when the tracker's library is not there."""
    name = config.track
    if name not in TRACKERS or name in sys.modules or importlib.util.find_spec(name) is not None:
        return []
    return [f"--track: the package {name} is not installed; pip install {name}, or leave out --track"]


def check_places(config: ExperimentConfig) -> list[str]:
    """Return the faults in the paths: tables that are not there, folders that cannot be written."""
    tables = {"dataset_path", "unlabelled_path", "val_path", "test_path"}
    models = {"teacher_path", "teacher_checkpoint", "student_path"}
    if config.demo:  # which builds these itself
        tables.remove("dataset_path")
        models -= {"teacher_path", "student_path"}
    faults = []
    # os.path answers no for a path the system refuses, where pathlib raises.
    for name in sorted(tables):
        path = getattr(config, name)
        if path is not None and not os.path.isfile(path):
            what = "is a folder" if os.path.isdir(path) else "no such file"
            faults.append(f"--{name}: {what}: {describe(path)}. Give a .csv, .tsv or .jsonl table.")
    for name in sorted(models):
        path = getattr(config, name)
        if path is not None and path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(path)):
            faults.append(f"--{name}: no such folder: {describe(path)}")
    for name, folder in (("output_dir", config.run_dir), ("cache_dir", Path(config.cache_dir))):
        if fault := find_obstacle(folder):
            faults.append(f"--{name}: {fault}. Choose another folder.")
    return faults


def find_obstacle(folder: Path) -> str | None:
    """Say why a folder cannot be made or written; None when it can."""
    for place in (folder, *folder.absolute().parents):
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{describe(str(place))} cannot be used: {error.strerror}"
        if not stat.S_ISDIR(mode):
            return f"{describe(str(place))} is a file, not a folder"
        return None if os.access(place, os.W_OK | os.X_OK) else f"{describe(str(place))} is not writable"
    return f"{describe(str(folder))} has no folder above it"
