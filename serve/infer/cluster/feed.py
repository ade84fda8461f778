"""Unanswered inputs, kept next to the driver until their answers arrive."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import ray

FeedHandle = Any
"""Handle of a :class:`Feed` actor, whose methods return references."""

ATTEMPTS = 10
"""Largest number of attempts at a parcel: each retry follows the loss of a process or a node."""


class BrokenOffError(Exception):
    """Another execution has replaced this one."""


class Feed:
    """Parcels by number.

    A Dataset has to know its inputs beforehand. Here its inputs are only numbers, without an end; tasks fetch the
    content of a number from this actor. The driver can therefore list inputs while the job runs, and a task that was
    lost with its node can be retried.
    """

    def __init__(self) -> None:
        self._parcels: dict[int, bytes] = {}
        self._attempts: Counter[tuple[str, int]] = Counter()
        self._answered = 0
        self._execution = 0
        self._changed = asyncio.Condition()

    async def put(self, number: int, parcel: bytes) -> None:
        """Keep a parcel. Parcels may arrive in another order than they were sent."""
        async with self._changed:
            self._parcels[number] = parcel
            self._changed.notify_all()

    async def expect(self, number: int, execution: int) -> None:
        """Wait until a parcel of this number has arrived.

        Raises:
            BrokenOffError: another execution has replaced this one.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._execution > execution or number in self._parcels or number < self._answered
            )
            self._check(execution)

    async def take(self, number: int) -> bytes | None:
        """A parcel; None if it is not needed any more."""
        return self._parcels.get(number)

    async def attempt(self, stage: str, number: int) -> bool:
        """Count an attempt of a stage at a parcel; return False if there were too many."""
        self._attempts[stage, number] += 1
        return self._attempts[stage, number] <= ATTEMPTS

    async def answered(self, number: int) -> None:
        """Drop a parcel: the driver has its answers."""
        self._parcels.pop(number, None)
        self._answered = max(self._answered, number + 1)
        for key in [key for key in self._attempts if key[1] == number]:
            del self._attempts[key]

    async def begin(self, execution: int) -> None:
        """End all earlier executions."""
        async with self._changed:
            self._execution = max(self._execution, execution)
            self._changed.notify_all()

    async def join(self, execution: int) -> None:
        """Raise :class:`BrokenOffError` if an execution has been replaced."""
        self._check(execution)

    async def leave(self, execution: int) -> None:
        """Wait until an execution is replaced."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._execution > execution)

    def _check(self, execution: int) -> None:
        if self._execution > execution:
            raise BrokenOffError


def this_node() -> dict[str, str]:
    """Resource label of this node, for actors that must live as long as the driver."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def start_feed() -> FeedHandle:
    """Start a feed on the driver's node."""
    return ray.remote(Feed).options(num_cpus=0, label_selector=this_node(), max_concurrency=1000).remote()
