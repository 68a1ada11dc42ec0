"""Damaged and foreign model folders for fuzz.py: each is loaded, or refused in one line.

Folders of every form that users have are copied and broken: bytes flipped, files halved, deleted, emptied,
turned into folders, swapped with those of another model, values of JSON files replaced by hostile ones.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import logging
import random
import resource
import shutil
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.builders import build_model_folder, make_texts
from support.checkpoints import save_former
from transformers import AutoModelForSequenceClassification

from research.errors import InputError
from research.logs import quiet_libraries, start_logging
from research.models.classifiers import StudentModel
from research.models.encoders import load_encoder, load_model_config, load_tokenizer
from research.models.native import build_native
from research.models.saved import load_classifier, save_classifier
from research.models.trial import Demands, try_classifier, try_pretrained

SEED = 20
HANG_S = 20
# Above this a load fails as it does when memory is short, and does not take the machine with it.
MEMORY_BYTES = 12 << 30
LABELS = ("bully", "threat", "spam")
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 10**6, 10**9, 2**31, 2**63, 10**30, 1e308, 0.5, "", "x", "১", "../x", "\x00", "a\nb",
    [], {}, [1], ["x"], {"x": 1}, [[[]]],
    "eager", "bert", "float99", "BertModel", "hostile--repo", {"AutoModel": "hostile.Model"},
)  # fmt: skip
HOSTILE_CONTENTS = (
    b"", b"null", b"[]", b"{}", b"7", b'"text"', b"\xff\xfe\x00", b"\x89PNG\r\n\x1a\n",
    b"[" * 100_000, b'{"a":' * 5_000, b"1" * 5_000,
    b"version https://git-lfs.github.com/spec/v1\n", struct.pack("<Q", 2**63), struct.pack("<Q", 10**8) + b"{}",
    struct.pack("<Q", 2) + b"{}", b"PK\x03\x04" + bytes(200), b"\x80\x02}q\x00.", b"<html>404</html>",
)  # fmt: skip


def build_folders(root: Path) -> dict[str, Path]:
    """Write a sound folder of each form.

    An encoder alone, with pickled or sharded weights, a student with either head, one of former versions, a foreign
    classifier, an encoder with a head file.
    """
    texts = make_texts(12)
    folders = {
        "encoder": build_model_folder("bert", "wordpiece", root / "encoder", texts, width=16),
        "pickled": build_model_folder("roberta", "byte_bpe", root / "pickled", texts, vocab_size=320, width=16),
        "sharded": build_model_folder("deberta-v2", "unigram", root / "sharded", texts, width=16),
    }
    for name in ("pickled", "sharded"):
        weights = load_file(folders[name] / "model.safetensors")
        (folders[name] / "model.safetensors").unlink()
        if name == "pickled":
            torch.save(weights, folders[name] / "pytorch_model.bin")
            continue
        save_file(weights, folders[name] / "model-00001-of-00001.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
        (folders[name] / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    tokenizer = load_tokenizer(str(folders["encoder"]))
    student = StudentModel(str(folders["encoder"]), len(LABELS), 0.1, 8)
    save_classifier(student, tokenizer, root / "student", {"labels": list(LABELS), "max_length": 32})
    settings = {"labels": list(LABELS), "max_length": 32, "text_normalization": "nfc"}
    save_classifier(build_native(load_encoder(str(folders["encoder"])), LABELS, 0.1), tokenizer, root / "native", settings)
    save_former(student, tokenizer, root / "former", settings)
    shutil.copytree(folders["pickled"], root / "head" / "encoder")
    torch.save(student.classifier.state_dict(), root / "head" / "head.pt")
    shutil.copytree(folders["encoder"], root / "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(root / "encoder", num_labels=3, id2label=dict(enumerate(LABELS)))
    model.save_pretrained(root / "classifier")
    return folders | {name: root / name for name in ("student", "native", "former", "head", "classifier")}


class Damage:
    """Breaks files of a folder in ways drawn from a seeded generator."""

    def __init__(self, generator: random.Random, donors: Sequence[Path]) -> None:
        self.generator = generator
        self.donors = donors
        self.kinds: dict[str, Callable[[Path], None]] = {
            "flip": self.flip, "halve": self.halve, "delete": Path.unlink, "content": self.write_hostile, "foreign": self.swap,
            "value": self.set_value, "folder": self.make_folder,
        }  # fmt: skip

    def do(self, folder: Path) -> str:
        """Break one file, and say how."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path, kind = self.generator.choice(files), self.generator.choice(list(self.kinds))
        self.kinds[kind](path)
        return f"{kind} {path.relative_to(folder)}"

    def flip(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        # Headers decide the most and are a small part of the bytes.
        end = min(len(content), self.generator.choice((16, 400, len(content))))
        for _ in range(self.generator.choice((1, 1, 3, 30))):
            if content:
                content[self.generator.randrange(end)] ^= 1 << self.generator.randrange(8)
        path.write_bytes(content)

    def halve(self, path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // self.generator.choice((2, 2, 3, 100))])

    def write_hostile(self, path: Path) -> None:
        path.write_bytes(self.generator.choice(HOSTILE_CONTENTS))

    def swap(self, path: Path) -> None:
        same = [donor for donor in self.donors if donor.name == path.name]
        shutil.copy(self.generator.choice(same if same and self.generator.random() < 0.7 else self.donors), path)

    def make_folder(self, path: Path) -> None:
        path.unlink()
        path.mkdir()

    def set_value(self, path: Path) -> None:
        """Replace a value somewhere in a JSON file, or one more key of it, by a hostile one."""
        if path.suffix != ".json":
            return self.flip(path)
        try:
            content = place = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return self.flip(path)
        key: Any = None
        while isinstance(place, dict | list):
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = self.generator.choice(keys) if keys else "added"
            if not keys or not isinstance(place[key], dict | list) or self.generator.random() < 0.3:
                break
            place = place[key]
        value = copy.deepcopy(self.generator.choice(HOSTILE_VALUES))
        if isinstance(place, dict):
            place[key] = value
        elif isinstance(place, list):
            place.append(value)
        else:
            content = value
        path.write_text(json.dumps(content), encoding="utf-8")


class Hang(BaseException):
    """Not an Exception, so that no handler takes it for a fault of the files."""


def load_as(kind: int, name: str) -> None:
    """Load a folder in one of the ways in which a run does."""
    demands = Demands(32, "mean", None, (1,), (1,))
    if kind == 0:
        load_model_config(name)
    elif kind == 1:
        load_tokenizer(name)
    elif kind == 2:
        load_encoder(name)
    elif kind == 3:
        try_pretrained(name, demands)
    else:
        try_classifier(name, load_classifier(name, LABELS).model, demands)


LOADERS = {
    "encoder": (0, 1, 2, 3), "pickled": (1, 2, 3), "sharded": (1, 2, 3), "student": (1, 2, 4, 4), "native": (2, 4, 4),
    "former": (4,), "head": (4,), "classifier": (4,),
}  # fmt: skip


def fuzz_models(count: int, root: Path, failing_after: Callable[[int, type[BaseException]], Any]) -> dict[str, Any]:
    """Damage and load `count` times, with a traceback on stderr for each that ends in neither a model nor one line."""
    generator = random.Random(SEED)
    folders = build_folders(root / "sound")
    damage = Damage(generator, sorted(path for path in (root / "sound").rglob("*") if path.is_file()))
    outcomes: Counter[str] = Counter()
    start_logging(logging.ERROR)
    quiet_libraries()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    slowest_s = 0.0
    for case in range(count):
        form = list(folders)[case % len(folders)]
        folder = root / f"case{case}"
        shutil.copytree(folders[form], folder)
        done = [damage.do(folder) for _ in range(generator.choice((1, 1, 2)))]
        started = time.monotonic()
        # A loop outside Python hears no signal; this prints where it is and ends the process.
        faulthandler.dump_traceback_later(4 * HANG_S, exit=True)
        try:
            with failing_after(HANG_S, Hang):
                load_as(generator.choice(LOADERS[form]), str(folder))
            outcome = "loaded"
        except InputError as error:
            outcome = "refused" if len(str(error).splitlines()) == 1 else "tracebacks"
        except (Exception, Hang):
            outcome = "tracebacks"
            print(f"load {case}: {form}, {', '.join(done)}\n{traceback.format_exc()}", file=sys.stderr)
        faulthandler.cancel_dump_traceback_later()
        outcomes[outcome] += 1
        slowest_s = max(slowest_s, time.monotonic() - started)
        shutil.rmtree(folder)
    return {name: outcomes[name] for name in ("loaded", "refused", "tracebacks")} | {"slowest_s": round(slowest_s, 2)}
