"""Threads for decoding that would hold up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 2
"""JSON takes up to twenty times its size while it is decoded, so few bodies may be decoded at once."""
T = TypeVar("T")


class Decoders:
    """A few threads of one transport."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "decode")

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Call ``work`` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
