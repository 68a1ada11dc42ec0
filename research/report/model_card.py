"""The model card of a run's student/ and teacher/: README.md as the Hugging Face hub reads it (no torch).

It names no path, file or machine of whoever made the run, and guesses neither language nor licence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from research.evaluation.gain import GAIN_METRICS, describe_keeping
from research.flags import format_value
from research.names import LABEL_SCORES, METRIC_OF
from research.report.document import Block, Code, Document, Heading, Paragraph, Table, Typed, render_markdown
from research.report.intervals import Resampled
from research.report.numbers import format_interval, format_number
from research.runs.formats import dig, read_json, write_text_atomic
from research.runs.run import Run
from research.version import VERSION

CARD_FILE = "README.md"
CARD_MODELS = ("teacher", "student")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What the hub calls the metrics of a gain.
HUB_METRICS = {"f1_macro": "f1", "f1_macro_tuned": "f1", "average_precision_macro": "average_precision"}
# Settings of a run that whoever uses the model may ask for.
SHOWN_FLAGS = (
    "pipeline", "kd_method", "kd_alpha", "kd_temperature", "student_layers", "student_ngrams", "student_head", "pooling",
    "max_length", "text_normalization", "epochs", "teacher_epochs", "lr", "batch", "seed", "split_seed",
)  # fmt: skip
STOCK_USE = """from transformers import pipeline

classify = pipeline("text-classification", model="PATH_OR_HUB_NAME", top_k=None)
print(classify(["..."], truncation=True))  # one probability for each label"""
OWN_USE = """from research.models.saved import load_classifier  # of research-kd-suite

saved = load_classifier("PATH")
batch = saved.tokenizer(
    ["..."], padding=True, truncation=True, max_length=saved.settings["max_length"], return_tensors="pt"
)
probs = saved.model.eval()(batch["input_ids"], batch["attention_mask"])["logits"].sigmoid()"""


def write_cards(run: Run, resampled: Resampled | None) -> None:
    """Write the model card of each model that a run has saved; the intervals are those of `resampled`."""
    for model in CARD_MODELS:
        folder = run.path / model
        if (folder / "config.json").is_file():
            write_text_atomic(folder / CARD_FILE, _front_matter(run, model) + _body(run, model, resampled))


