"""Images that rows share in a batch: what is grouped, how much is padding, and that rows stay independent."""

import asyncio

import numpy as np
import pytest

from prompttune.serve.batching.batcher import Batcher
from prompttune.serve.batching.queues import PADDING, Queues, RowsJob
from prompttune.serve.workers import Key
from tests.fake_worker import FakeWorker, image

KEYS = [Key(f"task{number}", str(number)) for number in range(40)]


class Busy:
    """A batcher whose worker holds a first batch, so that what comes next waits; and the sizes of its batches."""

    def __init__(self, answers=1000):
        self.worker = FakeWorker()
        self.worker.rows = set(KEYS)
        self.sizes = []
        self.batcher = Batcher(self.worker, on_batch=lambda size, _: self.sizes.append(size), answers=answers)

    def ask(self, number, pixels, priority=0):
        return asyncio.create_task(self.batcher.answer(KEYS[number], [pixels], priority))

    async def hold(self):
        self.worker.may_run.clear()
        self.first = self.ask(39, image(99))
        await self.worker.running.wait()

    async def queued(self, rows):
        while self.batcher.queued_rows != rows:
            await asyncio.sleep(0)

    async def let_go(self, *asked):
        self.worker.may_run.set()
        await self.first
        return [[list(row) for row in (await one).logits] for one in asked]


def scenario(test, **settings):
    async def run():
        busy = Busy(**settings)
        try:
            async with asyncio.timeout(10):
                await test(busy)
        finally:
            await busy.batcher.close()

    asyncio.run(run())


def test_rows_about_equal_images_are_one_image_of_a_batch_and_get_their_own_answers():
    async def test(busy):
        await busy.hold()
        same = image(5)
        asked = [
            busy.ask(0, same),
            busy.ask(1, same),
            busy.ask(2, image(5)),
            busy.ask(0, image(5)),
            busy.ask(1, image(6)),
        ]
        await busy.queued(5)
        assert await busy.let_go(*asked) == [[[0, 5]], [[1, 5]], [[2, 5]], [[0, 5]], [[1, 6]]]
        shapes = [(one.images, one.answers, one.padding) for one in busy.sizes[1:]]
        assert shapes == [(1, 3, 0), (1, 1, 0)]  # one image for three tasks; a second one with one task would be padded

    scenario(test)


def test_an_image_that_differs_where_it_is_not_sampled_is_another_one():
    one, other = image(1, size=64), image(1, size=64)
    other[0, 1, 1] = 2
    queues = Queues(4, 100)
    loop = asyncio.new_event_loop()
    for key, pixels in ((KEYS[0], one), (KEYS[0], other), (KEYS[1], other)):
        queues.add(RowsJob(key, [pixels], 0, loop.create_future(), 0.0))
    loop.close()
    assert sorted(len(asked) for _, asked in queues.take() + queues.take()) == [1, 2]
    assert queues.rows == 0


def test_an_engine_whose_tasks_share_nothing_gets_an_image_for_each_row():
    async def test(busy):
        await busy.hold()
        asked = [busy.ask(number, image(5)) for number in range(3)]
        await busy.queued(3)
        assert await busy.let_go(*asked) == [[[0, 5]], [[1, 5]], [[2, 5]]]
        assert (busy.sizes[1].images, busy.sizes[1].answers, busy.sizes[1].padding) == (3, 3, 0)

    scenario(test, answers=0)


@pytest.mark.parametrize("urgent", [False, True])
def test_who_gives_up_does_not_take_the_others_of_its_image_along(urgent):
    async def test(busy):
        await busy.hold()
        gone, stays = busy.ask(0, image(5), 1 if urgent else 0), busy.ask(1, image(5))
        await busy.queued(2)
        gone.cancel()
        await busy.queued(1)
        assert await busy.let_go(stays) == [[[1, 5]]]
        assert busy.worker.batches[1] == [KEYS[1]]
        assert gone.cancelled()

    scenario(test)


def test_who_gives_up_while_its_image_runs_leaves_the_others_their_answers():
    async def test(busy):
        busy.worker.may_run.clear()
        busy.first, stays = busy.ask(0, image(5)), busy.ask(1, image(5))
        await busy.worker.running.wait()
        busy.first.cancel()
        busy.worker.may_run.set()
        assert [list(row) for row in (await stays).logits] == [[1, 5]]
        with pytest.raises(asyncio.CancelledError):
            await busy.first
        assert busy.worker.batches == [KEYS[:2]]

    scenario(test)


def test_an_urgent_row_takes_its_image_along_and_goes_first_itself():
    async def test(busy):
        await busy.hold()
        asked = [busy.ask(number, image(5)) for number in range(4)]
        asked.append(busy.ask(9, image(5), priority=-1))
        await busy.queued(5)
        await busy.let_go(*asked)
        assert busy.worker.batches[1][0] == KEYS[9]
        assert [len(one) for one in busy.worker.batches[1:]] == [3, 2]

    scenario(test, answers=3)


def test_padding_stays_below_its_share_whatever_is_asked_and_every_row_is_answered_once():
    chance = np.random.default_rng(0)
    loop = asyncio.new_event_loop()
    for _ in range(50):
        queues, waiting = Queues(16, 200), 0
        for value in range(int(chance.integers(1, 30))):
            pixels = image(value)
            for number in chance.permutation(40)[: chance.integers(1, 41)]:
                job = RowsJob(KEYS[number], [pixels], int(chance.integers(2)), loop.create_future(), 0.0)
                queues.add(job)
                waiting += 1
        seen = []
        while queues.rows:
            batch = queues.take()
            counts = [len(asked) for _, asked in batch]
            computed = len(batch) * max(counts)
            assert len(batch) <= 16
            assert computed <= 200
            assert computed - sum(counts) <= PADDING * computed
            seen += [(key, pixels[0, 0, 0]) for pixels, asked in batch for key, rows in asked.items() for _ in rows]
        assert len(seen) == len(set(seen)) == waiting
        assert not queues.full
        assert queues.oldest() is None
    loop.close()
