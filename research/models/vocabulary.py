"""A tokenizer that keeps only some of its pieces and cuts a text of these as it did before.

Why the texts stay cut alike: WordPiece takes the longest piece at each place, Unigram the likeliest path and BPE the
merge of the lowest rank, each time among fewer candidates, of which the one taken before is still one. For that BPE
needs every merge on the way to a kept piece, and Unigram its unlikeliest piece, from whose score that of an unknown
character is taken.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from research.errors import InputError
from research.models.encoders import open_tokenizer
from research.models.reading import refusing

KINDS = ("WordPiece", "Unigram", "BPE", "WordLevel")
# What loading reads; the others would bring the whole vocabulary back.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def choose_pieces(tokenizer: Any, counts: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Return the ids that stay, ascending: pieces found `least` times or more, and what any text may need.

    That is: added and special tokens, bytes, every sign, digit and emoji that is a piece by itself, and the single
    letters and vowel signs of the scripts of the pieces found. Letters of other scripts become unknown.

    Args:
        counts: How often the texts hold each id, (V,); later ids count as not found.

    Raises:
        InputError: it is no fast tokenizer of a known kind.
    """
    spec = read_spec(tokenizer)
    model, pieces = spec["model"], list_pieces(spec["model"])
    found = {pieces[place] for place in np.flatnonzero(counts >= least).tolist() if place in pieces}
    added = {token["content"] for token in spec["added_tokens"]}
    scripts = {script_of(char) for piece in found - added for char in piece}
    kept = found | keep_alphabet(spec, pieces.values(), scripts)
    kept |= {model["unk_token"]} if model.get("unk_token") else set()
    if model["type"] == "BPE":
        kept = close_merges(kept, list(read_merges(model)))
    ids = {place for place, piece in pieces.items() if piece in kept} | {token["id"] for token in spec["added_tokens"]}
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        ids |= {int(np.argmin(scores)), *([] if model.get("unk_id") is None else [model["unk_id"]])}
    return np.array(sorted(ids), dtype=np.int64)


def trim_tokenizer(tokenizer: Any, kept: NDArray[np.int64], samples: Sequence[str]) -> Any:
    """Return the tokenizer with the pieces of the ids `kept` alone, which are numbered from 0 in their order.

    It is saved and read back as any other, and tried on some texts.

    Raises:
        InputError: it cannot be read back, or cuts a text of kept pieces in another way.
    """
    complaint = f"the tokenizer of '{tokenizer.name_or_path}' cannot be trimmed"
    spec = read_spec(tokenizer)
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    # A call that cut or padded its texts leaves the tokenizer doing so.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    with refusing(complaint), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            if path.name not in TOKENIZER_FILES:
                path.unlink()
        trimmed_spec = trim_spec(spec, new_ids)
        (folder / "tokenizer.json").write_text(json.dumps(trimmed_spec, ensure_ascii=False), encoding="utf-8")
        _renumber_config(folder / "tokenizer_config.json", new_ids)
        trimmed = open_tokenizer(folder, complaint)
    trimmed.name_or_path = tokenizer.name_or_path
    for text in ("", *samples):
        before, after = (entry.backend_tokenizer.encode(text).ids for entry in (tokenizer, trimmed))
        if all(old in new_ids for old in before) and after != [new_ids[old] for old in before]:
            raise InputError(f"{complaint}: it would cut texts in another way; leave --trim_student_vocab out")
    return trimmed


def read_spec(tokenizer: Any) -> dict[str, Any]:
    """Return what a fast tokenizer's tokenizer.json holds.

    Raises:
        InputError: it has none, or its model is of an unknown kind.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of '{tokenizer.name_or_path}' cannot be trimmed: it is a slow one; use a model with a tokenizer.json"
        )
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] not in KINDS:
        raise InputError(
            f"the tokenizer of '{tokenizer.name_or_path}' cannot be trimmed: its model is a {spec['model']['type']}, "
            f"expected one of {', '.join(KINDS)}"
        )
    return spec


def list_pieces(model: Mapping[str, Any]) -> dict[int, str]:
    """Return {id: piece} of a tokenizer's model."""
    if model["type"] == "Unigram":
        return {place: piece for place, (piece, _) in enumerate(model["vocab"])}
    return {place: piece for piece, place in model["vocab"].items()}


