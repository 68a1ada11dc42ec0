"""What a model is worth: predictions, multi-label metrics, thresholds, calibration, cost.

Any module that returns logits can be evaluated; nothing here knows about training. Labels are
(N, C) floats holding 0, 1 or nan, where nan is *unknown* and is left out of every figure. torch and
scikit-learn are imported by the functions that need them, so importing this room is cheap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FloatArray = npt.NDArray[np.floating[Any]]
LabelledProbs = tuple[FloatArray, FloatArray]
Sample = tuple["Tensor", "Tensor"]  # input_ids and attention_mask, both (B, L)

DEFAULT_THRESHOLD = 0.5
AVERAGED_SCORES = ("precision", "recall", "f1", "average_precision", "roc_auc", "support")
NUM_CALIBRATION_BINS = 15
TEMPERATURE_RANGE = (0.02, 50.0)
SMALLEST_PROB = 1e-300
LATENCY_BATCH = 32
MIN_CALLS, MAX_CALLS = 3, 50


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and give every submodule its own flag back afterwards.

    `model.train()` alone would also wake a frozen encoder that was kept in eval mode.
    """
    training_flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training_flags:
            module.training = was_training


def build_forward(
    model: nn.Module, device: torch.device, autocast_dtype: torch.dtype | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from token ids and mask, both (B, L), to logits (B, C), without gradients."""
    import torch

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        autocast = torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
        with torch.inference_mode(), autocast:
            return model(input_ids, attention_mask)["logits"]

    return forward


def predict_logits(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    device: torch.device | str,
    *,
    autocast_dtype: torch.dtype | None = None,
    prefix: str = "",
    num_rows: int | None = None,
) -> npt.NDArray[np.float32]:
    """Run a model over a loader and return its logits, (N, C), in dataset order.

    Batches are dicts of CPU tensors: `index` (B,), the rows' places in the result, and
    `<prefix>input_ids` and `<prefix>attention_mask`, (B, L). Any batch order will do, so length-sorted
    batches are fine. N is `num_rows`, or else `loader.num_rows`. Logits stay on the device until the
    end, since reading each batch would stall a GPU once a batch.

    Raises:
        FloatingPointError: some logits are not finite, as after an overflow in float16.
    """
    import torch

    device = torch.device(device)
    forward = build_forward(model, device, autocast_dtype)
    if num_rows is None:
        num_rows = loader.num_rows  # type: ignore[attr-defined]
    logits: Tensor | None = None
    given = np.zeros(num_rows, dtype=bool)
    with evaluating(model):
        for batch in loader:
            input_ids = batch[f"{prefix}input_ids"].to(device, non_blocking=True)
            attention_mask = batch[f"{prefix}attention_mask"].to(device, non_blocking=True)
            computed = forward(input_ids, attention_mask).float()  # (B, C)
            if logits is None:
                logits = torch.empty(num_rows, computed.shape[1], device=device)
            logits[batch["index"].to(device, non_blocking=True)] = computed
            given[batch["index"].numpy()] = True
    assert logits is not None and given.all(), f"loader gave {given.sum()} of {num_rows} rows"
    num_broken = num_rows - int(torch.isfinite(logits).all(dim=1).sum())
    if num_broken:
        raise FloatingPointError(
            f"evaluation: logits of {num_broken} of {num_rows} rows are not finite. Try --no-amp or a lower --lr."
        )
    return logits.cpu().numpy()


def sigmoid(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Return label probabilities, without overflow for large logits.

    The result is float64: in float32 every logit above 17 would become 1.0 and lose its rank.
    """
    logits = np.asarray(logits, dtype=np.float64)
    decay = np.exp(-np.abs(logits))  # in (0, 1], whatever the sign
    return np.where(logits >= 0, 1.0, decay) / (1.0 + decay)


def logit(probs: FloatArray) -> npt.NDArray[np.float64]:
    """Return the logits of label probabilities, the inverse of `sigmoid`; a certain 0 or 1 stays finite."""
    probs = np.clip(np.asarray(probs, dtype=np.float64), SMALLEST_PROB, 1.0 - np.finfo(np.float64).epsneg)
    return np.log(probs) - np.log1p(-probs)


def compute_metrics(
    labels: FloatArray, probs: FloatArray, thresholds: FloatArray | float, label_names: Sequence[str]
) -> dict[str, Any]:
    """Score probabilities (N, C) against labels (N, C) at thresholds (C,); prob >= threshold is a yes.

    Each label is scored on the rows where it is known, micro-F1, Hamming loss and Brier score on all
    known cells, subset accuracy and LRAP on the rows whose labels are all known. A label without known
    positives has F1 0, which counts in macro-F1 as it does in scikit-learn; its AP and AUC are nan and
    are left out of their averages. Weighted F1 weighs by known positives.
    """
    from sklearn.metrics import f1_score

    labels, probs = np.asarray(labels, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    num_labels = len(label_names)
    assert labels.shape == probs.shape and labels.shape[1] == num_labels, (
        labels.shape,
        probs.shape,
        num_labels,
    )
    thresholds = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), (num_labels,))
    predictions = probs >= thresholds  # (N, C)
    known = ~np.isnan(labels)  # (N, C)
    complete = known.all(axis=1)  # (N,)

    per_label = {}
    for column, name in enumerate(label_names):
        rows = known[:, column]
        scores = _compute_label_metrics(labels[rows, column], probs[rows, column], predictions[rows, column])
        per_label[name] = scores | {"threshold": float(thresholds[column])}
    column_of = {key: np.array([scores[key] for scores in per_label.values()]) for key in AVERAGED_SCORES}
    support = column_of["support"]

    truth = labels[known].astype(np.int8)  # all known cells in one row
    decisions = predictions[known].astype(np.int8)
    return {
        "f1_macro": _mean(column_of["f1"]),
        "f1_micro": float(f1_score(truth, decisions, zero_division=0)) if truth.size else 0.0,
        "f1_weighted": float(column_of["f1"] @ support / support.sum()) if support.sum() else 0.0,
        "precision_macro": _mean(column_of["precision"]),
        "recall_macro": _mean(column_of["recall"]),
        "subset_accuracy": _mean((predictions == labels)[complete].all(axis=1)),
        "hamming_loss": _mean(truth != decisions),
        "lrap": _compute_lrap(labels[complete] == 1, probs[complete]),
        "average_precision_macro": _mean_defined(column_of["average_precision"]),
        "roc_auc_macro": _mean_defined(column_of["roc_auc"]),
        "ece": compute_calibration_error(labels, probs),
        "brier": _mean((probs[known] - truth) ** 2),
        "per_label": per_label,
    }