def _front_matter(run: Run, model: str) -> str:
    """Return the card's metadata between two lines of dashes."""
    # As slow as the hub's library is.
    from huggingface_hub import EvalResult, ModelCardData

    digest = dig(_environment(run), "data", "dataset_sha256") or "unknown"
    scores = {name: dig(run.scores, model, "test", *METRIC_OF[name].path) for name in GAIN_METRICS}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="table",
            dataset_name=f"test part of a table (SHA-256 {digest[:16]})",
            dataset_split="test",
            metric_type=HUB_METRICS[name],
            metric_name=METRIC_OF[name].full_label,
            metric_value=value,
        )
        for name, value in scores.items()
        if value is not None
    ]
    distilled = ["knowledge-distillation"] if model == "student" and "teacher" in run.models else []
    data = ModelCardData(
        license="other",
        license_name="not-stated",
        base_model=_public_name(run, model),
        pipeline_tag="text-classification",
        library_name="transformers" if is_stock(run.path / model) else "research-kd-suite",
        tags=["multi-label-classification", *distilled],
        model_name=_title(run, model) if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def is_stock(folder: Path) -> bool:
    """Whether transformers alone loads a model's folder: the suite's own heads keep their encoder's configuration in theirs."""
    return "encoder_type" not in read_json(folder / "config.json")


def _body(run: Run, model: str, resampled: Resampled | None) -> str:
    blocks: list[Block] = [
        *_describe_model(run, model),
        *_describe_use(run, model),
        *_describe_scores(run, model, resampled),
        *_describe_training(run, model),
        *_describe_limits(run, model),
        Heading("Citing"),
        Paragraph(
            f"Made with research-kd-suite {VERSION}; cite it by the CITATION.cff that comes with it, the base model and the "
            "data by what their authors ask for."
        ),
    ]
    return render_markdown(Document(_title(run, model), blocks))


def _title(run: Run, model: str) -> str:
    if model == "teacher":
        return "Teacher: a multi-label text classifier"
    return "Distilled multi-label text classifier" if "teacher" in run.models else "Multi-label text classifier"


def _describe_model(run: Run, model: str) -> Iterator[Block]:
    labels = ", ".join(run.label_names)
    base = _public_name(run, model)
    start = f"of {base}" if base else "of an encoder that was not taken from the hub"
    head = "the classification head of its architecture" if is_stock(run.path / model) else "a head of two layers"
    ngrams = dig(run.scores, "training", model, "ngrams")
    if isinstance(ngrams, Mapping) and ngrams["share"] > 0:  # of tf-idf it is their number
        kinds = f"{ngrams['ngrams']:,} n-grams of up to {ngrams['longest']} pieces of its tokenizer"
        head += f"; a share of {ngrams['share']:.1f} of its logits is that of a logistic regression on {kinds}"
    text = f"Sorts a text into any of {len(run.label_names)} labels at once: {labels}. It is made {start}, with {head}."
    if model == "student" and "teacher" in run.models:
        teacher = _public_name(run, "teacher")
        text += f" It learned from labels and from a larger teacher{f' made of {teacher}' if teacher else ''}."
    yield Paragraph(text)


def _describe_use(run: Run, model: str) -> Iterator[Block]:
    yield Heading("How to load it")
    if is_stock(run.path / model):
        yield Paragraph("It is a stock transformers model. Its tokenizer brings a text into the Unicode form of training.")
        yield Code(STOCK_USE, "python")
    else:
        yield Paragraph(
            "It is no stock transformers model: AutoModel and pipeline refuse it, since the head that they would put on the "
            "encoder is a random one."
        )
        yield Code(OWN_USE, "python")
    thresholds = dig(run.scores, "thresholds", model) or {}
    cuts = [[label, format_number(float(cut))] for label, cut in thresholds.items() if cut is not None]
    if cuts:
        yield Paragraph(
            (
                "A label is decided at 0.5, or at its threshold tuned on validation, which stands with all digits in config.json "
                "under ",
                Typed("classifier_settings"),
                ".",
            )
        )
        yield Table("Thresholds tuned on validation", ["Label", "Threshold"], cuts)


def _describe_scores(run: Run, model: str, resampled: Resampled | None) -> Iterator[Block]:
    rows = []
    for name in GAIN_METRICS:
        value = dig(run.scores, model, "test", *METRIC_OF[name].path)
        if value is not None:
            found = None if resampled is None else resampled.score(model, name)
            interval = "" if found is None else format_interval(found.low, found.high)
            rows.append([METRIC_OF[name].full_label, format_number(value), interval])
    if not rows:
        return
    yield Heading("Scores on held-out rows")
    yield Table("Scores on the test part", ["Measure", "Score", "95 % interval over texts"], rows)
    per_label = dig(run.scores, model, "test", "tuned", "per_label") or {}
    columns = ("precision", "recall", "f1")
    cells = [[label, *(format_number(dig(found, name)) for name in columns)] for label, found in per_label.items()]
    if cells:
        yield Table("By label, at tuned thresholds", ["Label", *(LABEL_SCORES[name] for name in columns)], cells)
    if model == "student" and "kept" in run.scores:
        yield Paragraph(describe_keeping(run.scores["kept"]))


def _describe_training(run: Run, model: str) -> Iterator[Block]:
    yield Heading("Training")
    digest, rows = dig(_environment(run), "data", "dataset_sha256"), dig(run.scores, "rows") or {}
    counts = ", ".join(f"{part} {count:,.0f}" for part, count in rows.items())
    yield Paragraph(f"Data: a table with SHA-256 {digest}; rows: {counts}.")
    if model == "teacher" and run.config.get("teacher_checkpoint"):
        yield Paragraph("This teacher was given as a checkpoint; the run only measured it.")
        return
    # A model's own trials say what it was trained with; the teacher's length stands in the student's card too.
    chosen = {name: value for name, value in _chosen_settings(run, "teacher").items() if name == "teacher_epochs"}
    chosen |= _chosen_settings(run, model)
    flags = {name: run.config.get(name) for name in SHOWN_FLAGS} | chosen
    values = [[f"--{name}", format_value(value)] for name, value in flags.items() if value is not None]
    yield Table("Flags of the run", ["Flag", "Value"], values)
    if chosen:
        names = ", ".join(f"--{name}" for name in chosen)
        yield Paragraph(f"Chosen on validation by --search: {names}.")


def _chosen_settings(run: Run, model: str) -> dict[str, Any]:
    """Return what --search chose for a model, nothing without a search."""
    trials = dig(run.scores, "training", model, "trials") or ()
    return next((dict(trial["settings"]) for trial in trials if trial.get("chosen")), {})


def _describe_limits(run: Run, model: str) -> Iterator[Block]:
    yield Heading("Limits")
    yield Paragraph(
        "The scores are of texts like those of the table above, in their language and from their source; on others they are "
        f"unknown. Texts are cut after {run.config.get('max_length')} tokens. A probability is no proof: let a person look at "
        "what follows from a decision about somebody."
    )
    if dig(run.scores, "training", "teacher", "training_texts") == "unknown":
        yield Paragraph("The teacher's checkpoint does not say which texts it learned from; some may be test rows.")
    yield Paragraph("The licence is not stated here: it follows from those of base model and data. Set it before publishing.")


def _public_name(run: Run, model: str) -> str | None:
    """Return the hub name of what a model was made from; None for a folder, whose path is nobody's business."""
    side = "teacher" if model == "teacher" or run.config.get("student_init") == "teacher" else "student"
    name = dig(_environment(run), "models", side, "name")
    if not isinstance(name, str) or HUB_NAME.fullmatch(name) is None or Path(name).exists():
        return None
    return name


def _environment(run: Run) -> dict[str, Any]:
    return read_json(run.path / "environment.json")
