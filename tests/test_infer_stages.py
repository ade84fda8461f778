"""The parts of a job: stages, plans, smoothing, latency."""

from __future__ import annotations

import threading
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.latency import LiveLatency
from prompttune.serve.infer.plan import ChunkPlan
from prompttune.serve.infer.prefetch import Prefetch
from prompttune.serve.infer.rows import InputAnswer, json_text
from prompttune.serve.infer.settings import Shard
from prompttune.serve.infer.smoothing import Smoother
from prompttune.serve.infer.sources.base import Bounded
from prompttune.serve.infer.sources.waiting import Unbounded

# ----------------------------------------------------------------- stages


def test_a_stage_is_no_further_ahead_than_it_may():
    made, blocked = [], threading.Event()

    def numbers():
        for number in range(100):
            made.append(number)
            if number == 3:
                blocked.set()
            yield number

    stage = Prefetch(numbers(), 2, "test")
    assert next(stage) == 0
    assert blocked.wait(60)  # 1 and 2 wait, 3 is made and finds no place
    assert not stage._results.closed
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    assert list(stage) == list(range(1, 100))


def test_an_error_comes_after_the_results_before_it():
    def failing():
        yield 1
        yield 2
        raise DataError("no more")

    stage = Prefetch(failing(), 1, "test")
    assert [next(stage), next(stage)] == [1, 2]
    with pytest.raises(DataError, match="no more"):
        next(stage)
    with pytest.raises(StopIteration):
        next(stage)


def test_closing_ends_every_thread_behind():
    closed, given_up = threading.Event(), threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    first = Prefetch(endless(), 1, "first")

    def doubled():
        try:
            for number in first:
                yield 2 * number
        finally:
            given_up.set()

    last = Prefetch(doubled(), 1, "last", first)
    assert next(last) == 0
    last.close()
    assert closed.wait(60)
    assert given_up.wait(60)
    with pytest.raises(StopIteration):
        next(last)


def test_waiting_for_a_result_gives_up():
    go = threading.Event()

    def held():
        go.wait()
        yield 1

    stage = Prefetch(held(), 1, "test")
    assert not stage.wait(0.01)
    go.set()
    assert stage.wait(60)
    assert next(stage) == 1


# ------------------------------------------------------------------ plans


class Numbers(Bounded):
    """Inputs 0 to ``count`` - 1."""

    def __init__(self, count):
        super().__init__()
        self._count = count

    @property
    def total(self):
        return self._count

    def _items(self):
        return (Item(str(number)) for number in range(self._count))


def planned(count, size, **settings):
    plan = ChunkPlan(Numbers(count), size, **settings)
    return plan, [[int(item.source) for item in chunk] for chunk in plan.chunks()]


@given(count=st.integers(0, 60), size=st.integers(1, 9), parts=st.integers(1, 5), limit=st.none() | st.integers(1, 70))
def test_shards_share_out_every_chunk(count, size, parts, limit):
    whole = planned(count, size, limit=limit)[1]
    assert [number for chunk in whole for number in chunk] == list(range(min(count, limit or count)))
    found = []
    for index in range(parts):
        plan, chunks = planned(count, size, shard=Shard(index, parts), limit=limit)
        assert plan.total == sum(map(len, chunks))
        assert all(chunk in whole for chunk in chunks)
        found += chunks
    assert sorted(found) == whole


@given(count=st.integers(0, 40), size=st.integers(1, 7), parts=st.integers(1, 3), data=st.data())
def test_a_plan_goes_on_where_another_ended(count, size, parts, data):
    shard = Shard(data.draw(st.integers(0, parts - 1)), parts)
    _, chunks = planned(count, size, shard=shard)
    done = data.draw(st.integers(0, len(chunks)))
    answered = sum(map(len, chunks[:done]))
    rest = ChunkPlan(Numbers(count), size, shard=shard, answered=answered)
    passed = [int(item.source) for item in islice(rest.items, answered)]
    assert passed == [number for chunk in chunks[:done] for number in chunk]
    assert rest.more() == (done < len(chunks))
    assert [[int(item.source) for item in chunk] for chunk in rest.chunks()] == chunks[done:]


