"""The cache of rows: who stays, who goes, and that nobody waits for ever."""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from prompttune.serve.bank import BankFullError
from prompttune.serve.batching.task_cache import CacheCounts, TaskCache
from prompttune.serve.workers import Key, VersionGoneError, WorkerDiedError
from tests.fake_worker import FakeWorker

FOLDER = Path("tasks/x")
A, B, C, D = (Key(name, "1") for name in "abcd")


def scenario(test, capacity=2, kind=FakeWorker):
    async def run():
        worker, counts = kind(), CacheCounts()
        async with asyncio.timeout(10):
            await test(worker, TaskCache(worker, capacity, counts), counts)

    asyncio.run(run())


async def use(cache, *keys):
    for key in keys:
        async with cache.using(key, FOLDER):
            pass


async def settle(turns=20):
    for _ in range(turns):
        await asyncio.sleep(0)


def test_the_least_recently_used_goes():
    async def test(worker, cache, counts):
        await use(cache, A, B, A, C)
        assert worker.rows == {A, C}
        assert worker.loads == [A, B, C]
        assert (counts.hits, counts.misses, counts.evictions) == (1, 3, 1)
        assert C in cache
        assert B not in cache

    scenario(test)


def test_many_who_want_one_state_load_it_once():
    async def test(worker, cache, counts):
        worker.may_load.clear()
        waiting = [asyncio.create_task(use(cache, A)) for _ in range(5)]
        await settle()
        worker.may_load.set()
        await asyncio.gather(*waiting)
        assert worker.loads == [A]

    scenario(test)


def test_a_load_blocks_nobody_else():
    async def test(worker, cache, counts):
        await use(cache, A)
        worker.may_load.clear()
        slow = asyncio.create_task(use(cache, B))
        await settle()
        await use(cache, A)
        assert not slow.done()
        worker.may_load.set()
        await slow

    scenario(test)


def test_a_state_in_use_is_not_evicted():
    async def test(worker, cache, counts):
        async with cache.using(A, FOLDER), cache.using(B, FOLDER):
            late = asyncio.create_task(use(cache, C))
            await settle()
            assert worker.rows == {A, B}
        await late
        assert C in worker.rows

    scenario(test)


def test_a_state_that_is_always_in_use_gives_way_in_the_end():
    async def test(worker, cache, counts):
        async def stay(held):
            async with cache.using(A, FOLDER):
                held.set()
                await asyncio.sleep(0.01)

        async def crowd():
            """Someone uses A at every moment."""
            for _ in range(20):
                entered = asyncio.Event()
                users.append(asyncio.create_task(stay(entered)))
                await asyncio.wait([asyncio.create_task(entered.wait())], timeout=0.005)

        users = []
        crowding = asyncio.create_task(crowd())
        await settle()
        await use(cache, B)
        assert B in worker.loads
        assert not crowding.done() or len(worker.loads) > 2, "B came only after the crowd had gone"
        await crowding
        await asyncio.gather(*users)

    scenario(test, capacity=1)


def test_a_load_that_fails_gives_its_row_back():
    async def test(worker, cache, counts):
        worker.gone = {B}
        for _ in range(5):
            with pytest.raises(VersionGoneError):
                await use(cache, B)
        await use(cache, A, C)
        assert worker.rows == {A, C}

    scenario(test)


def test_who_gives_up_leaves_the_load_to_the_others():
    async def test(worker, cache, counts):
        worker.may_load.clear()
        gone, stays = (asyncio.create_task(use(cache, A)) for _ in range(2))
        await settle()
        gone.cancel()
        await settle()
        worker.may_load.set()
        await stays
        with pytest.raises(asyncio.CancelledError):
            await gone
        await use(cache, B, C)
        assert len(worker.rows) == 2

    scenario(test)


def test_a_dropped_state_frees_its_row():
    async def test(worker, cache, counts):
        await use(cache, A, B)
        await cache.drop(A)
        assert worker.rows == {B}
        await use(cache, C)
        assert worker.rows == {B, C}
        async with cache.using(C, FOLDER):
            await cache.drop(C)
            assert C in worker.rows

    scenario(test)


