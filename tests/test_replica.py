"""A device whose worker dies: another one takes its place, and nobody waits for ever."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from prompttune.errors import EngineError
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.batching import replica as replica_module
from prompttune.serve.batching.replica import DeviceReplica
from prompttune.serve.messages import UnavailableError
from prompttune.serve.service.inference import least_busy
from prompttune.serve.workers import Key, WorkerDiedError
from tests.fake_worker import SETTINGS, FakeWorker, image

A, B = Key("a", "1"), Key("b", "2")
FOLDER = Path("tasks/x")


def scenario(test, **behaviour):
    async def run():
        workers = []

        def make(settings):
            worker = behaviour.get("make", FakeWorker)(settings)
            workers.append(worker)
            return worker

        replica = DeviceReplica(SETTINGS, make, behaviour.get("capacity", 2), 0.0, lambda *_: None)
        await replica.start()
        try:
            async with asyncio.timeout(10):
                await test(replica, workers)
        finally:
            await replica.close()

    asyncio.run(run())


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def test_what_the_worker_had_fails_and_what_waited_may_be_asked_again():
    async def test(replica, workers):
        workers[0].may_run.clear()
        inside = asyncio.create_task(replica.answer(A, FOLDER, [image(1)], 0))
        await workers[0].running.wait()
        waiting = asyncio.create_task(replica.answer(B, FOLDER, [image(2)], 0))
        await until(lambda: replica.queued_rows == 1)
        workers[0].die()
        assert not replica.ready
        with pytest.raises(UnavailableError, match="try again"):
            await inside
        with pytest.raises(WorkerDiedError):
            await waiting
        outcome = await replica.answer(B, FOLDER, [image(2)], 0)
        assert list(outcome.logits[0]) == [2, 2]
        assert (len(workers), replica.restarts, replica.ready) == (2, 1, True)

    scenario(test)


def test_a_row_is_not_given_away_while_a_batch_of_a_cancelled_request_reads_it():
    async def test(replica, workers):
        workers[0].may_run.clear()
        gone = asyncio.create_task(replica.answer(A, FOLDER, [image(1)], 0))
        await workers[0].running.wait()
        waits = asyncio.create_task(replica.answer(B, FOLDER, [image(2)], 0))
        for _ in range(2):
            gone.cancel()
            await asyncio.wait([gone], timeout=0.02)
            assert workers[0].rows == {A}
        workers[0].may_run.set()
        assert list((await waits).logits[0]) == [2, 2]
        assert workers[0].rows == {B}
        assert gone.cancelled()

    scenario(test, capacity=1)


def test_requests_that_come_while_it_starts_wait_for_it():
    async def test(replica, workers):
        workers[0].die()
        outcome = await replica.answer(A, FOLDER, [image(3)], 0)
        assert list(outcome.logits[0]) == [1, 3]

    scenario(test)


def test_a_worker_that_does_not_start_is_tried_again(monkeypatch):
    monkeypatch.setattr(replica_module, "FIRST_PAUSE_S", 0.001)
    made = []

    class Stubborn(FakeWorker):
        async def start(self):
            made.append(self)
            if 2 <= len(made) <= 4:
                raise EngineError("no memory")
            return "fake"

    async def test(replica, workers):
        workers[0].die()
        await replica.answer(A, FOLDER, [image(1)], 0)
        assert (len(made), replica.restarts) == (5, 4)

    scenario(test, make=Stubborn)


def test_a_lane_that_is_closed_while_it_starts_again_ends():
    class Slow(FakeWorker):
        async def start(self):
            if slow.is_set():
                await asyncio.Event().wait()
            slow.set()
            return "fake"

    slow = asyncio.Event()

    async def test(replica, workers):
        workers[0].die()
        await until(lambda: len(workers) == 2)
        await replica.close()
        assert replica.state == "closed"

    scenario(test, make=Slow)


def test_only_requests_count_as_look_ups():
    async def test(replica, workers):
        await replica.hold(A, FOLDER)
        await replica.answer(A, FOLDER, [image(1)], 0)
        await replica.answer(B, FOLDER, [image(1)], 0)
        assert (replica.counts.hits, replica.counts.misses) == (1, 1)

    scenario(test)


def test_the_first_start_tells_its_error():
    class Broken(FakeWorker):
        async def start(self):
            raise EngineError("no engine here")

    with pytest.raises(EngineError, match="no engine here"):
        scenario(None, make=Broken)


def test_a_request_goes_where_its_state_is_unless_others_have_much_less_to_do():
    async def test(first, _):
        settings = dataclasses.replace(SETTINGS, runtime=RuntimeOptions("cuda:1"))
        second = DeviceReplica(settings, FakeWorker, 2, 0.0, lambda *_: None)
        await second.start()
        await second.hold(A, FOLDER)
        replicas = [first, second]
        assert least_busy(replicas, A) is second
        assert least_busy(replicas, B) is first
        second._running.worker.may_run.clear()
        busy = asyncio.create_task(second.answer(A, FOLDER, [image(1)] * 12, 0))
        await until(lambda: second.running_rows + second.queued_rows == 12)
        assert least_busy(replicas, A) is first
        second._running.worker.may_run.set()
        await busy
        await second.close()

    scenario(test)
