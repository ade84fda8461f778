"""int8: the backbone's matrix products, quantised by ONNX Runtime's own tools.

Weights are int8 with one scale a channel. Activations get their scale in each call (``dynamic``) or from calibration
images (``static``, as QuantizeLinear and DequantizeLinear pairs).
Norms, softmax, GELU, residual sums and whatever a task brings stay in float.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from prompttune.errors import EngineError, first_line
from prompttune.export.formats.base import BuildRequest, Feeds
from prompttune.export.layout import IMAGE, TASK_INDEX, bank_dtype, bank_input, stack_states
from prompttune.export.onnx import MODEL_FILE, WEIGHTS_FILE

_BATCH = 8


def quantise(request: BuildRequest, folder: Path, symmetric: bool = False) -> None:
    """Replace the fp32 ``model.onnx`` in ``folder`` by its int8 form.

    Args:
        request: settings, tasks and calibration images.
        folder: holds the model.
        symmetric: zero-point 0 for the activations of static int8, as TensorRT wants it; ONNX Runtime's CPU kernels
            are quicker with unsigned ones.

    Raises:
        EngineError: ONNX Runtime cannot quantise the graph.
    """
    static = request.settings.quantization == "static"
    common: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": True,
    }
    with tempfile.TemporaryDirectory(dir=folder) as name, _quiet():
        made = Path(name) / MODEL_FILE
        try:
            if static:
                request.on_stage("calibrating int8")
                quantize_static(
                    folder / MODEL_FILE,
                    made,
                    _Calibration(request),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                    extra_options={"MatMulConstBOnly": True, "ActivationSymmetric": symmetric},
                    **common,
                )
            else:
                request.on_stage("quantising to int8")
                quantize_dynamic(folder / MODEL_FILE, made, extra_options={"MatMulConstBOnly": True}, **common)
        except Exception as problem:  # the tools raise whatever they meet
            raise EngineError(f"ONNX Runtime cannot quantise the graph: {first_line(problem)}") from problem
        (folder / MODEL_FILE).unlink()
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
        for file in Path(name).iterdir():
            file.chmod(0o644)  # the tools write through a private temporary file
            file.replace(folder / file.name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the tools' advice on the root logger; their errors still arrive as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime ships no types
    """Calibration images of every task, under their own task."""

    def __init__(self, request: BuildRequest) -> None:
        self._feeds = _feeds(request)

    def get_next(self) -> Feeds | None:
        """The next call's inputs, None at the end."""
        return next(self._feeds, None)


def _feeds(request: BuildRequest) -> Iterator[Feeds]:
    settings, states = request.settings, request.states
    bank: Feeds = {}
    if not settings.baked:
        stacked = stack_states(request.model.state_layout(), states.values(), bank_dtype(str(settings.bank_precision)))
        bank = {bank_input(key): rows for key, rows in stacked.items()}
    for row, task in enumerate(states):
        images = request.images(task, settings.calibration_images)
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            yield {IMAGE: batch, TASK_INDEX: np.full(len(batch), row, dtype=np.int64), **bank}
