"""Upper limits of one request."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prompttune.errors import UsageError
from prompttune.settings import setting

MEBI = 2**20
TOP_K = 5
"""Classes of an answer, unless a request asks for another number."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def read_size(value: str | int) -> int:
    """Bytes of a size such as ``512MiB`` or ``4GB``.

    Raises:
        UsageError: the text is not a size.
    """
    found = _SIZE.fullmatch(str(value).strip())
    if found is None or found[2].upper() not in _UNITS:
        raise UsageError(f"{value!r} is not a size such as 512MiB or 4GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class Limits:
    """Limits of a request; anything above them is refused before it uses memory."""

    body_bytes: int = setting(
        64 * MEBI, "Largest request.", option="max_body", kind=str, read=read_size, shown="64MiB", metavar="SIZE"
    )
    """Largest body, in bytes, before and after decompression."""
    rows: int = setting(256, "Most images of a request.", low=1, option="max_images")
    image_bytes: int = 32 * MEBI
    """Largest encoded image, in bytes."""
    pixels: int = setting(50_000_000, "Most pixels of an image, width times height.", low=1, option="max_pixels")
    id_length: int = 256
    """Longest request id, in characters."""
