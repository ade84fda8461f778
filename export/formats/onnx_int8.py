"""int8: the backbone's matrix products.

Weights are int8 with one scale per channel. Activations get their scale in each call (``dynamic``, one scale per row:
:mod:`.onnx_rowwise`) or from calibration images (``static``, by ONNX Runtime's own tools, as QuantizeLinear and
DequantizeLinear pairs). In both cases the channels are first balanced on calibration images
(:mod:`prompttune.export.precision.smooth`). Norms, softmax, GELU, residual sums and all of a task's tensors stay in
float. With static scales the last product of the first blocks' MLPs does as well: the values after GELU have the
longest tails, and early errors pass through every later block. OpenVINO computes these and attention in bf16.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime import OrtValue
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

from prompttune.backbones import Backbone
from prompttune.errors import EngineError, first_line
from prompttune.export.banks import BankForm, stack_states
from prompttune.export.folder import ONNX_FILE, ONNX_WEIGHTS_FILE
from prompttune.export.formats.base import BuildRequest, Feeds
from prompttune.export.formats.onnx_file import partly_in_bf16
from prompttune.export.formats.onnx_rowwise import quantise_rows
from prompttune.export.layout import IMAGE, TASK_INDEX, bank_dtype, bank_input
from prompttune.export.precision.smooth import smoothed
from prompttune.export.quiet import quiet
from prompttune.export.runtimes.base import Array
from prompttune.export.runtimes.choice import OPENVINO

_BATCH = 8
_FLOAT_BLOCKS = 3
"""With static scales, the first 1/N of the blocks keep their MLP's last product in float."""


def quantise(request: BuildRequest, folder: Path, symmetric: bool = False) -> list[str]:
    """Replace the fp32 ``model.onnx`` in ``folder`` by its int8 form, and return the layers that stay in float.

    Args:
        request: settings, tasks and calibration images.
        folder: folder that holds the model.
        symmetric: whether static int8 activations have the zero point 0, which TensorRT needs; ONNX Runtime's CPU
            kernels are faster with unsigned ones.

    Raises:
        EngineError: the graph cannot be quantised, or does not have a product to quantise.
    """
    static, backbone = request.settings.quantization == "static", request.model.backbone
    openvino = request.settings.options.get("runtime") == OPENVINO
    in_float = _last_products(backbone)[: math.ceil(backbone.depth / _FLOAT_BLOCKS)] if static else []
    products = _products(folder / ONNX_FILE, backbone, in_float)
    with tempfile.TemporaryDirectory(dir=folder) as name, quiet(""):
        made = Path(name) / ONNX_FILE
        try:
            if static:
                request.on_stage("calibrating int8")
                quantize_static(
                    folder / ONNX_FILE,
                    made,
                    SimpleNamespace(get_next=partial(next, _feeds(request), None)),  # a CalibrationDataReader
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=["MatMul"],
                    nodes_to_quantize=products,
                    per_channel=True,
                    activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                    # ONNX Runtime makes them unsigned when it opens a file, and fails where two products share one.
                    # OpenVINO computes in int8 with signed ones alone.
                    weight_type=QuantType.QInt8 if symmetric or openvino else QuantType.QUInt8,
                    use_external_data_format=True,
                    extra_options={
                        "ActivationSymmetric": symmetric,
                        "WeightSymmetric": True,
                        "OpTypesToExcludeOutputQuantization": ["MatMul"],
                    },
                )
            else:
                request.on_stage("quantising to int8")
                quantise_rows(folder / ONNX_FILE, made, products)
            if openvino:
                partly_in_bf16(made, in_float)
        except Exception as problem:  # the tools may raise any error
            raise EngineError(f"the graph cannot be quantised: {first_line(problem)}") from problem
        (folder / ONNX_FILE).unlink()
        (folder / ONNX_WEIGHTS_FILE).unlink(missing_ok=True)
        for file in Path(name).iterdir():
            file.chmod(0o644)  # the tools write through a private temporary file
            file.replace(folder / file.name)
    return in_float


def calibrated(request: BuildRequest) -> BuildRequest:
    """The request with a model whose channels are balanced on the calibration images."""
    request.on_stage("balancing channels for int8")
    states = {
        name: {key: torch.from_numpy(np.array(value, dtype=np.float32)) for key, value in state.items()}
        for name, state in request.states.items()
    }
    calls = ((images, states[task]) for task, images in _batches(request))
    model = smoothed(request.model, calls)
    model.head.apart = request.settings.quantization != "static"  # with a scale a row, nothing beside it matters
    return dataclasses.replace(request, model=model)


def _products(path: Path, backbone: Backbone, in_float: Collection[str]) -> list[str]:
    """Names of the nodes to quantise: products with a constant matrix, without those of the layers ``in_float``.

    Products of two activations and those with a task's tensors stay in float: a scale that was calibrated on some tasks
    need not fit the next one. ONNX Runtime's own ``MatMulConstBOnly`` has no effect in the static form. The exporter
    records for each node the module that it comes from.

    Raises:
        EngineError: the graph does not have such nodes.
    """
    scopes = {
        node.name: "".join(one.value for one in node.metadata_props if one.key.endswith("name_scopes"))
        for node in _frozen(path)
    }
    products = [name for name, scope in scopes.items() if not any(f"{layer}'" in scope for layer in in_float)]
    if not products:  # ONNX Runtime treats an empty list as all nodes, including those of tasks
        raise EngineError(f"int8 quantises products with frozen matrices, and {backbone.name} has none: choose fp16")
    return products


def _frozen(path: Path) -> list[onnx.NodeProto]:
    """The products with a constant matrix."""
    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in constants]


def has_products(path: Path) -> bool:
    """Whether a file has anything to quantise."""
    return bool(_frozen(path))


def _last_products(backbone: Backbone) -> list[str]:
    """timm's name of the last product of each block's MLP, as the exporter records it."""
    names = {id(module): name for name, module in backbone.named_modules()}
    layers = (getattr(getattr(block.timm, "mlp", None), "fc2", None) for block in backbone.blocks)
    return [f"backbone.{names[id(layer)]}" for layer in layers if layer is not None]


def _feeds(request: BuildRequest) -> Iterator[Feeds]:
    settings, states = request.settings, request.states
    form = BankForm(request.model.state_layout())
    stacked = stack_states(form, states.values(), bank_dtype(str(settings.bank_precision)))
    bank: dict[str, Any] = {bank_input(key): rows for key, rows in stacked.rows.items()}
    if settings.bank_precision == "bf16":  # a type that ONNX Runtime does not know in NumPy
        kind = onnx.TensorProto.BFLOAT16
        bank = {name: OrtValue.ortvalue_from_numpy_with_onnx_type(rows, kind) for name, rows in bank.items()}
    numbers = {task: number for number, task in enumerate(states)}
    for task, batch in _batches(request):
        if settings.baked:
            yield {IMAGE: batch, TASK_INDEX: np.full((len(batch), 1), numbers[task], dtype=np.int64)}
        else:
            yield {IMAGE: batch, **stacked.index([[numbers[task]]] * len(batch)), **bank}


def _batches(request: BuildRequest) -> Iterator[tuple[str, Array]]:
    """Calibration images by task, one batch at a time; with many tasks, the first ones give one image each."""
    wanted = request.settings.calibration_images
    tasks = list(request.states)[:wanted]
    for task in tasks:
        images = request.images(task, math.ceil(wanted / len(tasks)))
        for start in range(0, len(images), _BATCH):
            yield task, images[start : start + _BATCH]
