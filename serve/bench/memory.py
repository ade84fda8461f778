"""Memory of this process in bytes: the resident set, and its peak."""

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
"""Value for ``clear_refs`` that resets the kernel's peak to the current resident set (man 5 proc)."""


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def device_bytes(device: str) -> int | None:
    """Used memory of a CUDA device, by all programs; None for another device.

    The driver is asked, because PyTorch's own counters do not include ONNX Runtime's memory.
    """
    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


@dataclass
class Growth:
    """Growth of memory within a block; None if it cannot be read."""

    resident: int | None = None
    """Resident set at the end of the block minus that at its start."""
    peak: int | None = None
    """Highest resident set within the block minus that at its start."""
    device: int | None = None
    """The same as ``resident`` on the CUDA device, whose allocators keep their peak."""


@contextlib.contextmanager
def memory_growth(device: str = "cpu") -> Iterator[Growth]:
    """Measure the block; the figures are available after its end.

    Memory that was freed before and is still held by the allocator may be reused within the block, and is not counted.
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
