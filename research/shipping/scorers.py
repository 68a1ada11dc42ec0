"""Trained classifiers as they are used: texts in, logits out, whether torch or ONNX Runtime computes them.

A float32 sum depends on the order of its terms, and a library chooses that order by the shape of the arrays. So every
row is padded to a width that its own length decides, and every call of that width has the same number of rows, filled
up where there are fewer: what a row is given is then the same bits whatever stands beside it, before it or after it.

Shapes: N texts, B rows of a call, L tokens, C labels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from research.errors import InputError
from research.evaluation.calibration import sigmoid
from research.logs import quiet_libraries
from research.models.fingerprint import find_model_folder
from research.models.reading import refusing
from research.runs.directory import RunDirectory
from research.runs.formats import read_json
from research.storage.arrays import gather_ragged
from research.storage.files import hash_tree
from research.text.tokens import encode, flatten

if TYPE_CHECKING:
    from research.models.saved import SavedClassifier

log = logging.getLogger(__name__)
Ids = NDArray[np.int64]
Classify = Callable[[Ids, Ids], NDArray[np.float32]]
Encode = Callable[[list[str]], tuple[NDArray[np.int32], NDArray[np.int64]]]
# Widths are multiples of it: a row of 15 tokens pays for one that is none.
WIDTH_STEP = 8
# Padded tokens of a call. On a CPU 1,024 stay in the cache; a GPU is slow to start and wants more at once.
CALL_TOKENS, CUDA_CALL_TOKENS = 1024, 16384
# Of a classifier that does not say how long a text may be.
LONGEST_TEXT = 512
EXPORT_FILE = "classifier.json"
ONNX_FILES = {False: "onnx/model.onnx", True: "onnx/model_quantized.onnx"}  # by whether it is the int8 one


@dataclass(frozen=True)
class Scorer:
    """A classifier that is ready for texts.

    Attributes:
        classify: Takes token ids and their mask, (B, L) each, and returns logits (B, C).
        encode: Takes texts and returns the ids of all, one after the other, and each text's number of them.
        labels: The outputs' names, in order.
        thresholds: (C,), each label's; a probability that reaches it is a yes.
        text_normalization: The Unicode form of the texts it was trained on: none, nfc or nfkc.
        identity: What its answers depend on, as JSON values: answers of another identity are no answers of it.
    """

    classify: Classify
    encode: Encode
    labels: tuple[str, ...]
    thresholds: NDArray[np.float64]
    max_length: int
    text_normalization: str
    pad_id: int
    call_tokens: int
    identity: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What a classifier says of its use: the settings saved beside it, or what stands in for one that says nothing."""

    labels: tuple[str, ...]
    thresholds: dict[str, float]
    max_length: int
    text_normalization: str

    @classmethod
    def of(cls, saved: SavedClassifier, name: str) -> Usage:
        """Take it from a loaded classifier, and log what had to be assumed."""
        labels, settings = tuple(saved.settings["labels"]), saved.settings
        assumed = []
        thresholds = settings.get("thresholds")
        if thresholds is None:
            thresholds = dict.fromkeys(labels, 0.5)
            assumed.append("thresholds of 0.5")
        max_length = settings.get("max_length")
        if max_length is None:
            max_length = min(int(min(saved.tokenizer.model_max_length, LONGEST_TEXT)), LONGEST_TEXT)
            assumed.append(f"at most {max_length} tokens")
        normalization = settings.get("text_normalization")
        if normalization is None:
            normalization = "none"
            assumed.append("texts as they are written")
        if assumed:
            log.warning("warning: %s does not say how it is used; taken: %s", name, ", ".join(assumed))
        return cls(labels, {label: float(thresholds[label]) for label in labels}, int(max_length), normalization)


def open_scorer(name: str, *, int8: bool = False, device: str = "auto", num_threads: int | None = None) -> Scorer:
    """Open a classifier: a folder that was exported to ONNX, or anything that `load_classifier` loads.

    Args:
        int8: Of an exported folder, the quantised model.
        device: auto, cpu or cuda; what was exported runs on the CPU.

    Raises:
        InputError: there is no such classifier, or not in that form.
    """
    folder = find_model_folder(name)
    if folder is not None and RunDirectory(folder).status() in ("finished", "unfinished"):
        raise InputError(f"--model: {name} is a run. Give a model of it, as {folder / 'student'}.")
    exported = folder is not None and (folder / "onnx").is_dir()
    if int8 and not exported:
        raise InputError(f"--int8: {name} was not exported. Make an int8 model of it with research_export.py --int8.")
    if not exported:
        return open_torch(name, device, num_threads)
    assert folder is not None
    if device not in ("auto", "cpu"):
        raise InputError(f"--device: {name} was exported to ONNX and runs on the CPU, got {device}")
    return open_onnx(folder, int8=int8, num_threads=num_threads)


