"""Serve an exported model over HTTP (pip install fastapi uvicorn onnxruntime tokenizers numpy).

MODEL=results/first/student_onnx uvicorn serve:app --app-dir examples
curl -s localhost:8000/classify -H 'content-type: application/json' -d '{"texts": ["ভিডিওটা ভালো লাগলো"]}'
"""

from __future__ import annotations

import os
from typing import Annotated, Any

from classify import Classifier
from fastapi import FastAPI
from pydantic import BaseModel, Field

app = FastAPI()
classifier = Classifier(os.environ["MODEL"], int8=os.environ.get("INT8", "0") == "1")


class Question(BaseModel):
    """Texts to classify, some hundreds at most: a request holds its thread until all are answered."""

    texts: Annotated[list[Annotated[str, Field(max_length=10_000)]], Field(max_length=256)]


@app.post("/classify")
def classify(question: Question) -> list[dict[str, Any]]:
    """Return each text's labels and probabilities."""
    return [{"labels": classifier.decide(probs), "probs": probs} for probs in classifier(question.texts)]
