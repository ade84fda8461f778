"""Dynamic int8: activations get a separate scale for each row, so that the rows of a batch do not affect each other.

ONNX's DynamicQuantizeLinear uses one scale for a whole tensor, so an image's answer depends on the other images in its
batch. Here the scale depends only on the largest value of a token. Activations are unsigned with the zero point 128,
which ONNX Runtime's fastest kernels use; products are exact integers, and later operators work on each row alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from prompttune.export.folder import ONNX_WEIGHTS_FILE
from prompttune.export.formats.onnx_file import constant

_LARGEST = 127
_SMALLEST_SCALE = 1e-12
_CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


def quantise_rows(source: Path, target: Path, products: Collection[str]) -> None:
    """Write ``source`` with some of its products in int8; the names of all other values stay.

    Args:
        source: an ONNX file in fp32.
        target: the file to write, with its weights beside it.
        products: names of the MatMul nodes whose second input is a constant matrix [in, out].
    """
    model = onnx_ir.load(source)
    graph = model.graph
    point, one = constant(graph, "rows.zero_point", np.uint8(128)), constant(graph, "rows.one", np.float32(1))
    rows: dict[onnx_ir.Value, tuple[onnx_ir.Value, onnx_ir.Value]] = {}  # what several products read is quantised once
    uses: Counter[str | None] = Counter()
    for node in [node for node in graph if node.name in products]:
        tape = Tape()
        activations, matrix = node.inputs
        assert activations is not None
        assert matrix is not None
        if activations not in rows:
            scale = _row_scales(graph, tape, activations)
            rows[activations] = tape.op("QuantizeLinear", [tape.op("Div", [activations, scale]), one, point]), scale
        quantised, scale = rows[activations]
        uses[matrix.name] += 1
        weights, columns = _columns(graph, matrix, uses[matrix.name])
        # MatMulInteger, Cast and Mul in one. It takes no scale of a row, which is multiplied behind it.
        product = tape.op("MatMulIntegerToFloat", [quantised, weights, one, columns, point], domain=_CONTRIB)
        product.type, product.shape = node.outputs[0].type, node.outputs[0].shape  # nothing infers them after this node
        made = tape.op("Mul", [product, scale])
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [made])
    RemoveUnusedNodesPass()(model)
    model.opset_imports[_CONTRIB] = 1
    onnx_ir.save(model, target, external_data=ONNX_WEIGHTS_FILE)


def _row_scales(graph: onnx_ir.Graph, tape: Tape, activations: onnx_ir.Value) -> onnx_ir.Value:
    """Scale of each row [..., 1] of activations [..., K]."""
    last = constant(graph, "rows.axis", np.array([-1], dtype=np.int64))
    step = constant(graph, "rows.step", np.float32(1 / _LARGEST))
    least = constant(graph, "rows.smallest", np.float32(_SMALLEST_SCALE))
    largest = tape.op("ReduceMax", [tape.op("Abs", [activations]), last], {"keepdims": 1})
    return tape.op("Max", [tape.op("Mul", [largest, step]), least])


def _columns(graph: onnx_ir.Graph, matrix: onnx_ir.Value, use: int) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """A matrix [in, out] in int8, and the scale of each column [out].

    Each ``use`` of a matrix has a copy: ONNX Runtime cannot open a model with a shared one on a CPU without VNNI, where
    it changes the weights to unsigned ones (``session.x64quantprecision``).
    """
    assert matrix.const_value is not None
    weights = matrix.const_value.numpy()
    scales = np.maximum(np.abs(weights).max(axis=0), _SMALLEST_SCALE) / _LARGEST
    return (
        constant(graph, f"{matrix.name}_quantized{use}", np.round(weights / scales).astype(np.int8)),
        constant(graph, f"{matrix.name}_scale{use}", scales.astype(np.float32)),
    )
