"""What Linux says of the processor."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

_FACTS = Path("/proc/cpuinfo")
_INT8_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}


def facts() -> list[tuple[str, str]]:
    """Names and values, those of every core one after the other; none where they cannot be read."""
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in _FACTS.read_text().splitlines())
        return [(name.strip(), value.strip()) for name, colon, value in lines if colon]
    return []


def instructions() -> frozenset[str]:
    """Its instruction sets, as Linux names them."""
    return frozenset(word for name, value in facts() if name in ("flags", "Features") for word in value.split())


def saturates_int8() -> bool:
    """Whether sums of int8 products saturate at 16 bits: on x86 without VNNI, or where that is not known."""
    return platform.machine().lower() in ("x86_64", "amd64") and not _INT8_PRODUCTS & instructions()
