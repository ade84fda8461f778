"""Upper limits of one request."""

from __future__ import annotations

from dataclasses import dataclass

MEBI = 2**20
TOP_K = 5
"""Classes of an answer, unless a request asks for another number."""


@dataclass(frozen=True)
class Limits:
    """Limits of a request; anything above them is refused before it uses memory."""

    body_bytes: int = 64 * MEBI
    """Largest body, in bytes, before and after decompression."""
    rows: int = 256
    """Largest number of images."""
    image_bytes: int = 32 * MEBI
    """Largest encoded image, in bytes."""
    pixels: int = 50_000_000
    """Largest number of pixels of an image (width times height)."""
    id_length: int = 256
    """Longest request id, in characters."""
