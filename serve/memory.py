"""Memory use of a process, from the kernel; Linux only."""

from __future__ import annotations

import re
from pathlib import Path


def process_bytes(field: str, pid: int | str = "self") -> int | None:
    """A field of ``/proc/PID/status`` in bytes; None where the file or the field does not exist."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def resident_bytes(pid: int | str = "self") -> int | None:
    """Resident set size of a process in bytes, this process by default; None where it cannot be read."""
    return process_bytes("VmRSS", pid)
