"""Memory of this process, in bytes: what stays resident, and the peak on the way there."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Written to ``clear_refs`` it sets the kernel's peak back to what is resident now (man 5 proc)."""


def _status(field: str) -> int | None:
    """A field of ``/proc/self/status`` in bytes, None off Linux."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    return None if found is None else int(found[1]) * 1024


def resident_bytes() -> int | None:
    """Resident set of this process, None off Linux."""
    return _status("VmRSS")


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
    growth.peak = _difference(_status("VmHWM"), resident) if resettable else None
    growth.device = _difference(device_bytes(device), used)


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