def keep_alphabet(spec: Mapping[str, Any], pieces: Iterable[str], scripts: set[str]) -> set[str]:
    """Return the pieces that stay whatever the texts hold: bytes, signs, digits, emoji, and the letters of some scripts."""
    model = spec["model"]
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    before = [spec["normalizer"], spec["pre_tokenizer"]]
    of_bytes = set(pre_tokenizers.ByteLevel.alphabet()) if '"ByteLevel"' in json.dumps(before) else set()
    kept = set()
    for piece in pieces:
        text = piece.removeprefix(prefix).removesuffix(suffix) or piece
        if text in of_bytes or BYTE_PIECE.fullmatch(piece) or (len(text) == 1 and script_of(text) in scripts | {""}):
            kept.add(piece)
    return kept


def script_of(character: str) -> str:
    """Return the script of a letter or vowel sign, "BENGALI" say, as its name in Unicode begins; "" of anything else."""
    is_letter = unicodedata.category(character)[0] in "LM"
    return unicodedata.name(character, character).split(" ")[0] if is_letter else ""


def read_merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the two parts and the result of each merge of a BPE model, in the order of their ranks."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right, left + right.removeprefix(prefix)


def close_merges(kept: set[str], merges: Iterable[tuple[str, str, str]]) -> set[str]:
    """Add to some pieces all that a merge on the way to one of them is made of."""
    ways: dict[str, set[str]] = {}
    for left, right, result in merges:
        ways.setdefault(result, set()).update((left, right))
    closed: set[str] = set()
    waiting = list(kept)
    while waiting:
        piece = waiting.pop()
        if piece not in closed:
            closed.add(piece)
            waiting += ways.get(piece, ())
    return closed


def trim_spec(spec: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Return the content of tokenizer.json with the pieces of `new_ids` alone, under their new ids."""
    model = dict(spec["model"])
    pieces = {piece: new_ids[old] for old, piece in list_pieces(model).items() if old in new_ids}
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new_ids]
        model["unk_id"] = None if model.get("unk_id") is None else new_ids[model["unk_id"]]
    else:
        model["vocab"] = dict(sorted(pieces.items(), key=lambda entry: entry[1]))
    if model["type"] == "BPE":
        model["merges"] = [[left, right] for left, right, result in read_merges(model) if {left, right, result} <= pieces.keys()]
    return {
        **spec,
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, "id": new_ids[token["id"]]} for token in spec["added_tokens"]],
        "post_processor": _renumber_processor(spec["post_processor"], new_ids),
        "model": model,
    }


def _renumber_processor(processor: Any, new_ids: Mapping[int, int]) -> Any:
    """Return a post-processor that puts the same special tokens around a text, under their new ids."""
    if processor is None:
        return None
    processor = dict(processor)
    if processor["type"] == "Sequence":
        processor["processors"] = [_renumber_processor(entry, new_ids) for entry in processor["processors"]]
    elif processor["type"] == "TemplateProcessing":
        processor["special_tokens"] = {
            name: {**token, "ids": [new_ids[old] for old in token["ids"]]} for name, token in processor["special_tokens"].items()
        }
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        processor |= {side: [processor[side][0], new_ids[processor[side][1]]] for side in ("sep", "cls")}
    return processor


def _renumber_config(path: Path, new_ids: Mapping[int, int]) -> None:
    """Put the new ids into the table of added tokens that a tokenizer_config.json may hold."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in config:
        tokens = config["added_tokens_decoder"].items()
        config["added_tokens_decoder"] = {str(new_ids[int(old)]): token for old, token in tokens}
        path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