def test_a_drop_that_is_cancelled_frees_its_row_once_the_worker_has():
    class Slow(FakeWorker):
        async def evict(self, key, keep=True):
            await self.may_run.wait()
            await super().evict(key, keep)

    async def test(worker, cache, counts):
        await use(cache, A, B)
        worker.may_run.clear()
        drop = asyncio.create_task(cache.drop(A))
        await settle()
        drop.cancel()
        async with cache.using(B, FOLDER):
            load = asyncio.create_task(use(cache, C))
            await settle()
            assert worker.loads == [A, B]
            worker.may_run.set()
            with pytest.raises(asyncio.CancelledError):
                await drop
            await load
        assert worker.rows == {B, C}

    scenario(test, kind=Slow)


def test_the_end_of_the_worker_reaches_all_who_wait():
    async def test(worker, cache, counts):
        async with contextlib.AsyncExitStack() as users:
            for key in (A, B):
                await users.enter_async_context(cache.using(key, FOLDER))
            waits = [asyncio.create_task(use(cache, key)) for key in (C, D, A)]
            await settle()
            cache.close()
            for one in waits[:2]:
                with pytest.raises(WorkerDiedError):
                    await one

    scenario(test)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_use_keeps_the_books(seed):
    async def test(worker, cache, counts):
        chance = random.Random(seed)
        keys = [Key(str(task), "1") for task in range(8)]

        async def client():
            for _ in range(40):
                key = chance.choice(keys)
                async with cache.using(key, FOLDER):
                    assert key in worker.rows
                    for _ in range(chance.randrange(4)):
                        await asyncio.sleep(0)
                    assert key in worker.rows

        await asyncio.gather(*(client() for _ in range(12)))
        assert len(worker.rows) <= 3
        assert counts.hits + counts.misses == 12 * 40
        assert len(cache) == len(worker.rows)

    scenario(test, capacity=3)


def test_an_engine_that_holds_every_task_itself_evicts_none():
    async def test(worker, cache, counts):
        await use(cache, A, B, C, D, A)
        assert worker.rows == {A, B, C, D}
        assert counts.evictions == 0

    scenario(test, capacity=None)


class Bounded(FakeWorker):
    """A worker of ten classes; a task has as many as its version says. Loads take turns, as those of a process do."""

    def __init__(self):
        super().__init__()
        self.turn = asyncio.Lock()

    async def load(self, key, folder):
        async with self.turn:
            await asyncio.sleep(0)
            if sum(int(one.version) for one in self.rows) + int(key.version) > 10:
                raise BankFullError("the axis classes would be too large")
            await super().load(key, folder)


def test_states_leave_until_the_classes_of_another_fit():
    async def test(worker, cache, counts):
        small = [Key(f"small{number}", "3") for number in range(3)]
        await use(cache, *small)
        assert worker.rows == set(small)
        await use(cache, Key("wide", "7"))  # a row is free
        assert worker.rows == {small[2], Key("wide", "7")}
        assert (counts.misses, counts.evictions, len(cache)) == (4, 2, 2)
        await use(cache, small[0], small[1])
        assert worker.rows == {small[0], small[1]}
        with pytest.raises(BankFullError):
            await use(cache, Key("never", "11"))
        await use(cache, *small)
        assert worker.rows == {*small}

    scenario(test, capacity=4, kind=Bounded)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_use_of_tasks_of_any_width_keeps_the_books(seed):
    async def test(worker, cache, counts):
        chance = random.Random(seed)
        keys = [Key(str(task), str(1 + task)) for task in range(9)]

        async def client():
            for _ in range(40):
                key = chance.choice(keys)
                async with cache.using(key, FOLDER):
                    for _ in range(chance.randrange(4)):
                        await asyncio.sleep(0)
                    assert key in worker.rows

        await asyncio.gather(*(client() for _ in range(12)))
        assert sum(int(one.version) for one in worker.rows) <= 10
        assert len(cache) == len(worker.rows)
        assert cache._free == 4 - len(worker.rows)

    scenario(test, capacity=4, kind=Bounded)
