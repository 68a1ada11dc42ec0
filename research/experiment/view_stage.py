"""Views of the labelled training texts: made once, kept in the cache, rows beside the tables' from then on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from research.experiment.announce import count, join_names
from research.experiment.inputs import Inputs, Views, hash_rows
from research.experiment.runtime import Runtime
from research.logs import PhaseProgress
from research.models.filling import MaskedText, WordFiller, load_filler
from research.models.fingerprint import check_unchanged
from research.storage.arrays import return_free_memory
from research.storage.files import hash_file
from research.text.near_duplicates import NearDuplicates
from research.text.tables import clean_text
from research.text.views import choose_masked, drop_words, mistype, swap_span
from research_config import PIPELINES
from research_data import VIEWS, Comments, Table, hash_text

log = logging.getLogger(__name__)
# Part of the cache keys: raise it when views are made in another way.
VIEWS_FORMAT = 1
CHUNK_ROWS = 4096  # among which texts of the same labels are found for a swap
TABLE_FILE, TEXT_COLUMN = "views.jsonl", "text"


def has_views(inputs: Inputs) -> bool:
    """Whether the student of a run learns from views."""
    return inputs.config.augment > 0 and PIPELINES[inputs.config.pipeline].student


def add_views(inputs: Inputs, runtime: Runtime) -> Inputs:
    """Return the inputs with the views as further rows of the comments, made unless the cache has them.

    Labels of these rows are unknown; `label_views` gives them those of their texts.
    """
    if not has_views(inputs):
        return inputs

    def build(folder: Path, _scratch: Path) -> None:
        write_views(folder, inputs, runtime.device)
        return_free_memory()

    with runtime.timed("views"):
        folder = runtime.cache.fetch("views", views_key(inputs, runtime), build, check=read_facts)
        found = attach_views(inputs, folder)
    for line in describe_views(inputs, read_facts(folder)):
        log.info("%s", line)
    return found


def find_views(inputs: Inputs, runtime: Runtime) -> Inputs | None:
    """Return the inputs with the views that the cache has, None when it has none."""
    folder = runtime.cache.find("views", views_key(inputs, runtime))
    try:
        return None if folder is None else attach_views(inputs, folder)
    except (OSError, ValueError):  # a damaged entry, which is made again
        return None


def views_key(inputs: Inputs, runtime: Runtime) -> dict[str, Any]:
    """Return everything that the views depend on."""
    config, split, comments = inputs.config, inputs.split, inputs.comments
    held = np.sort(comments.text_hash[np.concatenate([split.validation, split.test])])
    filled = {}
    if (source := inputs.fill) is not None:
        filled = {
            "model": source.sha256,
            "max_length": config.max_length,
            "device": runtime.device.type,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        }
    return {
        "rows": hashlib.sha256(split.train.tobytes()).hexdigest(),
        "texts": hash_rows(comments, split.train),
        "held_out": hashlib.sha256(held.tobytes()).hexdigest(),
        "views": config.augment,
        "kinds": list(inputs.view_kinds),
        "seed": config.split_seed,
        "text_normalization": config.text_normalization,
        "fill": filled,
        "format": VIEWS_FORMAT,
    }


@dataclass(frozen=True)
class Draft:
    """A view of a row that was made and is not judged yet; of kind fill, with the words that are to be filled in."""

    place: int
    number: int
    kind: str
    text: str
    masked: MaskedText | None = None


def write_views(folder: Path, inputs: Inputs, device: torch.device) -> None:
    """Make every view and write a table of them, all of a row and then those of the next.

    Texts come from `split.train` alone, those that spans are swapped with too. Where no view can be made, or where it
    equals or nearly equals a validation or test text, the text itself stands in its place.
    """
    config, comments, train = inputs.config, inputs.comments, inputs.split.train
    held_rows = np.sort(np.concatenate([inputs.split.validation, inputs.split.test]))
    held, held_hashes = NearDuplicates(comments.iter_texts_of(held_rows)), comments.text_hash[held_rows]
    filler = open_filler(inputs, device)
    texts, kinds, near = comments.iter_texts_of(train), Counter[str](), 0
    with PhaseProgress("making views", len(train), "texts") as progress, open(folder / TABLE_FILE, "w", encoding="utf-8") as file:
        for start in range(0, len(train), CHUNK_ROWS):
            chunk = list(islice(texts, CHUNK_ROWS))
            drafts = fill_drafts(list(draft_views(chunk, train[start : start + len(chunk)], inputs)), filler)
            cleaned = [clean_text(draft.text, config.text_normalization) for draft in drafts]
            hashes = np.array([hash_text(text.encode()) for text in cleaned], dtype=np.uint64)
            is_near = held.find(cleaned) | np.isin(hashes, held_hashes)
            views = {(place, number): text for place, text in enumerate(chunk) for number in range(config.augment)}
            for draft, text, out in zip(drafts, cleaned, is_near.tolist(), strict=True):
                near += out
                if text and not out and text != chunk[draft.place]:
                    views[draft.place, draft.number - 1] = text
                    kinds[draft.kind] += 1
            file.writelines(json.dumps({TEXT_COLUMN: text}, ensure_ascii=False) + "\n" for text in views.values())
            progress.advance(len(chunk))
    facts = {"views": {kind: kinds[kind] for kind in inputs.view_kinds}, "near_duplicates": near}
    facts["none"] = config.augment * len(train) - near - kinds.total()
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def open_filler(inputs: Inputs, device: torch.device) -> WordFiller | None:
    """Load what fills words in, if the run has it."""
    if inputs.fill is None:
        return None
    filler = load_filler(inputs.fill.name, inputs.config.max_length, device)
    check_unchanged(inputs.fill)
    assert filler is not None, "it was there when the inputs were checked"
    return filler


def draft_views(texts: Sequence[str], rows: NDArray[np.int64], inputs: Inputs) -> Iterator[Draft]:
    """Yield the views of some texts, text after text; one that no kind can be made of has none.

    Each is drawn from a generator of its own, seeded with --split_seed, the row and the view's number, so it does
    not depend on how many views there are.
    """
    labels = np.nan_to_num(inputs.comments.labels[rows], nan=-1.0)
    peers: dict[bytes, list[str]] = {}
    for place, cells in enumerate(labels):
        peers.setdefault(cells.tobytes(), []).append(texts[place])
    kinds = inputs.view_kinds
    for place, (text, row) in enumerate(zip(texts, rows.tolist(), strict=True)):
        alike = peers[labels[place].tobytes()]
        for number in range(1, inputs.config.augment + 1):
            generator = np.random.default_rng([inputs.config.split_seed, row, number])
            first = (row + number) % len(kinds)
            for kind in (*kinds[first:], *kinds[:first]):
                if (draft := draft_view(kind, text, alike, generator)) is not None:
                    yield dataclasses.replace(draft, place=place, number=number)
                    break


def draft_view(kind: str, text: str, alike: Sequence[str], generator: np.random.Generator) -> Draft | None:
    """Return one view of a text, None when it is too short for that kind, or when no other has the same labels.

    Args:
        alike: Texts of the same labels, the text itself among them.
    """
    if kind == "fill":
        words = text.split()
        places = choose_masked(words, generator)
        if places is None:
            return None
        return Draft(0, 0, kind, text, MaskedText(words, places, generator.random(len(places)).tolist()))
    if kind == "swap":
        start = int(generator.integers(len(alike)))
        others = (alike[(start + step) % len(alike)] for step in range(len(alike)))
        made = swap_span(text, next((other for other in others if other != text), ""), generator)
    else:
        made = {"noise": mistype, "dropout": drop_words}[kind](text, generator)
    return None if made is None else Draft(0, 0, kind, made)


def fill_drafts(drafts: Sequence[Draft], filler: WordFiller | None) -> list[Draft]:
    """Return the drafts with their masked words filled in."""
    masked = [draft.masked for draft in drafts if draft.masked is not None]
    filled = iter([] if filler is None else filler.fill(masked))
    return [draft if draft.masked is None else dataclasses.replace(draft, text=next(filled)) for draft in drafts]


def read_facts(folder: Path) -> dict[str, Any]:
    """Return how many views of each kind there are, and for how many the text itself stands, and why."""
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return facts


def attach_views(inputs: Inputs, folder: Path) -> Inputs:
    """Return the inputs whose comments hold the views of a cache entry as further rows.

    Raises:
        ValueError: the entry holds another number of views.
    """
    comments, path, train = inputs.comments, folder / TABLE_FILE, inputs.split.train
    shape = (len(train), inputs.config.augment)
    hashes = np.array([hash_text(text.encode()) for text in read_texts(path)], dtype=np.uint64)
    if len(hashes) != train.size * inputs.config.augment:
        raise ValueError(f"{path} holds {len(hashes)} views")
    table = Table("views", VIEWS, path, TEXT_COLUMN, hash_file(path), len(hashes), 0)
    rows = np.arange(len(comments), len(comments) + len(hashes)).reshape(shape)
    extended = dataclasses.replace(
        comments,
        tables=(*comments.tables, table),
        labels=np.concatenate([comments.labels, np.full((len(hashes), len(comments.label_names)), np.nan, np.float32)]),
        source=np.concatenate([comments.source, np.full(len(hashes), VIEWS, np.int8)]),
        text_hash=np.concatenate([comments.text_hash, hashes]),
        text_sha256=hashlib.sha256(f"{comments.text_sha256} {table.sha256}".encode()).hexdigest(),
    )
    return dataclasses.replace(inputs, comments=extended, views=Views(rows, np.broadcast_to(train[:, None], shape)))


def read_texts(path: Path) -> Iterator[str]:
    """Yield the texts of the views."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)[TEXT_COLUMN]


