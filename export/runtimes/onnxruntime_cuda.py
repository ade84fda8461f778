"""ONNX Runtime on CUDA: inputs, bank and logits bound to tensors on the device, CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompttune.errors import EngineError, first_line
from prompttune.export.folder import Manifest
from prompttune.export.layout import LOGITS
from prompttune.export.runtimes.base import Array, BankArray, RuntimeOptions
from prompttune.export.runtimes.tensors import CAPTURE_LOCK, as_torch, place_rows, update_rows

_ELEMENT = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
}
_NO_GRAPH = -1
_GRAPHS = 32
"""Largest number of CUDA graphs per session; more calls run without. ONNX Runtime frees them with the session."""


_Call = tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]
"""Shapes of a call's inputs, and addresses of its bank."""


class CudaCalls:
    """Calls whose inputs and outputs are torch tensors on the device.

    With CUDA graphs inputs of the same shapes keep their buffers, because a captured graph reads and writes the very
    addresses that it was captured with; a bank that has moved is captured anew. ONNX Runtime keeps graphs by thread,
    and their intermediate results share memory with those of other calls, so all calls run on one thread of the
    session.
    """

    def __init__(self, session: Any, manifest: Manifest, options: RuntimeOptions) -> None:
        self.device = torch.device("cuda", options.cuda_index or 0)
        self._session = session
        self._inputs = manifest.inputs
        self._output = manifest.outputs[0]
        self._thread = ThreadPoolExecutor(1, "onnxruntime-cuda-graph") if options.cuda_graph else None
        self._graphs: dict[_Call, tuple[int, dict[str, Tensor]]] = {}
        self._captured = 0

    def place(self, rows: BankArray) -> Tensor:
        """A bank tensor [T, ...] on the device."""
        return place_rows(rows, self.device)

    def update(self, placed: Tensor, rows: BankArray, changed: slice) -> None:
        """Copy some rows of the host's bank to the device."""
        update_rows(placed, rows, changed)

    def run(self, inputs: Mapping[str, NDArray[Any]], bank: Mapping[str, Tensor], graph: bool = True) -> Array:
        """Logits as the manifest declares them; ``bank`` by input name. Without ``graph`` none is captured.

        Raises:
            EngineError: ONNX Runtime or CUDA failed.
        """
        given = {name: as_torch(one) for name, one in inputs.items()}
        if self._thread is None:
            return self._run(given, bank, graph=False)
        return self._thread.submit(self._run, given, bank, graph).result()

    def _run(self, given: Mapping[str, Tensor], bank: Mapping[str, Tensor], graph: bool) -> Array:
        shapes = tuple(tuple(tensor.shape) for tensor in given.values())
        key = (shapes, tuple(tensor.data_ptr() for tensor in bank.values()))
        try:
            if key in self._graphs and graph:
                number, tensors = self._graphs[key]
                for name, tensor in given.items():
                    tensors[name].copy_(tensor)
                return self._bound(tensors, number)
            with CAPTURE_LOCK:
                tensors = {name: tensor.to(self.device, copy=True) for name, tensor in given.items()} | dict(bank)
                tensors[LOGITS] = self._logits(tensors)
            if not graph or self._captured == _GRAPHS:
                return self._bound(tensors, _NO_GRAPH)
            return self._capture(key, tensors)
        except RuntimeError as problem:  # CUDA's errors, lack of memory among them
            raise EngineError(f"ONNX Runtime failed: {first_line(problem)}") from None

    def _logits(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Where the logits go: as declared, each named axis as large as in the inputs."""
        sizes = {
            axis: size
            for spec in self._inputs
            for axis, size in zip(spec.shape, tensors[spec.name].shape, strict=True)
            if isinstance(axis, str)
        }
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in self._output.shape]
        return torch.empty(shape, dtype=getattr(torch, self._output.dtype), device=self.device)

    def _capture(self, key: _Call, tensors: dict[str, Tensor]) -> Array:
        """Run for the first time with a graph: ONNX Runtime captures it in this very call."""
        self._graphs = {known: one for known, one in self._graphs.items() if known[1] == key[1]}
        self._captured += 1  # a number is never used again, whatever became of it
        number = self._captured
        with CAPTURE_LOCK:
            logits = self._bound(tensors, number)
        self._graphs[key] = number, tensors
        return logits

    def _bound(self, tensors: Mapping[str, Tensor], graph: int) -> Array:
        binding = self._session.io_binding()
        for name, tensor in tensors.items():
            bind = binding.bind_output if name == LOGITS else binding.bind_input
            bind(name, "cuda", self.device.index, _ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        try:
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
            self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
        except Exception as problem:  # ONNX Runtime's errors share no base class below Exception
            raise EngineError(f"ONNX Runtime failed: {first_line(problem)}") from None
        logits: Array = tensors[LOGITS].to("cpu", copy=True).numpy()  # the next call writes to the buffer
        return logits
