"""Waiting on the event loop for several calls."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def gathered(calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all calls; the first failure cancels the others and is raised as it is."""
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
