"""Experiment settings: one frozen dataclass, one flag per field, every check before anything is loaded.

Only the standard library is imported here, so `--help` and a bad flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn


class InputError(ValueError):
    """A fault in what the user supplied: one line naming what was found, where, and what to do."""


class FlagErrors(InputError):
    """Every fault found in the flags, one line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


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

LAYER_STRATEGIES = ("uniform", "last", "first")

Check = Callable[[Any], str | None]


def between(low: float, high: float = math.inf, *, open_low: bool = False, note: str = "") -> Check:
    """Return a check that a number lies in [low, high], or (low, high] with `open_low`."""
    bound = f"greater than {low:g}" if open_low else f"at least {low:g}"
    wanted = bound if high == math.inf else f"{'above ' if open_low else ''}{low:g} to {high:g}"

    def check(value: float) -> str | None:
        inside = (low < value if open_low else low <= value) and value <= high and not math.isnan(value)
        return None if inside else f"must be {wanted}, got {value:g}" + (f" ({note})" if note else "")

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
        "cls", "student", "text vector of both models: first token, or mean of the tokens", choices=("cls", "mean")
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


# Where a run is written and how it shares its work decide nothing in its results.
PLACE_FIELDS = frozenset({"output_dir", "cache_dir", "overwrite", "checkpoint_minutes"})


def saved_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return what `config.json` holds: every flag but those that only say where things are written."""
    values = dataclasses.asdict(config)
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if name not in PLACE_FIELDS
    }


def parse_layer_mapping(text: str) -> tuple[tuple[int, int], ...] | None:
    """Return the (teacher, student) pairs of an explicit mapping, None for a strategy's name.

    Raises:
        ValueError: neither a strategy nor `teacher:student` pairs.
    """
    if text in LAYER_STRATEGIES:
        return None
    pairs = []
    for part in text.split(","):
        teacher, separator, student = part.strip().partition(":")
        if not separator or not teacher.strip().isdecimal() or not student.strip().isdecimal():
            raise ValueError(
                f"'{part.strip()}' is neither teacher:student (as in 2:1,4:2) nor one of {', '.join(LAYER_STRATEGIES)}"
            )
        pairs.append((int(teacher), int(student)))
    return tuple(pairs)


class _CollectingParser(argparse.ArgumentParser):
    """An argparse parser whose errors can be reported together with the other faults."""

    def error(self, message: str) -> NoReturn:
        raise FlagErrors([message])


def build_parser() -> argparse.ArgumentParser:
    """Build the parser from the fields of ExperimentConfig; values stay text until `convert`."""
    parser = _CollectingParser(
        prog="research_main.py",
        description="Distil a large multi-label text classifier into a small one. One command is one run.",
        epilog="Exit status: 0 done, 1 failed while running, 2 bad flags or input, 3 teacher too weak, 130 interrupted.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str, Any] = {}
    for entry in dataclasses.fields(ExperimentConfig):
        meta = entry.metadata
        group = groups.setdefault(meta["group"], None) or parser.add_argument_group(meta["group"])
        groups[meta["group"]] = group
        add_flag(group, entry)
    groups["what to run"].add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="take the flags of an earlier run's config.json; flags given beside it win",
    )
    return parser


def add_flag(group: Any, entry: dataclasses.Field[Any]) -> None:
    meta = entry.metadata
    shown = "" if entry.default is None or entry.default == () else f" (default: {show(entry.default)})"
    help_text = (meta["help"] + shown).replace("%", "%%")
    if isinstance(entry.default, bool):
        group.add_argument(f"--{entry.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text)
        return
    metavar = meta["metavar"] or ("{" + ",".join(meta["choices"]) + "}" if meta["choices"] else type_name(entry.name))
    group.add_argument(
        f"--{entry.name}",
        default=argparse.SUPPRESS,
        help=help_text,
        metavar=metavar,
        nargs="+" if accepts(entry.name, tuple) else None,
    )


def show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


_HINTS: dict[str, Any] = {}


def field_types(name: str) -> tuple[Any, ...]:
    """Return the types a field accepts, as (float,) or (int, NoneType)."""
    if not _HINTS:
        _HINTS.update(typing.get_type_hints(ExperimentConfig))
    hint = _HINTS[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def accepts(name: str, kind: type) -> bool:
    return any(typing.get_origin(hint) is kind or hint is kind for hint in field_types(name))


def type_name(name: str) -> str:
    return "N" if accepts(name, int) else "X" if accepts(name, float) else "TEXT"


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
        raise ValueError(f"must be true or false, got {value!r}")
    if accepts(name, tuple):
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ValueError(f"must be a list of names, got {value!r}")
    if accepts(name, str):
        if isinstance(value, str) and value and "\0" not in value:
            return value
        raise ValueError(f"must be a text that is not empty, got {value!r}")
    return convert_number(value, int if accepts(name, int) else float)


def convert_number(value: Any, kind: type[int] | type[float]) -> int | float:
    word = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must be {word}, got {value!r}")
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise ValueError(f"must be {word}, got {value!r}") from None
    if kind is float and not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {value!r}")
    if isinstance(value, float) and number != value:
        raise ValueError(f"must be {word}, got {value!r}")
    return number


def check_config(config: ExperimentConfig) -> list[str]:
    """Return every fault that can be seen without opening a file, as `--flag: what` lines."""
    faults = []
    for entry in dataclasses.fields(config):
        value, meta = getattr(config, entry.name), entry.metadata
        if meta["choices"] and value not in meta["choices"]:
            faults.append(f"--{entry.name}: must be one of {', '.join(meta['choices'])}, got {value}")
        elif meta["check"] and value is not None and (fault := meta["check"](value)):
            faults.append(f"--{entry.name}: {fault}")
    return faults + check_distillation(config) + check_data_flags(config) + check_places(config)


def check_distillation(config: ExperimentConfig) -> list[str]:
    faults = []
    for entry in config.label_alphas:
        label, separator, value = entry.rpartition("=")
        try:
            valid = bool(separator and label) and 0 <= float(value) <= 1
        except ValueError:
            valid = False
        if not valid:
            faults.append(f"--label_alphas: '{entry}' is not LABEL=ALPHA with an alpha from 0 to 1, as in threat=0.9")
    try:
        pairs = parse_layer_mapping(config.layer_mapping) or ()
        if any(teacher < 0 or student < 0 for teacher, student in pairs):
            faults.append(f"--layer_mapping: layers count from 0 (the embeddings), got {config.layer_mapping}")
    except ValueError as error:
        faults.append(f"--layer_mapping: {error}")
    needs_teacher = PIPELINES.get(config.pipeline, PIPELINES["kd_only"]).teacher
    if config.student_init == "teacher" and not needs_teacher:
        faults.append("--student_init teacher: needs a pipeline with a teacher, as kd_only")
    return faults


def check_data_flags(config: ExperimentConfig) -> list[str]:
    faults = []
    if config.label_columns is not None and len(set(config.label_columns)) < len(config.label_columns):
        faults.append(f"--label_columns: a column is named twice in {' '.join(config.label_columns)}")
    if config.num_folds > 1 and config.test_path:
        faults.append("--num_folds: folds make their own test parts; drop --test_path")
    shares = (0 if config.val_path else config.val_fraction) + (0 if config.test_path else config.test_fraction)
    if shares >= 1:
        faults.append(f"--val_fraction and --test_fraction: together must be under 1, got {shares:g}")
    if not (config.device in ("auto", "cpu", "cuda") or config.device.removeprefix("cuda:").isdecimal()):
        faults.append(f"--device: must be auto, cpu, cuda or cuda:N, got {config.device}")
    return faults


def check_places(config: ExperimentConfig) -> list[str]:
    """Return the faults in the paths: tables that are not there, folders that cannot be written."""
    faults = []
    tables = (
        ("unlabelled_path", "val_path", "test_path")
        if config.demo
        else ("dataset_path", "unlabelled_path", "val_path", "test_path")
    )
    for name in tables:
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "no such file"
            faults.append(f"--{name}: {what}: {path}. Give a .csv, .tsv or .jsonl table.")
    for name in ("teacher_path", "teacher_checkpoint", "student_path"):
        path = getattr(config, name)
        if path and path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
            faults.append(f"--{name}: no such folder: {path}")
    for name, path in (("output_dir", config.output_dir), ("cache_dir", config.cache_dir)):
        if path and (fault := unwritable(Path(path))):
            faults.append(f"--{name}: {fault}. Choose another folder.")
    return faults


def unwritable(path: Path) -> str | None:
    """Say why a folder cannot be made or written at `path`; None when it can."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is a file, not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable"
    return None