def _compute_label_metrics(labels: FloatArray, probs: FloatArray, predictions: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Score one label on its known rows; every argument is (K,)."""
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

    truth = labels.astype(np.int8)
    support = int(truth.sum())
    precision = recall = f1 = 0.0
    if truth.size:
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, predictions.astype(np.int8), average="binary", zero_division=0
        )
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "average_precision": float(average_precision_score(truth, probs)) if support else np.nan,
        "roc_auc": float(roc_auc_score(truth, probs)) if 0 < support < truth.size else np.nan,
        "support": support,
        "predicted": int(predictions.sum()),
        "known": int(truth.size),
    }


def _compute_lrap(relevant: npt.NDArray[np.bool_], probs: FloatArray) -> float:
    """Return label ranking average precision of (N, C) arrays; 1 for a row with no or every label.

    The same figure as scikit-learn's, whose loop over rows takes over a second for 12,000 comments.
    """
    precision_at_label = np.zeros(relevant.shape)
    for column in range(relevant.shape[1]):
        ranked_above = probs >= probs[:, column : column + 1]  # (N, C), the label itself included
        precision_at_label[:, column] = (ranked_above & relevant).sum(axis=1) / ranked_above.sum(axis=1)
    num_relevant = relevant.sum(axis=1)
    trivial = (num_relevant == 0) | (num_relevant == relevant.shape[1])
    row_precision = (precision_at_label * relevant).sum(axis=1) / np.maximum(num_relevant, 1)
    return _mean(np.where(trivial, 1.0, row_precision))


def _mean(values: npt.NDArray[Any]) -> float:
    """Return the mean, nan for no values at all."""
    return float(values.mean()) if values.size else np.nan


def _mean_defined(values: FloatArray) -> float:
    return _mean(values[~np.isnan(values)])


def majority_baseline(train_labels: FloatArray, labels: FloatArray) -> dict[str, float]:
    """Score the answer that needs no model: each label's majority value in training, no on a tie."""
    known = ~np.isnan(train_labels)
    positives = (np.where(known, train_labels, 0) == 1).sum(axis=0)  # (C,)
    majority = (2 * positives > known.sum(axis=0)).astype(np.float64)  # (C,)
    names = [str(column) for column in range(len(majority))]
    scores = compute_metrics(labels, np.broadcast_to(majority, labels.shape), DEFAULT_THRESHOLD, names)
    return {key: scores[key] for key in ("f1_macro", "f1_micro", "subset_accuracy")}


def compute_agreement(teacher_probs: FloatArray, student_probs: FloatArray, label_names: Sequence[str]) -> dict[str, float]:
    """Say how far a student repeats its teacher, right or wrong; both inputs are (N, C).

    Decisions are taken at 0.5. The correlation is Pearson's, averaged over the labels where neither
    side is constant, and nan when there is no such label.
    """
    teacher_probs = np.asarray(teacher_probs, dtype=np.float64)
    student_probs = np.asarray(student_probs, dtype=np.float64)
    assert teacher_probs.shape == student_probs.shape and teacher_probs.shape[1] == len(label_names)
    equal = (teacher_probs >= DEFAULT_THRESHOLD) == (student_probs >= DEFAULT_THRESHOLD)  # (N, C)
    correlations = [
        np.corrcoef(teacher, student)[0, 1] if np.ptp(teacher) > 0 and np.ptp(student) > 0 else np.nan
        for teacher, student in zip(teacher_probs.T, student_probs.T, strict=True)
    ]
    return {
        "decisions_equal": _mean(equal),
        "rows_equal": _mean(equal.all(axis=1)),
        "probability_mae": _mean(np.abs(teacher_probs - student_probs)),
        "probability_correlation": _mean_defined(np.array(correlations)),
    }


def choose_thresholds(labels: FloatArray, probs: FloatArray) -> npt.NDArray[np.float64]:
    """Return the (C,) cut-offs that maximise each label's F1.

    Call this on validation data only; the test split uses the result as given. A label with no
    positives keeps 0.5, since every cut-off scores zero. Every cut is tried: only the order of the
    scores matters, so there are at most N. A cut lies midway between neighbouring scores, and of
    equally good ones the nearest to 0.5 is taken. For calibrated scores the best cut is half the best
    F1, so values well under 0.5 are expected (Lipton, Elkan and Naryanaswamy, "Optimal Thresholding of
    Classifiers to Maximize F1 Measure", 2014).
    """
    labels, probs = np.asarray(labels, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    assert labels.shape == probs.shape and labels.ndim == 2, (labels.shape, probs.shape)
    known = ~np.isnan(labels)
    return np.array(
        [
            _choose_threshold(labels[known[:, column], column] == 1, probs[known[:, column], column])
            for column in range(labels.shape[1])
        ]
    )


def _choose_threshold(positive: npt.NDArray[np.bool_], probs: FloatArray) -> float:
    """Return one label's best cut; both arguments are (K,) known cells."""
    num_positives = int(positive.sum())
    if num_positives == 0:
        return DEFAULT_THRESHOLD
    order = np.argsort(-probs, kind="stable")
    scores = probs[order]  # falling
    true_positives = np.cumsum(positive[order])
    predicted = np.arange(1, len(scores) + 1)

    # A cut after position k says yes to the k + 1 highest scores; equal scores cannot be parted.
    below = np.append(scores[1:], min(0.0, scores[-1]))
    separable = np.append(scores[:-1] > scores[1:], True)
    midpoints = (scores + below) / 2
    # Between adjacent floats the midpoint rounds down to the lower one, which would let it through.
    cuts = np.where(midpoints > below, midpoints, scores)[separable]
    # Equal ratios of whole numbers round to equal floats, so ties are exact.
    f1 = (2 * true_positives / (predicted + num_positives))[separable]
    best_cuts = cuts[f1 == f1.max()]
    return float(best_cuts[np.argmin(np.abs(best_cuts - DEFAULT_THRESHOLD))])


@dataclass(frozen=True)
class ReliabilityTable:
    """A reliability diagram: what was promised and what was seen, each (num_bins,); nan in empty bins."""

    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]
    mean_prob: npt.NDArray[np.float64]
    observed_rate: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]


