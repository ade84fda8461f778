"""ONNX Runtime, the embedded default: on the CPU, on CUDA, and on TensorRT through its provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from prompttune.errors import EngineError, MissingExtraError, UsageError, choose, first_line
from prompttune.export.folder import ONNX_FILE, ONNX_WEIGHTS_FILE, Manifest
from prompttune.export.layout import IMAGE, LOGITS, TASK_INDEX, bank_input
from prompttune.export.runtimes.base import Array, BankArray, Runtime, RuntimeOptions

if TYPE_CHECKING:
    from prompttune.export.runtimes.onnxruntime_cuda import CudaCalls

_QUIET = 4
"""ONNX Runtime's severity 'fatal': its errors arrive as exceptions and need not be logged as well."""
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where ONNX Runtime finds the weights of a model that it is given as bytes."""
PROVIDERS = ("tensorrt",)


def providers(options: RuntimeOptions) -> list[Any]:
    """Execution providers in order of preference.

    Raises:
        UsageError: the device or the provider is unknown, or they do not go together.
        MissingExtraError: ONNX Runtime was installed without CUDA or without TensorRT.
    """
    index = options.cuda_index
    if options.provider is not None:
        choose("provider", options.provider, PROVIDERS)
    if index is None:
        if options.provider or options.cuda_graph or options.cache:
            raise UsageError("providers, their cache and CUDA graphs belong to a GPU: give the device cuda")
        return ["CPUExecutionProvider"]
    available = ort.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise MissingExtraError("onnxruntime-gpu", "gpu", "or run on the device cpu")
    cuda: dict[str, Any] = {"device_id": index}
    if options.provider is None:
        if options.cache:
            raise UsageError("a cache belongs to the provider tensorrt")
        return [("CUDAExecutionProvider", cuda | {"enable_cuda_graph": options.cuda_graph}), "CPUExecutionProvider"]
    if "TensorrtExecutionProvider" not in available:
        raise MissingExtraError("TensorRT for ONNX Runtime", "gpu", "or leave the provider out, which runs on CUDA")
    # The precision is in the model's types: trt_fp16_enable would let TensorRT choose anew, norms included.
    tensorrt: dict[str, Any] = {"device_id": index, "trt_cuda_graph_enable": options.cuda_graph}
    if options.cache is not None:
        options.cache.mkdir(parents=True, exist_ok=True)
        tensorrt |= {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(options.cache),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(options.cache),
        }
    return [("TensorrtExecutionProvider", tensorrt), ("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


def session_options(options: RuntimeOptions) -> Any:
    """What ONNX Runtime's sessions have in common."""
    settings = ort.SessionOptions()
    settings.log_severity_level = _QUIET
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spin)))
    return settings


def open_session(folder: Path, options: RuntimeOptions, model: onnx.ModelProto | None = None) -> Any:
    """A session of a folder's ONNX file, or of ``model``, a changed one without its weights.

    ONNX Runtime refuses weights behind a symbolic link (1.24.1 all, others some), and the hub's cache is made of links
    to files of other names. The model then names the weights' real file.
    """
    path, weights = folder / ONNX_FILE, folder / ONNX_WEIGHTS_FILE
    settings, wanted = session_options(options), providers(options)
    if model is None and not weights.is_symlink():
        return ort.InferenceSession(str(path), settings, providers=wanted)
    model = onnx.load(str(path), load_external_data=False) if model is None else model
    real = weights.resolve()
    settings.add_session_config_entry(_WEIGHTS_FOLDER, str(real.parent))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = real.name
    return ort.InferenceSession(model.SerializeToString(), settings, providers=wanted)


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime.

    On the CPU ``OrtValue`` refers to the bank in host memory without a copy, so a changed row is seen at once. On CUDA
    the bank lies on the device, inputs and outputs are bound to tensors there, and a changed row is copied alone.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: RuntimeOptions) -> None:
        wanted = providers(options)
        if "bf16" in (manifest.precision, manifest.bank_precision) and wanted == ["CPUExecutionProvider"]:
            raise EngineError(
                "ONNX Runtime runs bf16 on CUDA alone: open the engine on cuda, or export it as fp16 or fp32"
            )
        if options.cuda_index is not None:
            ort.preload_dlls()  # torch brings the CUDA libraries
        try:
            self._session = open_session(folder, options)
        except Exception as problem:  # ONNX Runtime's errors share no base class below Exception
            raise EngineError(f"ONNX Runtime cannot open {folder / ONNX_FILE}: {first_line(problem)}") from None
        self.provider: str = self._session.get_providers()[0]
        if options.cuda_index is not None and self.provider == "CPUExecutionProvider":
            raise EngineError(f"ONNX Runtime cannot use {options.device}: its CUDA libraries did not load")
        self._cuda: CudaCalls | None = None
        if options.cuda_index is not None:
            from prompttune.export.runtimes.onnxruntime_cuda import CudaCalls  # needs torch, which the CPU does not

            self._cuda = CudaCalls(self._session, manifest, options)

    @property
    def description(self) -> str:
        """See :attr:`Runtime.description`."""
        return f"ONNX Runtime {ort.__version__}, {self.provider}"

    def place(self, rows: BankArray) -> Any:
        """See :meth:`Runtime.place`."""
        return ort.OrtValue.ortvalue_from_numpy(rows) if self._cuda is None else self._cuda.place(rows)

    def update(self, placed: Any, rows: BankArray, row: int) -> None:
        """See :meth:`Runtime.update`; on the CPU the placed tensor is the host's copy."""
        if self._cuda is not None:
            self._cuda.update(placed, rows, row)

    def run(self, images: Array, task_index: NDArray[np.int64], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`."""
        named = {bank_input(key): placed for key, placed in bank.items()}
        if self._cuda is not None:
            return self._cuda.run(images, task_index, named)
        feeds = {
            IMAGE: ort.OrtValue.ortvalue_from_numpy(images),
            TASK_INDEX: ort.OrtValue.ortvalue_from_numpy(task_index),
            **named,
        }
        try:
            logits: Array = self._session.run_with_ort_values([LOGITS], feeds)[0].numpy()
        except Exception as problem:
            raise EngineError(f"ONNX Runtime failed: {first_line(problem)}") from None
        return logits
