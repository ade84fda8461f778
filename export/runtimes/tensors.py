"""Runtimes of torch tensors: arrays of bank precisions as tensors, on the host and on a device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompttune.errors import EngineError, first_line
from prompttune.export.runtimes.base import BankArray, Runtime

CAPTURE_LOCK = threading.RLock()
"""Hold it to capture a CUDA graph, and to allocate on a device while another thread may capture one: an allocation
fails then, or makes the capture fail."""
ALIGNMENT = 256
"""Alignment in bytes of addresses for TensorRT. torch aligns allocations to 512, slices to less."""
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def as_torch(array: NDArray[Any]) -> Tensor:
    """The same values as a tensor on the host; torch shares NumPy's memory unless the array is read-only.

    torch does not support ml_dtypes' bfloat16, so such an array is passed as 16-bit integers and reinterpreted.
    """
    whole = np.ascontiguousarray(array)
    if not whole.flags.writeable:
        whole = whole.copy()
    if whole.dtype == _BFLOAT16:
        return torch.from_numpy(whole.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(whole)


def check_tensors(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse tensors whose bytes TensorRT would read wrongly: it does not check the data at an address.

    Raises:
        EngineError: a dtype differs, a tensor has gaps, or its address is not aligned.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != dtypes[name]:
            raise EngineError(f"the input {name} is {tensor.dtype}, the engine takes {dtypes[name]}")
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise EngineError(f"the input {name} must be contiguous and start at a multiple of {ALIGNMENT} bytes")


def place_rows(rows: NDArray[Any], device: torch.device) -> Tensor:
    """A bank tensor [T, ...] on the device; it is there when this returns.

    Raises:
        EngineError: CUDA failed, for lack of memory perhaps.
    """
    with _loading(device):
        placed = as_torch(rows).to(device)
        torch.cuda.current_stream(device).synchronize()
    return placed


def update_rows(placed: Tensor, rows: NDArray[Any], changed: slice) -> None:
    """Copy some rows of the host's bank to a placed one; they are there when this returns. Others are not changed.

    Raises:
        EngineError: CUDA failed.
    """
    with _loading(placed.device), torch.cuda.device(placed.device):
        placed[changed].copy_(as_torch(rows[changed]))
        # The stream alone: waiting for the whole device is an error while another thread captures a CUDA graph.
        torch.cuda.current_stream().synchronize()


@contextlib.contextmanager
def _loading(device: torch.device) -> Iterator[None]:
    with CAPTURE_LOCK:
        try:
            yield
        except RuntimeError as problem:  # CUDA's errors, lack of memory among them
            raise EngineError(f"cannot load a task to {device}: {first_line(problem)}") from None


class TensorRuntime(Runtime):
    """A runtime whose bank consists of torch tensors on one device; on a CPU they are the host's own copy.

    Args:
        device: the device.
        library: name and version of the runtime.
    """

    def __init__(self, device: torch.device, library: str) -> None:
        self._device = device
        self._library = library

    @property
    def description(self) -> str:
        """See :attr:`Runtime.description`."""
        on_cpu = self._device.type == "cpu"
        return f"{self._library}, {'CPU' if on_cpu else torch.cuda.get_device_name(self._device)}"

    def place(self, rows: BankArray) -> Any:
        """See :meth:`Runtime.place`."""
        return as_torch(rows) if self._device.type == "cpu" else place_rows(rows, self._device)

    def update(self, placed: Any, rows: BankArray, changed: slice) -> None:
        """See :meth:`Runtime.update`."""
        if self._device.type != "cpu":
            update_rows(placed, rows, changed)
