"""ONNX: writing the traced graph to a file, and checking the file against its declaration."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from prompttune.errors import EngineError, first_line
from prompttune.export.folder import ONNX_FILE, ONNX_WEIGHTS_FILE
from prompttune.export.graph import Traced
from prompttune.export.layout import TensorSpec, bank_dtype
from prompttune.export.quiet import quiet

OPSET = 20
"""Operator set with Gelu and LayerNormalization, and without operators that TensorRT 10.13 lacks."""
FUSED_OPSET = 23
"""First operator set with an Attention operator."""
PROBE = "probe."
"""Prefix for names of values that hold an intermediate result of the forward."""
_STACK_TRACE = "pkg.torch.onnx.stack_trace"
_DTYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int64": onnx.TensorProto.INT64,
}


def export_onnx(traced: Traced, folder: Path, opset: int = OPSET) -> dict[str, str]:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``folder`` and check them.

    Returns:
        Name of the value in the file for each traced intermediate result. These values are not outputs of the model.

    Raises:
        EngineError: the graph cannot be exported, or the file differs from its declaration.
    """
    path = folder / ONNX_FILE
    probes = {name: PROBE + name for name in traced.probes}
    with quiet("torch.onnx", "onnxscript", "onnx_ir"):
        try:
            exported = torch.onnx.export(
                traced.program,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in traced.inputs],
                output_names=[*(spec.name for spec in traced.outputs), *probes.values()],
                dynamic_shapes=traced.dynamic,
                verbose=False,
            )
        except Exception as problem:
            cause: BaseException = problem
            while cause.__cause__ is not None:
                cause = cause.__cause__  # the exporter's own errors say only how to report one
            raise EngineError(f"the ONNX exporter failed: {first_line(cause)}") from problem
        assert exported is not None
        _forget_sources(exported.model)
        _keep_constants(exported.model)
        _fold_weights(exported.model)
        _average_by_product(exported.model)
        outputs = exported.model.graph.outputs
        del outputs[len(traced.outputs) :]
        exported.save(str(path), external_data=True)
    verify_onnx(path, traced.inputs, traced.outputs)
    return probes


def _forget_sources(model: Any) -> None:
    """Remove the exporter's stack traces: they name folders of this machine and make equal graphs differ."""
    for node in model.graph.all_nodes():
        node.metadata_props.pop(_STACK_TRACE, None)


def _keep_constants(model: Any) -> None:
    """Give the graph the constants that it lacks: the exporter loses bounds where it joins clamps of one value."""
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.producer() is None and value.graph is None:
                model.graph.register_initializer(value)


def _fold_weights(model: Any) -> None:
    """Slice and transpose the frozen weights now: quantisers and TensorRT need matrices, not computed ones.

    The exporter itself only folds small constants.
    """
    largest = max((value.const_value.nbytes for value in model.graph.initializers.values()), default=0)
    onnxscript.optimizer.fold_constants(
        model, input_size_limit=largest, output_size_limit=largest, onnx_shape_inference=False
    )
    onnxscript.optimizer.remove_unused_nodes(model)


def _average_by_product(model: Any) -> None:
    """Replace averages over the second-last axis, such as those over tokens, by products with a constant row.

    ONNX Runtime sums a single image in another order than a batch, and int8 operators after it turn the last digit into
    a large difference.
    """
    for node in [node for node in model.graph if node.op_type == "ReduceMean" and len(node.inputs) == 2]:
        values, axes = node.inputs
        if values.dtype != onnx_ir.DataType.FLOAT or values.shape is None or axes.const_value is None:
            continue
        rank, size = len(values.shape), values.shape[-2] if len(values.shape) > 1 else None
        if [axis % rank for axis in axes.const_value.numpy().tolist()] != [rank - 2] or not isinstance(size, int):
            continue
        weights = constant(model.graph, f"{node.name}.row", np.full((1, size), 1 / size, dtype=np.float32))
        tape = Tape()
        made = tape.op("MatMul", [weights, values])
        if "keepdims" in node.attributes and not node.attributes["keepdims"].as_int():
            made = tape.op("Squeeze", [made, axes])
        onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [made])
    onnxscript.optimizer.remove_unused_nodes(model)


