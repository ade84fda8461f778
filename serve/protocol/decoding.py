"""Threads for decoding that would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 2
"""Number of decoding threads. JSON takes up to twenty times its size in memory, so only a few bodies may be decoded."""
T = TypeVar("T")


class Decoders:
    """Decoding threads of one transport."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "decode")

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Run ``work`` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
