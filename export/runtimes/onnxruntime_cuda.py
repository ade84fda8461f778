"""ONNX Runtime on CUDA: inputs, bank and logits bound to tensors on the device, CUDA graphs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompttune.errors import EngineError, first_line
from prompttune.export.folder import Manifest
from prompttune.export.layout import HEAD_BIAS, IMAGE, LOGITS, TASK_INDEX, bank_input
from prompttune.export.runtimes.base import Array, BankArray, RuntimeOptions
from prompttune.export.runtimes.tensors import as_torch, place_rows, update_row

_ELEMENT = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
}


class CudaCalls:
    """Calls whose inputs and outputs are torch tensors on the device.

    With a CUDA graph a batch size keeps its buffers, because a captured graph reads and writes the very addresses
    that it was captured with; so calls take turns there, and a bank that has moved is captured anew.
    """

    def __init__(self, session: Any, manifest: Manifest, options: RuntimeOptions) -> None:
        self.device = torch.device("cuda", options.cuda_index or 0)
        self._session = session
        self._fixed_classes = manifest.outputs[0].shape[1]
        self._map_size = tuple(int(side) for side in manifest.outputs[0].shape[2:])  # of a segmentation
        self._lock = threading.Lock() if options.cuda_graph else None
        self._graphs: dict[tuple[int, ...], tuple[str, dict[str, Tensor]]] = {}
        self._numbers = itertools.count(1)

    def place(self, rows: BankArray) -> Tensor:
        """A bank tensor [T, ...] on the device."""
        return place_rows(rows, self.device)

    def update(self, placed: Tensor, rows: BankArray, row: int) -> None:
        """Copy one row of the host's bank to the device."""
        update_row(placed, rows, row)

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