def compute_calibration(labels: FloatArray, probs: FloatArray, num_bins: int = NUM_CALIBRATION_BINS) -> ReliabilityTable:
    """Sort the known cells of same-shaped arrays into equal-width bins of probability."""
    labels, probs = np.asarray(labels, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    known = ~np.isnan(labels)
    truth, promised = labels[known], probs[known]
    bins = np.minimum((promised * num_bins).astype(np.int64), num_bins - 1)  # 1.0 belongs to the last bin
    count = np.bincount(bins, minlength=num_bins)
    divisor = np.where(count > 0, count, np.nan)
    edges = np.linspace(0, 1, num_bins + 1)
    return ReliabilityTable(
        lower=edges[:-1],
        upper=edges[1:],
        mean_prob=np.bincount(bins, weights=promised, minlength=num_bins) / divisor,
        observed_rate=np.bincount(bins, weights=truth, minlength=num_bins) / divisor,
        count=count,
    )


def compute_calibration_error(labels: FloatArray, probs: FloatArray, num_bins: int = NUM_CALIBRATION_BINS) -> float:
    """Return the expected calibration error of (N, C) probabilities, averaged over labels.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, bin the confidence of one answer
    among classes. Here every label is a yes-or-no question, so the probability of yes is binned, which
    also sees a model that is too sure of its noes. Labels without known cells are left out.
    """
    errors = []
    for column in range(labels.shape[1]):
        table = compute_calibration(labels[:, column], probs[:, column], num_bins)
        gaps = np.abs(table.mean_prob - table.observed_rate)
        if table.count.sum():
            errors.append(np.nansum(gaps * table.count) / table.count.sum())
    return _mean(np.array(errors))


def fit_temperature(labels: FloatArray, logits: FloatArray) -> float:
    """Return the temperature T for which sigmoid(logits / T) has the least cross-entropy.

    Fit it on validation data only. One T for all labels keeps their ranking as it is, and with it
    every AP and AUC (Guo et al., 2017). T stays within TEMPERATURE_RANGE, where logits that separate
    the labels perfectly would drive it to 0; without known cells it is 1.
    """
    from scipy.optimize import minimize_scalar

    known = ~np.isnan(labels)
    if not known.any():
        return 1.0
    truth, scores = labels[known], np.asarray(logits, dtype=np.float64)[known]

    def cross_entropy(log_temperature: float) -> float:
        scaled = scores * np.exp(-log_temperature)
        return float(np.mean(np.logaddexp(0.0, scaled) - truth * scaled))

    # The loss is convex in 1/T, so it has one valley in log T as well.
    bounds = tuple(np.log(TEMPERATURE_RANGE))
    return float(np.exp(minimize_scalar(cross_entropy, bounds=bounds, method="bounded").x))


def measure_efficiency(
    model: nn.Module,
    example_batches: Sequence[Mapping[str, Tensor]],
    device: torch.device | str,
    *,
    autocast_dtype: torch.dtype | None = None,
    prefix: str = "",
    time_budget_s: float = 1.5,
) -> dict[str, float]:
    """Count a model's parameters and time it on real batches, already on its device.

    `example_batches` are batches as for `predict_logits`; single rows and batches of 32 are cut from
    them without their padding, and rows repeat when a batch has fewer than 32. Each of the three timings
    takes about `time_budget_s` (at least 3 and at most 50 calls) after a warm-up. Latencies are medians
    in ms. Throughput is rows per second over batches of 32 in a row, with one wait at the end, so that
    a GPU's queue is kept full. Sizes are in MB of 10**6 bytes.
    """
    import torch

    device = torch.device(device)
    single_rows = _take_rows(_spread_rows(example_batches, 8, prefix), 1, device, prefix)
    full_batches = _take_rows([(batch, 0) for batch in example_batches], LATENCY_BATCH, device, prefix)
    forward = build_forward(model, device, autocast_dtype)
    with evaluating(model):
        latency_one_s = _measure_latency(forward, single_rows, device, time_budget_s)
        latency_full_s = _measure_latency(forward, full_batches, device, time_budget_s)
        num_calls = max(MIN_CALLS, min(MAX_CALLS, int(time_budget_s / latency_full_s)))
        throughput_per_s = _measure_throughput(forward, full_batches, device, num_calls)
    return {
        **count_parameters(model),
        "size_mb": _measure_size_mb(model),
        "latency_ms_batch1": 1000 * latency_one_s,
        "latency_ms_batch32": 1000 * latency_full_s,
        "throughput_per_s": throughput_per_s,
    }


def count_parameters(model: nn.Module) -> dict[str, float]:
    """Count parameters, embeddings apart; a tensor shared by two places counts once.

    Embeddings are `model.encoder`'s token embeddings and all in its module named `embeddings`, the head
    is `model.classifier`, the encoder is the rest, so the three add up. A model without an encoder of
    that name is all encoder.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding_sizes: dict[int, int] = {}
    head = 0
    encoder: Any = getattr(model, "encoder", None)
    if encoder is not None:
        modules = [getattr(encoder, "embeddings", None), encoder.get_input_embeddings()]
        embedding_sizes = {id(p): p.numel() for module in modules if module is not None for p in module.parameters()}
        classifier: Any = getattr(model, "classifier", None)
        head = sum(parameter.numel() for parameter in classifier.parameters()) if classifier is not None else 0
    embeddings = sum(embedding_sizes.values())
    return {
        "parameters_total": total,
        "parameters_embeddings": embeddings,
        "parameters_encoder": total - embeddings - head,
        "parameters_head": head,
    }


def _measure_size_mb(model: nn.Module) -> float:
    """Return the bytes that saving the model would take: each tensor of its state once."""
    # keep_vars gives the parameters themselves, so that tied weights have one identity.
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6


def _spread_rows(batches: Sequence[Mapping[str, Tensor]], count: int, prefix: str) -> list[tuple[Mapping[str, Tensor], int]]:
    """Return up to `count` (batch, row) places spread evenly, since batches may be sorted by length."""
    places = [(batch, row) for batch in batches for row in range(len(batch[f"{prefix}input_ids"]))]
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    return [places[position] for position in chosen]


def _take_rows(
    places: Sequence[tuple[Mapping[str, Tensor], int]], batch_size: int, device: torch.device, prefix: str
) -> list[Sample]:
    """Cut `batch_size` rows starting at each (batch, row), without columns that are all padding."""
    import torch

    assert places, "measure_efficiency needs at least one batch"
    samples = []
    for batch, first in places:
        input_ids, attention_mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
        rows = (first + torch.arange(batch_size)) % len(input_ids)
        columns = attention_mask[rows].bool().any(dim=0)
        samples.append((input_ids[rows][:, columns].to(device), attention_mask[rows][:, columns].to(device)))
    return samples


def _synchronize(device: torch.device) -> None:
    """Wait for the device; a CUDA call returns before its work is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_latency(
    forward: Callable[[Tensor, Tensor], Tensor],
    samples: Sequence[Sample],
    device: torch.device,
    time_budget_s: float,
) -> float:
    """Return the median seconds of one call, after a warm-up over the samples for a third of the budget."""

    def timed_calls(budget_s: float, least: int, most: int) -> list[float]:
        durations: list[float] = []
        while len(durations) < least or (len(durations) < most and sum(durations) < budget_s):
            sample = samples[len(durations) % len(samples)]
            _synchronize(device)
            started = time.perf_counter()
            forward(*sample)
            _synchronize(device)
            durations.append(time.perf_counter() - started)
        return durations

    timed_calls(time_budget_s / 3, 1, len(samples))
    return float(np.median(timed_calls(time_budget_s, MIN_CALLS, MAX_CALLS)))


def _measure_throughput(
    forward: Callable[[Tensor, Tensor], Tensor],
    samples: Sequence[Sample],
    device: torch.device,
    num_calls: int,
) -> float:
    """Return rows per second over calls that do not wait for each other."""
    _synchronize(device)
    started = time.perf_counter()
    for call in range(num_calls):
        forward(*samples[call % len(samples)])
    _synchronize(device)
    return num_calls * LATENCY_BATCH / (time.perf_counter() - started)


def compare_efficiency(teacher: Mapping[str, float], student: Mapping[str, float]) -> dict[str, Any]:
    """Set two results of `measure_efficiency` against each other.

    Every ratio is above 1 when the student is the cheaper one. `remark` is one plain sentence for the
    report, which also says so when there is nothing gained.
    """

    def ratio(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else np.nan

    sources = {
        "compression": "parameters_total",
        "encoder_compression": "parameters_encoder",
        "size": "size_mb",
        "latency_batch1": "latency_ms_batch1",
        "latency_batch32": "latency_ms_batch32",
    }
    ratios = {name: ratio(teacher[key], student[key]) for name, key in sources.items()}
    ratios["throughput"] = ratio(student["throughput_per_s"], teacher["throughput_per_s"])
    return {"ratios": ratios, "remark": _describe_efficiency(teacher, student, ratios)}


def _describe_efficiency(teacher: Mapping[str, float], student: Mapping[str, float], ratios: Mapping[str, float]) -> str:
    counts = (
        f"{_format_count(student['parameters_total'])} against {_format_count(teacher['parameters_total'])} "
        f"parameters, of which {_format_count(student['parameters_embeddings'])} and "
        f"{_format_count(teacher['parameters_embeddings'])} are embeddings"
    )
    if student["parameters_total"] >= teacher["parameters_total"]:
        size = f"the student is not smaller than the teacher: {counts}"
    else:
        size = f"the student is {ratios['compression']:.2f} times smaller than the teacher: {counts}"
    gain = ratios["throughput"]
    speed = f"{gain:.2f} times the teacher's" if gain >= 1 else f"only {gain:.2f} times the teacher's"
    return f"{size}; its throughput at batch {LATENCY_BATCH} is {speed}"


def _format_count(count: float) -> str:
    if count >= 1e5:
        return f"{count / 1e6:.1f} M"
    return f"{count / 1e3:.1f} k" if count >= 1e3 else f"{count:.0f}"


def calibrate(labels: FloatArray, probs: FloatArray, temperature: float) -> dict[str, float]:
    """Return ECE and Brier score of (N, C) probabilities after dividing their logits by `temperature`."""
    scaled = sigmoid(logit(probs) / temperature)
    known = ~np.isnan(labels)
    return {
        "temperature": temperature,
        "ece": compute_calibration_error(labels, scaled),
        "brier": _mean((scaled[known] - labels[known]) ** 2),
    }


def compute_soft_loss(
    teacher_probs: FloatArray, student_probs: FloatArray, temperature: float, *, t_squared: bool = True
) -> dict[str, float]:
    """Return the mean soft loss of (N, C) probabilities and its excess over the teacher's entropy.

    The same figures as a history row's, taken without dropout. The excess is a Kullback-Leibler divergence,
    0 for a student that repeats its teacher, so it can be compared across temperatures and data sets.
    """
    teacher, student = logit(teacher_probs) / temperature, logit(student_probs) / temperature
    targets = sigmoid(teacher)
    scale = temperature**2 if t_squared else 1.0

    def cross_entropy(logits: npt.NDArray[np.float64]) -> float:
        return scale * _mean(np.logaddexp(0.0, logits) - targets * logits)

    loss = cross_entropy(student)
    return {"soft_loss": loss, "soft_excess": loss - cross_entropy(teacher)}


def evaluate_model(
    label_names: Sequence[str], *, validation: LabelledProbs, test: LabelledProbs
) -> tuple[dict[str, Any], dict[str, float]]:
    """Score one model on both parts, at 0.5 and at thresholds tuned on validation.

    Parts are (labels, probs), each (N, C). Returns {part: {"at_0.5": M, "tuned": M, "calibration": ...}} and
    {label: threshold}. The temperature of "calibration" is fitted on validation as well.
    """
    thresholds = choose_thresholds(*validation)
    temperature = fit_temperature(validation[0], logit(validation[1]))
    scores = {
        part: {
            "at_0.5": compute_metrics(labels, probs, DEFAULT_THRESHOLD, label_names),
            "tuned": compute_metrics(labels, probs, thresholds, label_names),
            "calibration": calibrate(labels, probs, temperature),
        }
        for part, (labels, probs) in (("validation", validation), ("test", test))
    }
    return scores, dict(zip(label_names, thresholds.tolist(), strict=True))


def build_metrics(
    label_names: Sequence[str],
    labels: Mapping[str, FloatArray],
    probs: Mapping[str, Mapping[str, FloatArray]],
    training: Mapping[str, Any],
    *,
    kd_temperature: float = 1.0,
    t_squared: bool = True,
) -> dict[str, Any]:
    """Assemble the content of metrics.json, unrounded.

    Args:
        labels: (N, C) labels of the parts "train", "validation" and "test".
        probs: {model: {"validation": (N, C), "test": (N, C)}} of "teacher", "student" and "control", those
            there are; the control is the student trained without the teacher.
        training: deterministic facts of the training, kept as they are.
        kd_temperature: softening for the soft loss, which says how far a student is from its teacher.

    The headline is macro-F1 on the test part at 0.5, which needs no tuned number to be repeated: the
    student's, or the teacher's in a run without a student.
    """
    metrics: dict[str, Any] = {
        "labels": list(label_names),
        "rows": {part: len(values) for part, values in labels.items()},
        "thresholds": {},
        "majority_baseline": {"test": majority_baseline(labels["train"], labels["test"])},
        "training": dict(training),
    }
    for model, parts in probs.items():
        metrics[model], metrics["thresholds"][model] = evaluate_model(
            label_names,
            validation=(labels["validation"], parts["validation"]),
            test=(labels["test"], parts["test"]),
        )
    for model, name in (("student", "agreement"), ("control", "control_agreement")):
        if "teacher" not in probs or model not in probs:
            continue
        pairs = {part: (probs["teacher"][part], probs[model][part]) for part in ("validation", "test")}
        metrics[name] = {part: compute_agreement(*pair, label_names) for part, pair in pairs.items()}
        for part, pair in pairs.items():
            metrics[model][part] |= compute_soft_loss(*pair, kd_temperature, t_squared=t_squared)
    headline_model = "student" if "student" in probs else "teacher"
    value = metrics[headline_model]["test"]["at_0.5"]["f1_macro"]
    metrics["headline"] = {"model": headline_model, "part": "test", "metric": "f1_macro", "value": value}
    return metrics
