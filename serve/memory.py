"""Memory of a process, as the kernel tells it; Linux only."""

from __future__ import annotations

import re
from pathlib import Path


def process_bytes(field: str, pid: int | str = "self") -> int | None:
    """A field of ``/proc/PID/status`` in bytes; None where there is no such file or field."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def resident_bytes(pid: int | str = "self") -> int | None:
    """Resident set of a process, this one by default; None where it cannot be read."""
    return process_bytes("VmRSS", pid)
