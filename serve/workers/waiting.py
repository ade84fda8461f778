"""Waiting on the event loop: for several calls, and for work that cannot be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def gathered(calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all calls; the first failure cancels the others and is raised unchanged."""
    first, *others = calls
    if not others:
        return [await first]
    tasks = [asyncio.ensure_future(call) for call in (first, *others)]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def to_the_end(work: asyncio.Future[Result]) -> Result:
    """Await ``work`` to its end even if the caller is cancelled; the cancellation is raised afterwards."""
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
    """Await ``work``; it continues alone if the caller is cancelled."""
    work.add_done_callback(forget)
    return await asyncio.shield(work)


def forget(work: asyncio.Future[Result]) -> None:
    """Mark an error as retrieved, so that the event loop does not report it."""
    if not work.cancelled():
        work.exception()
