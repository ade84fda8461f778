"""ONNX Runtime, the embedded default: on the CPU, on CUDA, and on TensorRT through its provider."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompttune.errors import EngineError, MissingExtraError, UsageError, choose, first_line
from prompttune.export.folder import Manifest
from prompttune.export.layout import HEAD_BIAS, IMAGE, LOGITS, TASK_INDEX, bank_input
from prompttune.export.onnx import MODEL_FILE
from prompttune.export.runtimes.base import Array, BankArray, Runtime, RuntimeOptions
from prompttune.export.runtimes.tensors import as_torch, place_rows, update_row

_QUIET = 4
"""ONNX Runtime's severity 'fatal': its errors arrive as exceptions and need not be logged as well."""
PROVIDERS = ("tensorrt",)
_ELEMENT = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
}


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
    return settings


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
        path = folder / MODEL_FILE
        try:
            self._session = ort.InferenceSession(str(path), session_options(options), providers=wanted)
        except Exception as problem:  # ONNX Runtime's errors share no base class below Exception
            raise EngineError(f"ONNX Runtime cannot open {path}: {first_line(problem)}") from None
        self.provider: str = self._session.get_providers()[0]
        if options.cuda_index is not None and self.provider == "CPUExecutionProvider":
            raise EngineError(f"ONNX Runtime cannot use {options.device}: its CUDA libraries did not load")
        self._cuda = None if options.cuda_index is None else _Cuda(self._session, manifest, options)

    @property
    def description(self) -> str:
        """See :attr:`Runtime.description`."""
        return f"ONNX Runtime {ort.__version__}, {self.provider}"

    def place(self, rows: BankArray) -> Any:
        """See :meth:`Runtime.place`."""
        return ort.OrtValue.ortvalue_from_numpy(rows) if self._cuda is None else place_rows(rows, self._cuda.device)

    def update(self, placed: Any, rows: BankArray, row: int) -> None:
        """See :meth:`Runtime.update`; on the CPU the placed tensor is the host's copy."""
        if self._cuda is not None:
            update_row(placed, rows, row)

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
        return self._call(feeds)

    def _call(self, feeds: Mapping[str, Any]) -> Array:
        try:
            logits: Array = self._session.run_with_ort_values([LOGITS], feeds)[0].numpy()
        except Exception as problem:
            raise EngineError(f"ONNX Runtime failed: {first_line(problem)}") from None
        return logits


class _Cuda:
    """Calls whose inputs and outputs are torch tensors on the device.

    With a CUDA graph a batch size keeps its buffers, because a captured graph reads and writes the very addresses
    that it was captured with; so calls take turns there, and a bank that has moved is captured anew.
    """

    def __init__(self, session: Any, manifest: Manifest, options: RuntimeOptions) -> None:
        self.device = torch.device("cuda", options.cuda_index or 0)
        self._session = session
        self._fixed_classes = manifest.outputs[0].shape[1]
        self._lock = threading.Lock() if options.cuda_graph else None
        self._graphs: dict[tuple[int, ...], tuple[str, dict[str, Tensor]]] = {}
        self._numbers = itertools.count(1)

    def run(self, images: Array, task_index: NDArray[np.int64], bank: Mapping[str, Tensor]) -> Array:
        """Logits [B, C]; ``bank`` by input name."""
        given = {IMAGE: as_torch(images), TASK_INDEX: as_torch(task_index)}
        if self._lock is None:
            held = {name: tensor.to(self.device) for name, tensor in given.items()}
            return self._bound({**held, **bank, LOGITS: self._logits(len(images), bank)}, graph="-1")
        with self._lock:
            graph, tensors = self._captured(len(images), bank)
            for name, tensor in given.items():
                tensors[name].copy_(tensor)
            return self._bound(tensors, graph)

    def _logits(self, rows: int, bank: Mapping[str, Tensor]) -> Tensor:
        fixed = self._fixed_classes
        classes = fixed if isinstance(fixed, int) else bank[bank_input(HEAD_BIAS)].shape[1]
        return torch.empty(rows, classes, device=self.device)

    def _captured(self, rows: int, bank: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        """The graph of a batch size over this bank, and its tensors; ONNX Runtime captures it in its first runs."""
        where = tuple(tensor.data_ptr() for tensor in bank.values())
        key = (rows, *where)
        if key not in self._graphs:
            self._graphs = {known: one for known, one in self._graphs.items() if known[1:] == where}
            image = next(one for one in self._session.get_inputs() if one.name == IMAGE)
            tensors = {
                IMAGE: torch.empty(rows, *image.shape[1:], device=self.device),
                TASK_INDEX: torch.empty(rows, dtype=torch.int64, device=self.device),
                **bank,
                LOGITS: self._logits(rows, bank),
            }
            self._graphs[key] = (str(next(self._numbers)), tensors)
        return self._graphs[key]

    def _bound(self, tensors: Mapping[str, Tensor], graph: str) -> Array:
        binding = self._session.io_binding()
        for name, tensor in tensors.items():
            bind = binding.bind_output if name == LOGITS else binding.bind_input
            bind(name, "cuda", self.device.index, _ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph)  # -1 runs without one
        try:
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
            self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
        except Exception as problem:
            raise EngineError(f"ONNX Runtime failed: {first_line(problem)}") from None
        logits: Array = tensors[LOGITS].cpu().numpy()
        return logits
