"""Classify texts with an exported model: onnxruntime, tokenizers and numpy, nothing of this suite.

python examples/classify.py results/first/student_onnx "ভিডিওটা ভালো লাগলো"
"""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Classifier:
    """An exported model, which gives each text's {label: probability}.

    Args:
        folder: What research_export.py wrote.
        int8: Run the quantised model.
        num_threads: Of one call; several of them can run at once.
    """

    def __init__(self, folder: str | Path, *, int8: bool = False, num_threads: int = 1) -> None:
        folder = Path(folder)
        self.settings = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # cuts texts by itself
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        name = "model_quantized.onnx" if int8 else "model.onnx"
        self.session = onnxruntime.InferenceSession(folder / "onnx" / name, options, providers=["CPUExecutionProvider"])

    def __call__(self, texts: list[str]) -> list[dict[str, float]]:
        """Return the probabilities of each text; a blank one has none."""
        return [self.classify(text) if text.strip() else {} for text in texts]

    def classify(self, text: str) -> dict[str, float]:
        """Return one text's probabilities: by itself, so that nothing is padded."""
        form = self.settings["text_normalization"]
        text = (text if form == "none" else unicodedata.normalize(form.upper(), text)).strip()
        ids = np.array([self.tokenizer.encode(text).ids], dtype=np.int64)
        logits = self.session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0]
        probs = 1 / (1 + np.exp(-logits.astype(np.float64)))
        return dict(zip(self.settings["labels"], probs.tolist(), strict=True))

    def decide(self, probs: dict[str, float]) -> list[str]:
        """Return the labels whose probability reaches their threshold."""
        return [label for label, prob in probs.items() if prob >= self.settings["thresholds"][label]]


if __name__ == "__main__":
    classifier = Classifier(sys.argv[1])
    for answer in classifier(sys.argv[2:]):
        print(json.dumps({"labels": classifier.decide(answer), "probs": answer}, ensure_ascii=False))