def test_inputs_that_came_since_fill_up_the_last_chunk():
    for shard in (Shard(), Shard(1, 2)):
        before, _ = planned(10, 4, shard=shard)
        inputs = [number for chunk in planned(10, 4, shard=shard)[1] for number in chunk]
        plan = ChunkPlan(Numbers(19), 4, shard=shard, answered=len(inputs))
        assert [int(item.source) for item in islice(plan.items, len(inputs))] == inputs
        assert before.total == len(inputs)
        answered = inputs + [int(item.source) for chunk in plan.chunks() for item in chunk]
        assert answered == [number for chunk in planned(19, 4, shard=shard)[1] for number in chunk]


class Arriving(Unbounded):
    """Inputs that are put by a test."""

    def __init__(self):
        super().__init__(buffer=100, drop="none")
        self.end = threading.Event()

    def put(self, *names):
        for name in names:
            self._waiting.put(Item(name))

    def _read(self):
        self.end.wait()


def test_what_waits_is_a_chunk():
    source = Arriving()
    source.put("a", "b", "c")
    plan = ChunkPlan(source, 2, answered=10)
    chunks = plan.chunks()
    assert [item.source for item in next(chunks)] == ["a", "b"]
    assert [item.source for item in next(chunks)] == ["c"]
    source.put("d")
    assert [item.source for item in next(chunks)] == ["d"]
    plan.stop()
    assert next(chunks, None) is None


@pytest.mark.parametrize("text", ["2/2", "a/b", "1", "-1/2", "1/0"])
def test_wrong_shards(text):
    with pytest.raises(UsageError, match=r"shard"):
        Shard.parse(text)
    assert str(Shard.parse("1/2")) == "1/2"


# -------------------------------------------------------------- smoothing


def frame(source, timestamp, *probabilities, task="t"):
    return Item(source, timestamp=timestamp), task, np.array(probabilities)


def smoothed(smoother, *frames):
    return [smoother(*one) for one in frames]


def test_the_past_weighs_half_after_its_half_life():
    first, second, third = smoothed(
        Smoother(2.0), frame("v", 0.0, 1.0, 0.0), frame("v", 2.0, 0.0, 1.0), frame("v", 3.0, 0.0, 1.0)
    )
    assert first.tolist() == [1.0, 0.0]
    assert second.tolist() == [0.5, 0.5]
    assert third == pytest.approx([0.5 * 0.5**0.5, 1 - 0.5 * 0.5**0.5])


def test_sources_and_tasks_are_apart():
    smoother = Smoother(1.0)
    smoother(*frame("v", 0.0, 1.0, 0.0))
    assert smoothed(smoother, frame("v", 1.0, 0.0, 1.0, task="u"))[0].tolist() == [0.0, 1.0]
    assert smoothed(smoother, frame("v", 1.0, 0.0, 1.0))[0].tolist() == [0.5, 0.5]
    assert smoothed(smoother, frame("v", None, 0.1, 0.9))[0].tolist() == [0.1, 0.9]
    assert smoothed(smoother, frame("w", 1.0, 0.0, 1.0))[0].tolist() == [0.0, 1.0]
    assert list(smoother.state()["averages"]) == ["t"]  # however many videos there were


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.5)), min_size=2, max_size=12), st.integers(1, 11))
def test_smoothing_goes_on_from_its_state_to_the_last_bit(frames, cut):
    import json

    times = np.cumsum([step for _, step in frames])
    inputs = [frame("v", float(at), share, 1 - share) for at, (share, _) in zip(times, frames, strict=True)]
    whole = smoothed(Smoother(0.7), *inputs)
    begun = Smoother(0.7)
    parts = smoothed(begun, *inputs[:cut])
    parts += smoothed(Smoother(0.7, json.loads(json_text(begun.state()))), *inputs[cut:])
    assert [one.tobytes() for one in parts] == [one.tobytes() for one in whole]


def test_a_half_life_is_positive():
    with pytest.raises(UsageError, match="half-life"):
        Smoother(0.0)


def test_latency_is_from_arrival_to_written():
    latency = LiveLatency()
    assert latency.figures() is None
    latency.written([InputAnswer((), arrived=time.monotonic() - 2.0), InputAnswer(())])
    figures = latency.figures()
    assert set(figures) == {"p50_ms", "p99_ms", "max_ms"}
    assert figures["p50_ms"] >= 2000
