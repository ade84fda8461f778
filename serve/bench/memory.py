"""Memory of this process, in bytes: what stays resident, and the peak on the way there."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from prompttune.serve.memory import process_bytes, resident_bytes

_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Written to ``clear_refs`` it sets the kernel's peak back to what is resident now (man 5 proc)."""


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def device_bytes(device: str) -> int | None:
    """Memory in use on a CUDA device, by whatever holds it; None for another device.

    Asked of the driver, because ONNX Runtime's memory is not in PyTorch's own accounts.
    """
    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


@dataclass
class Growth:
    """By how much memory grew within a block; None where it could not be read."""

    resident: int | None = None
    """Resident set at the block's end over its beginning."""
    peak: int | None = None
    """Highest resident set within the block over its beginning."""
    device: int | None = None
    """The same as ``resident`` on the CUDA device; its allocators keep their peak."""


@contextlib.contextmanager
def memory_growth(device: str = "cpu") -> Iterator[Growth]:
    """Measure the block; the figures are there when it has ended.

    What was freed before and is still held by the allocator may be used again within the block and is not counted.
    """
    gc.collect()
    resettable = _reset_peak()
    resident, used = resident_bytes(), device_bytes(device)
    growth = Growth()
    yield growth
    growth.resident = _difference(resident_bytes(), resident)
    growth.peak = _difference(process_bytes("VmHWM"), resident) if resettable else None
    growth.device = _difference(device_bytes(device), used)


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
