"""Batches across tasks: full, fair, in order, and honest about who was in them."""

import asyncio
import dataclasses

import pytest

from prompttune.errors import EngineError
from prompttune.serve.batching.batcher import Batcher
from prompttune.serve.messages import UnavailableError
from prompttune.serve.workers import Key, WorkerDiedError
from tests.fake_worker import SETTINGS, FakeWorker, image

A, B, C = (Key(name, version) for name, version in (("a", "1"), ("b", "2"), ("c", "3")))


def scenario(test, kind=FakeWorker):
    """Run ``test(worker, batcher)`` on an event loop, bounded in time."""

    async def run():
        worker = kind()
        worker.rows = {A, B, C}
        batcher = Batcher(worker)
        try:
            async with asyncio.timeout(10):
                await test(worker, batcher)
        finally:
            await batcher.close()

    asyncio.run(run())


async def busy(worker, batcher):
    """A batch that runs until ``may_run`` is set, so that what comes next has to wait."""
    worker.may_run.clear()
    first = asyncio.create_task(batcher.answer(C, [image(0)]))
    await worker.running.wait()
    return first


async def queued(batcher, rows):
    while batcher.queued_rows != rows:
        await asyncio.sleep(0)


def test_rows_come_back_to_whom_they_belong():
    async def test(worker, batcher):
        outcomes = await asyncio.gather(
            batcher.answer(A, [image(1), image(2), image(3)]),
            batcher.answer(B, [image(4)]),
            batcher.answer(A, [image(5)]),
        )
        assert [[list(row) for row in one.logits] for one in outcomes] == [
            [[1, 1], [1, 2], [1, 3]],
            [[2, 4]],
            [[1, 5]],
        ]

    scenario(test)


def test_requests_that_wait_share_a_batch():
    async def test(worker, batcher):
        first = await busy(worker, batcher)
        others = [asyncio.create_task(batcher.answer(key, [image(1)])) for key in (A, B, C)]
        await queued(batcher, 3)
        worker.may_run.set()
        await asyncio.gather(first, *others)
        assert worker.batches == [[C], [A, B, C]]

    scenario(test)


def test_a_large_request_is_spread_over_batches():
    async def test(worker, batcher):
        outcome = await batcher.answer(A, [image(value) for value in range(10)])
        assert [row[1] for row in outcome.logits] == list(range(10))
        assert [rows for rows, _ in outcome.batches] == [4, 4, 2]
        assert outcome.infer_s == 1.5

    scenario(test)


def test_a_busy_task_leaves_the_others_their_share():
    async def test(worker, batcher):
        first = await busy(worker, batcher)
        flood = asyncio.create_task(batcher.answer(A, [image(value) for value in range(100)]))
        await queued(batcher, 100 - 4)  # the second slot is filled while the first runs
        late = [asyncio.create_task(batcher.answer(key, [image(1)])) for key in (B, C)]
        await queued(batcher, 100 - 4 + 2)
        worker.may_run.set()
        await asyncio.gather(*late)
        assert len(worker.batches) <= 4
        assert sorted(worker.batches[2]) == [A, A, B, C]
        await asyncio.gather(first, flood)

    scenario(test)


def test_a_task_keeps_its_turn_when_one_of_its_requests_is_given_up():
    async def test(worker, batcher):
        first = await busy(worker, batcher)
        gone, *stay = [asyncio.create_task(batcher.answer(key, [image(1)])) for key in (A, A, B)]
        await queued(batcher, 3)
        gone.cancel()
        await queued(batcher, 2)
        worker.may_run.set()
        await asyncio.gather(first, *stay)
        assert worker.batches[1] == [A, B]

    scenario(test)


def test_the_most_urgent_priority_goes_first():
    async def test(worker, batcher):
        first = await busy(worker, batcher)
        later = asyncio.create_task(batcher.answer(A, [image(1)] * 3, priority=2))
        sooner = asyncio.create_task(batcher.answer(B, [image(1)] * 3, priority=1))
        await queued(batcher, 2)
        worker.may_run.set()
        await asyncio.gather(first, later, sooner)
        assert worker.batches[1] == [B, B, B, A]

    scenario(test)


