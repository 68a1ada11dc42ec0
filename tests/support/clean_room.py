"""Load a classifier's folder where nothing but torch and transformers is: run by `python -I` in an empty folder.

    python -I clean_room.py FOLDER TEXTS.json PROBABILITIES.json

writes the pipeline's probabilities, (N, C) in the order of the labels, of texts as they are.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, texts_file: str, answers_file: str) -> None:
    assert importlib.util.find_spec("research") is None, "the suite's code must not be there"
    from transformers import AutoTokenizer, pipeline

    texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    classify: Any = pipeline("text-classification", model=folder, top_k=None)
    labels = [classify.model.config.id2label[place] for place in range(classify.model.config.num_labels)]
    answers = classify(texts, truncation=True)
    rows = [{entry["label"]: entry["score"] for entry in answer} for answer in answers]
    ids = AutoTokenizer.from_pretrained(folder)(texts, truncation=True)["input_ids"]
    result = {"labels": labels, "probs": [[row[label] for label in labels] for row in rows], "ids": ids}
    Path(answers_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