@dataclass(frozen=True)
class Arguments:
    """The parsed command line: the config, and which flags the user gave."""

    config: ExperimentConfig
    explicit: frozenset[str]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse and check the command line.

    Raises:
        FlagErrors: every fault found, together; nothing has been loaded or written.
        SystemExit: after --help.
    """
    parser = build_parser()
    given, unknown = parser.parse_known_args(list(argv))
    faults = [f"{token}: unknown flag; --help lists them" for token in unknown if token.startswith("-")]
    faults += [f"'{token}': a value without a flag" for token in unknown if not token.startswith("-")]
    explicit = vars(given)
    values: dict[str, Any] = {}
    if (path := explicit.pop("config", None)) is not None:
        values, config_faults = read_config_file(Path(path))
        faults += config_faults
    for name, value in explicit.items():
        try:
            values[name] = convert(name, value)
        except ValueError as error:
            faults.append(f"--{name}: {error}")
            values.pop(name, None)
    config = ExperimentConfig(**values)
    faults += check_config(config)
    if faults:
        raise FlagErrors(faults)
    return Arguments(config, frozenset(values))


def read_config_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read an earlier run's config.json into field values and the faults found in it."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"--config: no such file: {path}"]
    except OSError as error:
        return {}, [f"--config: {path} cannot be read: {error.strerror}"]
    except (ValueError, RecursionError) as error:
        return {}, [f"--config: {path} is not JSON: {error}"]
    if not isinstance(loaded, Mapping):
        return {}, [f"--config: {path} holds no settings: expected an object with a key per flag"]
    known = {entry.name for entry in dataclasses.fields(ExperimentConfig)}
    values, faults = {}, []
    for name, value in loaded.items():
        if name not in known:
            faults.append(f"--config: {path} names an unknown flag '{name}'")
            continue
        try:
            values[name] = convert(name, value)
        except ValueError as error:
            faults.append(f"--config: {path}: {name} {error}")
    return values, faults
