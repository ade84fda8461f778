"""What one request may ask for at most."""

from __future__ import annotations

from dataclasses import dataclass

MEBI = 2**20
TOP_K = 5
"""Classes of an answer, unless a request asks for another number."""


@dataclass(frozen=True)
class Limits:
    """Limits of a request; what is above them is refused before it costs memory."""

    body_bytes: int = 64 * MEBI
    """Of a request, also after it was decompressed."""
    rows: int = 256
    """Images of a request."""
    image_bytes: int = 32 * MEBI
    """Of an encoded image."""
    pixels: int = 50_000_000
    """Of an image, width times height."""
    id_length: int = 256
    """Characters of a request id."""
