"""ONNX with ONNX Runtime's own adapter files: one task a call, chosen by a run option.

https://onnxruntime.ai/docs/genai/tutorials/multi-lora.html describes the mechanism. The model's task tensors are
initialisers that are inputs too; a task's ``adapter.onnx_adapter`` holds its values for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import AdapterFormat, OrtValue

from prompttune.errors import UsageError
from prompttune.export.folder import ONNX_FILE, ONNX_WEIGHTS_FILE, Manifest, Task
from prompttune.export.formats.base import BuildRequest, Built, Format, Settings
from prompttune.export.graph import trace_adapter
from prompttune.export.layout import bank_dtype
from prompttune.export.onnx import FUSED_OPSET, OPSET, export_onnx

ADAPTER_FILE = "adapter.onnx_adapter"
_VERSION = 1


class OnnxAdapterFormat(Format):
    """``model.onnx`` with the first task's values as defaults, and an adapter file in every task's folder."""

    name = "onnx-adapter"
    precisions = ("fp32", "fp16")

    def check(self, settings: Settings) -> None:
        """See :meth:`Format.check`."""
        super().check(settings)
        if settings.baked:
            raise UsageError("an adapter is what is not baked in: choose --format onnx with --baked")
        if settings.bank_precision == "bf16":
            raise UsageError("ONNX Runtime's adapter files know no bf16: choose the bank precision fp16 or fp32")

    def build(self, request: BuildRequest, folder: Path) -> Built:
        """See :meth:`Format.build`."""
        request.on_stage("tracing and writing the graph")
        settings = request.settings
        traced = trace_adapter(
            request.model,
            precision=settings.precision,
            bank_precision=str(settings.bank_precision),
            attention=str(settings.attention),
        )
        opset = FUSED_OPSET if settings.attention == "fused" else OPSET
        first = next(iter(request.states.values()))
        dtype = bank_dtype(str(settings.bank_precision))
        export_onnx(traced, folder, opset, {key: np.asarray(value, dtype) for key, value in first.items()})
        files = [name for name in (ONNX_FILE, ONNX_WEIGHTS_FILE) if (folder / name).is_file()]
        return Built(traced.inputs, traced.outputs, files, opset)

    def write_task(self, manifest: Manifest, task: Task, folder: Path) -> None:
        """See :meth:`Format.write_task`."""
        dtype = bank_dtype(manifest.bank_precision)
        values: dict[str, Any] = {
            key: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, dtype)) for key, value in task.state.items()
        }
        adapter = AdapterFormat()
        adapter.set_adapter_version(_VERSION)
        adapter.set_model_version(_VERSION)
        adapter.set_parameters(values)
        adapter.export_adapter(str(folder / ADAPTER_FILE))