def describe_views(inputs: Inputs, facts: dict[str, Any]) -> list[str]:
    """Return a line for what views there are, and one for texts that stand in the place of one."""
    kinds = join_names([f"{kind} {number:,}" for kind, number in facts["views"].items()])
    lines = [f"{name_views(inputs)}: {kinds}"]
    reasons = {"it nearly equals a held-out one": facts["near_duplicates"], "it is too short to change": facts["none"]}
    told = [f"{number:,} since {reason}" for reason, number in reasons.items() if number]
    return [*lines, f"the text itself stands for a view: {', '.join(told)}"] if told else lines


def name_views(inputs: Inputs) -> str:
    """Return how many views there are of how many texts, in words."""
    return f"{count(inputs.config.augment, 'view')} of each of {count(len(inputs.split.train), 'training text')}"


def label_views(inputs: Inputs, labels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the labels of all rows, (N, C), those of views being those of their texts."""
    if inputs.views is None:
        return labels
    labelled = labels.copy()
    labelled[inputs.views.rows] = labels[inputs.views.sources]
    return labelled


def rows_in_turn(inputs: Inputs, learned: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return all rows that a student reads in some epoch, and which of them in which.

    Args:
        learned: The rows of an epoch without views: those of training, and further ones after them.

    Returns:
        The rows, those of `learned` and then the views; and (N + 1, R) positions in them, R the rows of an epoch: epoch e
        reads those of line e mod (N + 1). Line 0 is the texts, line k their k-th views. None without views.
    """
    views = inputs.views
    if views is None:
        return learned, None
    num_rows, num_views = views.rows.shape
    assert np.array_equal(learned[:num_rows], views.sources[:, 0])
    turns = np.tile(np.arange(len(learned)), (num_views + 1, 1))
    turns[1:, :num_rows] = len(learned) + np.arange(views.rows.size).reshape(views.rows.shape).T
    return np.concatenate([learned, views.rows.reshape(-1)]), turns


def training_rows(inputs: Inputs) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return the rows that a student learns from with its teacher, labelled ones before unlabelled ones, as `rows_in_turn`."""
    return rows_in_turn(inputs, np.concatenate([inputs.split.train, inputs.split.unlabelled]))


def pad_to_views(values: NDArray[np.float32], comments: Comments) -> NDArray[np.float32]:
    """Return what is known of the tables' rows, (N, C), with nan for those of views after them."""
    missing = len(comments) - len(values)
    return np.concatenate([values, np.full((missing, values.shape[1]), np.nan, np.float32)]) if missing else values
