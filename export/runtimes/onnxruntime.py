"""ONNX Runtime, the embedded default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from prompttune.errors import EngineError, MissingExtraError, first_line
from prompttune.export.folder import Manifest
from prompttune.export.layout import IMAGE, LOGITS, TASK_INDEX, bank_input
from prompttune.export.onnx import MODEL_FILE
from prompttune.export.runtimes.base import Array, BankArray, Runtime, RuntimeOptions

_QUIET = 4
"""ONNX Runtime's severity 'fatal': its errors arrive as exceptions and need not be logged as well."""


def providers(options: RuntimeOptions) -> list[Any]:
    """Execution providers in order of preference.

    Raises:
        UsageError: the device is unknown.
        MissingExtraError: ONNX Runtime was installed without CUDA.
    """
    index = options.cuda_index
    if index is None:
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise MissingExtraError("onnxruntime-gpu", "gpu", "or run on the device cpu")
    return [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime.

    The bank stays in host memory and ``OrtValue`` refers to it without a copy: on the CPU a changed row is seen at
    once, on CUDA ONNX Runtime copies the bank to the device in each call.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: RuntimeOptions) -> None:
        wanted = providers(options)
        if "bf16" in (manifest.precision, manifest.bank_precision) and wanted == ["CPUExecutionProvider"]:
            raise EngineError(
                "ONNX Runtime runs bf16 on CUDA alone: open the engine on cuda, or export it as fp16 or fp32"
            )
        settings = ort.SessionOptions()
        settings.log_severity_level = _QUIET
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        path = folder / MODEL_FILE
        try:
            self._session = ort.InferenceSession(str(path), settings, providers=wanted)
        except Exception as problem:  # ONNX Runtime's errors share no base class below Exception
            raise EngineError(f"ONNX Runtime cannot open {path}: {first_line(problem)}") from None
        self.provider: str = self._session.get_providers()[0]
        if options.device != "cpu" and self.provider == "CPUExecutionProvider":
            raise EngineError(f"ONNX Runtime cannot use {options.device}: its CUDA libraries did not load")

    @property
    def description(self) -> str:
        """See :attr:`Runtime.description`."""
        return f"ONNX Runtime {ort.__version__}, {self.provider}"

    def place(self, rows: BankArray) -> Any:
        """See :meth:`Runtime.place`."""
        return ort.OrtValue.ortvalue_from_numpy(rows)

    def update(self, placed: Any, rows: BankArray, row: int) -> None:
        """Nothing to do: the placed tensor is the host's copy."""

    def run(self, images: Array, task_index: NDArray[np.int64], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`."""
        feeds = {
            IMAGE: ort.OrtValue.ortvalue_from_numpy(images),
            TASK_INDEX: ort.OrtValue.ortvalue_from_numpy(task_index),
            **{bank_input(key): placed for key, placed in bank.items()},
        }
        return self._call(feeds)

    def _call(self, feeds: Mapping[str, Any]) -> Array:
        try:
            logits: Array = self._session.run_with_ort_values([LOGITS], feeds)[0].numpy()
        except Exception as problem:
            raise EngineError(f"ONNX Runtime failed: {first_line(problem)}") from None
        return logits
