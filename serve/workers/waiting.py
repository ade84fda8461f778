"""Waiting on the event loop for work that cannot be stopped."""

from __future__ import annotations

import asyncio
from typing import TypeVar

Result = TypeVar("Result")


async def to_the_end(work: asyncio.Future[Result]) -> Result:
    """Await ``work`` to its end even when the caller is cancelled, who learns of it then."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as problem:
            cancelled = problem
    if cancelled is not None:
        forget(work)
        raise cancelled
    return work.result()


async def or_leave(work: asyncio.Future[Result]) -> Result:
    """Await ``work``; when the caller is cancelled it goes on without anybody who asks for its result."""
    work.add_done_callback(forget)
    return await asyncio.shield(work)


def forget(work: asyncio.Future[Result]) -> None:
    """Count an error as seen, so that the event loop does not report it."""
    if not work.cancelled():
        work.exception()
