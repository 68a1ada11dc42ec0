"""Int8 with fixed scales, so that a text's probability does not depend on its batch.

Matrix products with weights take both sides in int8: weights with a scale for each output channel, activations with one
scale for the tensor, fixed beforehand by the smallest and largest value on training texts. (ONNX Runtime's "dynamic"
scales are taken from the tensor at hand, so they mix the rows of a batch.) Products of two activations, as in attention,
normalisations and activation functions stay in float32: they are few, and lose most.

Embeddings are int8 with a scale for each token: a row is looked up and multiplied by its scale, so the table is never
held in float32 and the error of a token is at most 1/254 of its own largest value.

Weights use 7 of the 8 bits: processors without VNNI add two products of 8 bits in 16, which overflows with all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.models.reading import refusing

Feed = dict[str, NDArray[np.int64]]
PRODUCTS = ("MatMul", "Gemm")


def write_int8(source: Path, target: Path, calibration: Iterable[Feed]) -> None:
    """Write the int8 form of an exported model.

    Args:
        calibration: Inputs of the model, as from training texts; without padding, whose values no text has.

    Raises:
        InputError: the quantiser cannot do it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, refusing("--int8: the model cannot be quantised"):
        prepared = Path(scratch) / "prepared.onnx"
        # Symbolic shapes are no use to it here, and their inference does not know every operator of torch's exporter.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            FeedReader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(target)
        quantize_embeddings(model.graph)
        onnx.checker.check_model(model)
        onnx.save(model, target)


class FeedReader:
    """Hands out feeds as ONNX Runtime's quantiser asks for them: each once, then None."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        """Return the next feed."""
        return next(self.feeds, None)


def quantize_embeddings(graph: Any) -> None:
    """Let every table of floats that rows are only looked up in be int8 with a scale for each row, in place."""
    from onnx import TensorProto, helper, numpy_helper

    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for table in list(graph.initializer):
        nodes = readers.get(table.name, [])
        looked_up = all(node.op_type == "Gather" and node.input[0] == table.name for node in nodes)
        if not nodes or not looked_up or len(table.dims) != 2 or table.data_type != TensorProto.FLOAT:
            continue
        if any(attribute.name == "axis" and attribute.i != 0 for node in nodes for attribute in node.attribute):
            continue
        quantized, scales = quantize_rows(numpy_helper.to_array(table))
        codes, scale = f"{table.name}_int8", f"{table.name}_scale"
        graph.initializer.remove(table)
        graph.initializer.extend([numpy_helper.from_array(quantized, codes), numpy_helper.from_array(scales, scale)])
        for node in nodes:
            ids, result = node.input[1], node.output[0]
            # `{result}_scale` is the quantiser's, where a product reads the rows.
            row, real, factor = (f"{result}_{part}" for part in ("int8", "real", "row_scale"))
            place = list(graph.node).index(node)
            graph.node.remove(node)
            built = [
                helper.make_node("Gather", [codes, ids], [row], f"{result}_codes"),
                helper.make_node("Cast", [row], [real], f"{result}_cast", to=TensorProto.FLOAT),
                helper.make_node("Gather", [scale, ids], [factor], f"{result}_scales"),
                helper.make_node("Mul", [real, factor], [result], f"{result}_product"),
            ]
            for offset, new in enumerate(built):
                graph.node.insert(place + offset, new)


def quantize_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return a table (V, H) as int8 and the scales (V, 1) that give it back; a row of zeros has scale 1."""
    largest = np.abs(table).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(table / scales).astype(np.int8), scales