def open_torch(name: str, device: str = "auto", num_threads: int | None = None) -> Scorer:
    """Open a classifier with torch, in float32.

    Raises:
        InputError: as `load_classifier`, or the device is not there.
    """
    import torch

    # With torch, which an exported model does without.
    from research.models.saved import load_classifier

    quiet_libraries()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: cuda is not there; give cpu or auto")
    place = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    saved = load_classifier(name)
    model = saved.model.to(place).eval()
    usage = Usage.of(saved, name)

    def classify(input_ids: Ids, attention_mask: Ids) -> NDArray[np.float32]:
        with torch.inference_mode():
            ids, mask = (torch.from_numpy(array).to(place) for array in (input_ids, attention_mask))
            return model(ids, mask)["logits"].float().cpu().numpy()

    folder = find_model_folder(name)
    assert folder is not None, "it has just been loaded"
    computed = {"torch": torch.__version__, "device": str(place), "threads": torch.get_num_threads()}
    return Scorer(
        classify,
        lambda texts: encode(texts, saved.tokenizer, usage.max_length, with_words=False)[:2],
        usage.labels,
        np.array([usage.thresholds[label] for label in usage.labels]),
        usage.max_length,
        usage.text_normalization,
        int(saved.tokenizer.pad_token_id or 0),  # the mask hides it
        CALL_TOKENS if place.type == "cpu" else CUDA_CALL_TOKENS,
        identify(folder, computed),
    )


def open_onnx(folder: Path, *, int8: bool = False, num_threads: int | None = None) -> Scorer:
    """Open a model that was exported, without torch.

    Raises:
        InputError: its files are missing or damaged, or onnxruntime is not installed.
    """
    from tokenizers import Tokenizer

    model = folder / ONNX_FILES[int8]
    if not model.is_file():
        form = "int8 model" if int8 else "float32 model"
        raise InputError(f"{folder}: holds no {form} ({ONNX_FILES[int8]}). Export it with research_export.py.")
    settings = read_json(folder / EXPORT_FILE)
    session = open_session(model, num_threads)
    with refusing(f"{folder}: tokenizer.json cannot be read"):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(settings["max_length"], direction=settings["truncation_side"])

    def classify(input_ids: Ids, attention_mask: Ids) -> NDArray[np.float32]:
        return session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})[0]

    with refusing(f"{folder}: {EXPORT_FILE} does not describe an exported model"):
        return Scorer(
            classify,
            lambda texts: flatten([encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]),
            tuple(settings["labels"]),
            np.array([settings["thresholds"][label] for label in settings["labels"]]),
            settings["max_length"],
            settings["text_normalization"],
            settings["pad_token_id"],
            CALL_TOKENS,
            identify(folder, {"onnxruntime": version("onnxruntime"), "threads": num_threads, "int8": int8}),
        )


def open_session(model: Path, num_threads: int | None = None) -> Any:
    """Open an ONNX model on the CPU.

    Raises:
        InputError: it is damaged, or onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"{model}: running it needs onnxruntime. Run pip install onnxruntime.") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    with refusing(f"{model}: cannot be loaded"):
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def identify(folder: Path, computed: dict[str, Any]) -> dict[str, Any]:
    """Return what answers depend on: the model's files, and what computes them."""
    with refusing(f"{folder}: cannot be read"):
        files = hashlib.sha256(json.dumps(hash_tree(folder)).encode()).hexdigest()
    return {"files": files, "tokenizers": version("tokenizers")} | computed


def compute_logits(scorer: Scorer, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return the logits (N, C) of normalised texts; nan for a text without any token.

    Raises:
        FloatingPointError: some logits are not finite.
    """
    ids, lengths = scorer.encode(list(texts))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    widths = np.minimum(-(-lengths // WIDTH_STEP) * WIDTH_STEP, scorer.max_length)
    logits = np.full((len(texts), len(scorer.labels)), np.nan, dtype=np.float32)
    for width in np.unique(widths[widths > 0]):
        rows = np.flatnonzero(widths == width)
        per_call = max(1, scorer.call_tokens // int(width))
        for start in range(0, len(rows), per_call):
            asked = rows[start : start + per_call]
            logits[asked] = scorer.classify(*_fill(scorer, ids, offsets, asked, per_call, int(width)))[: len(asked)]
    broken = int((~np.isfinite(logits).all(axis=1) & (lengths > 0)).sum())
    if broken:
        raise FloatingPointError(f"logits of {broken} of {len(texts)} texts are not finite: the model is damaged")
    return logits


def _fill(
    scorer: Scorer, ids: NDArray[np.int32], offsets: NDArray[np.int64], rows: NDArray[np.int64], per_call: int, width: int
) -> tuple[Ids, Ids]:
    """Return ids and mask, (per_call, width) each, of some rows, the first of them repeated where there are too few."""
    filled = np.concatenate([rows, np.repeat(rows[:1], per_call - len(rows))])
    input_ids, real = gather_ragged(ids, offsets, filled, scorer.pad_id)
    missing = ((0, 0), (0, width - input_ids.shape[1]))
    return np.pad(input_ids, missing, constant_values=scorer.pad_id), np.pad(real, missing).astype(np.int64)


def decide(scorer: Scorer, logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return probabilities and decisions, (N, C) each; those of a text without an answer are nan and no."""
    probs = sigmoid(logits)
    return probs, probs >= scorer.thresholds