def partly_in_bf16(path: Path, layers: Collection[str]) -> None:
    """Rewrite a file of float32 so that attention, and products with the matrices of some layers, run in bf16.

    Args:
        path: the file.
        layers: names of linear layers, such as ``backbone.mlp.fc2``.
    """
    model, half, full = onnx_ir.load(path), onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
    chosen = {node for node in model.graph if node.op_type == "MatMul" and _is_of(node, layers)}
    chosen.update(*(_attention(node) for node in model.graph if node.op_type == "Softmax"))
    for node in [node for node in model.graph if node in chosen]:
        for place, value in enumerate(node.inputs):
            assert value is not None
            if value.producer() in chosen:
                continue
            if value.const_value is not None:
                numbers = value.const_value.numpy().astype(bank_dtype("bf16"))
                cast = constant(model.graph, f"{value.name}_bf16", numbers)
            else:
                tape = Tape()
                cast = tape.op("Cast", [value], {"to": half})
                model.graph.insert_before(node, tape.nodes)
            node.replace_input_with(place, cast)
        made, tape = node.outputs[0], Tape()
        made.dtype, uses = half, [use for use in made.uses() if use.node not in chosen]
        if uses:
            back = tape.op("Cast", [made], {"to": full})
            model.graph.insert_after(node, tape.nodes)
            for use in uses:
                use.node.replace_input_with(use.idx, back)
    RemoveUnusedNodesPass()(model)
    onnx_ir.save(model, path, external_data=ONNX_WEIGHTS_FILE)


def _is_of(node: onnx_ir.Node, layers: Collection[str]) -> bool:
    """Whether the exporter made a node for one of the layers."""
    scopes = "".join(words for key, words in node.metadata_props.items() if key.endswith("name_scopes"))
    return any(f"{layer}'" in scopes for layer in layers)


def _attention(softmax: onnx_ir.Node) -> list[onnx_ir.Node]:
    """The nodes from the product of queries and keys to the one with the values; empty for another softmax."""
    nodes = [softmax, *softmax.outputs[0].consumers()]
    while nodes[0].op_type in ("Softmax", "Max", "Add"):  # scores are their first input
        scores = nodes[0].inputs[0]
        before = None if scores is None else scores.producer()
        if before is None:
            return []
        nodes.insert(0, before)
    return nodes if nodes[0].op_type == nodes[-1].op_type == "MatMul" and nodes[-2] is softmax else []


def constant(graph: onnx_ir.Graph, name: str, value: NDArray[Any] | np.generic) -> onnx_ir.Value:
    """The graph's constant of that name, created if it does not exist."""
    if name not in graph.initializers:
        tensor = onnx_ir.tensor(np.asarray(value), name=name)
        shape, kind = onnx_ir.Shape(np.shape(value)), onnx_ir.TensorType(tensor.dtype)
        graph.register_initializer(onnx_ir.Value(name=name, shape=shape, type=kind, const_value=tensor))
    return graph.initializers[name]


def verify_onnx(path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Check that an ONNX file is valid and has exactly the declared inputs and outputs.

    Names, order, dtypes, fixed sizes and dynamic axes must all match: this detects an exporter that bakes the sample's
    batch size into the graph.

    Raises:
        EngineError: the file is not valid or differs.
    """
    try:
        onnx.checker.check_model(str(path))
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as problem:  # the checker raises its own and protobuf's errors
        raise EngineError(f"{path.name} is not a valid ONNX file: {first_line(problem)}") from None
    for kind, declared, found in (("inputs", inputs, graph.input), ("outputs", outputs, graph.output)):
        names = [value.name for value in found]
        wanted = [spec.name for spec in declared]
        if names != wanted:
            raise EngineError(f"{path.name} has the {kind} {names}, declared were {wanted}")
        for spec, value in zip(declared, found, strict=True):
            tensor = value.type.tensor_type
            shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
            if tensor.elem_type != _DTYPES[spec.dtype] or shape != spec.shape:
                dtype = onnx.TensorProto.DataType.Name(tensor.elem_type)
                raise EngineError(
                    f"{path.name}: {spec.name} is {dtype} {list(shape)}, declared was {spec.dtype} {list(spec.shape)}"
                )