def test_a_row_waits_for_company_no_longer_than_allowed():
    async def run():
        worker = FakeWorker()
        worker.rows = {A, B}
        patient = Batcher(worker, max_delay_s=30.0)
        try:
            async with asyncio.timeout(10):
                alone = asyncio.create_task(patient.answer(A, [image(1)]))
                await queued(patient, 1)
                for _ in range(10):
                    await asyncio.sleep(0)
                assert not worker.batches
                await asyncio.gather(alone, patient.answer(B, [image(1)] * 3))  # full: no reason to wait
                assert len(worker.batches) == 1
        finally:
            await patient.close()

        brief = Batcher(worker, max_delay_s=0.01)
        try:
            async with asyncio.timeout(10):
                await brief.answer(A, [image(1)])
        finally:
            await brief.close()

    asyncio.run(run())


def test_who_gives_up_while_waiting_is_not_run():
    async def test(worker, batcher):
        first = await busy(worker, batcher)
        gone = asyncio.create_task(batcher.answer(A, [image(1)]))
        stays = asyncio.create_task(batcher.answer(B, [image(2)]))
        await queued(batcher, 2)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        worker.may_run.set()
        await asyncio.gather(first, stays)
        assert worker.batches == [[C], [B]]
        assert batcher.queued_rows == 0

    scenario(test)


def test_who_gives_up_while_running_waits_until_nobody_reads_the_row():
    async def test(worker, batcher):
        first = await busy(worker, batcher)
        for _ in range(3):  # a deadline, then the client, then the server's end
            first.cancel()
            done, _ = await asyncio.wait([first], timeout=0.02)
            assert not done
        worker.may_run.set()
        with pytest.raises(asyncio.CancelledError):
            await first

    scenario(test)


def test_a_request_whose_batch_fails_waits_for_its_other_batch():
    class FirstFails(FakeWorker):
        async def run(self, slot, keys):
            if slot == 0:
                raise EngineError("the first batch fails")
            return await super().run(slot, keys)

    async def test(worker, batcher):
        worker.may_run.clear()
        spread = asyncio.create_task(batcher.answer(A, [image(1)] * 8))
        await worker.running.wait()
        done, _ = await asyncio.wait([spread], timeout=0.05)
        assert not done
        worker.may_run.set()
        with pytest.raises(EngineError, match="the first batch fails"):
            await spread

    scenario(test, FirstFails)


def test_an_engine_that_fails_fails_the_requests_of_that_batch_alone():
    async def test(worker, batcher):
        with pytest.raises(Exception, match="holds no row"):
            await batcher.answer(Key("a", "9"), [image(1)])
        assert (await batcher.answer(A, [image(1)])).logits[0][0] == 1

    scenario(test)


def test_death_tells_who_was_in_the_batch_from_who_was_not():
    async def test(worker, batcher):
        first = await busy(worker, batcher)
        waits = asyncio.create_task(batcher.answer(A, [image(1)]))
        await queued(batcher, 1)
        worker.die()
        with pytest.raises(UnavailableError, match="try again"):
            await first
        with pytest.raises(WorkerDiedError):
            await waits
        assert worker.batches == [[C]]
        with pytest.raises(WorkerDiedError):
            await batcher.answer(A, [image(1)])

    scenario(test)


def test_counts_each_batch():
    async def run():
        worker, seen = FakeWorker(dataclasses.replace(SETTINGS, max_batch=2)), []
        worker.rows = {A}
        batcher = Batcher(worker, on_batch=lambda size, seconds: seen.append((size.images, seconds)))
        try:
            await batcher.answer(A, [image(1)] * 3)
        finally:
            await batcher.close()
        assert seen == [(2, 0.5), (1, 0.5)]

    asyncio.run(run())
