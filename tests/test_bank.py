"""The bank of task states: rows that come and go while calls read others."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from prompttune.errors import EngineError, UsageError
from prompttune.export.layout import HEAD_BIAS, Sizes, bank_dtype, empty_bank
from prompttune.export.runtimes import Runtime
from prompttune.export.tasks import fold_checkpoint
from prompttune.serve.bank import BakedBank, Bank
from prompttune.serve.memory import resident_bytes
from tests.engines import backbone, checkpoint, model_of

WAIT_S = 60


class Recorder(Runtime):
    """A runtime that keeps the host's tensors and counts what it is asked."""

    description = "recorder"

    def __init__(self):
        self.placed = 0
        self.updated = []

    def place(self, rows):
        self.placed += 1
        return rows

    def update(self, placed, rows, row):
        assert placed is rows
        self.updated.append(row)

    def run(self, images, task_index, bank):
        raise NotImplementedError


def folded(method):
    """A layout and two tasks of it, without an engine."""
    tasks = {f"task{number}": fold_checkpoint(checkpoint(method, number), backbone()).task for number in (0, 1)}
    return model_of(method, 0).state_layout(), tasks


def test_bank_writes_a_row_and_not_the_rest():
    layout, tasks = folded("sa2vp")
    runtime = Recorder()
    bank = Bank(runtime, layout, {"a": tasks["task1"]})
    assert runtime.placed == len(layout)
    bank.put("b", tasks["task0"])  # grows
    assert runtime.placed == 2 * len(layout)
    runtime.updated.clear()
    bank.put("c", tasks["task0"])  # one of the rows that growing left free
    assert runtime.placed == 2 * len(layout)
    assert set(runtime.updated) == {bank.entries["c"].row}
    with bank.lease(bank.entries) as snapshot:
        for name in "bc":
            row = snapshot.entries[name].row
            assert np.isneginf(snapshot.placed["head.bias"][row, 2:]).all()
            assert (snapshot.placed["adapters.down"][row, :, :, 2:] == 0).all()
        for key, value in tasks["task1"].state.items():
            assert np.array_equal(snapshot.placed[key][snapshot.entries["a"].row], value[0])


def test_bank_keeps_a_row_while_a_call_may_read_it():
    layout, tasks = folded("linear")
    bank = Bank(Recorder(), layout, {"a": tasks["task1"]})
    bank.put("b", tasks["task0"])
    with bank.lease(bank.entries) as snapshot:
        row = snapshot.entries["b"].row
        held = snapshot.placed["head.weight"][row].copy()
        for _ in range(20):
            bank.put("b", tasks["task1"], replace=True)
        assert np.array_equal(snapshot.placed["head.weight"][row], held)
    for _ in range(20):
        bank.put("b", tasks["task1"], replace=True)
    assert len(bank._rows["head.weight"]) <= 64  # rows are used again
    rows = len(bank._rows["head.weight"])
    for _ in range(200):
        bank.put("b", tasks["task1"], replace=True)
    assert len(bank._rows["head.weight"]) == rows


class Gate(Recorder):
    """A recorder whose writes wait to be let through."""

    def __init__(self):
        super().__init__()
        self.closed = False
        self.reached, self.passing = threading.Event(), threading.Event()

    def _pass(self):
        if self.closed:
            self.reached.set()
            assert self.passing.wait(WAIT_S)

    def place(self, rows):
        self._pass()
        return super().place(rows)

    def update(self, placed, rows, row):
        self._pass()
        super().update(placed, rows, row)


@pytest.mark.parametrize(("capacity", "placed"), [(None, 2), (4, 1)], ids=["growth", "row"])
def test_calls_do_not_wait_for_whoever_writes(capacity, placed):
    layout, tasks = folded("linear")
    runtime = Gate()
    bank = Bank(runtime, layout, {"a": tasks["task1"]}, capacity=capacity)
    runtime.closed = True
    with ThreadPoolExecutor(2) as pool:
        try:
            put = pool.submit(bank.put, "b", tasks["task0"])
            assert runtime.reached.wait(WAIT_S)

            def read():
                with bank.lease(bank.entries) as whole, bank.lease(["a"]) as named:
                    assert whole is named
                    return set(whole.entries)

            assert pool.submit(read).result(WAIT_S) == {"a"}
            assert not put.done()
        finally:
            runtime.passing.set()
        put.result(WAIT_S)
    assert runtime.placed == placed * len(layout)
    assert set(bank.entries) == {"a", "b"}


def test_tasks_in_the_model_can_neither_be_added_nor_removed():
    _, tasks = folded("linear")
    bank = BakedBank({})
    with pytest.raises(UsageError, match="'a' cannot be added: the tasks of this engine are baked into its model"):
        bank.put("a", tasks["task0"], replace=True)
    with pytest.raises(UsageError, match="'a' cannot be removed: the tasks of this engine are baked into its model"):
        bank.remove("a")


def test_a_bank_of_fixed_size_fills_up_and_keeps_its_memory():
    layout, tasks = folded("sa2vp")
    runtime = Recorder()
    bank = Bank(runtime, layout, {}, capacity=2, axes={"rank": 3, "classes": 3})
    size = bank.nbytes
    assert size == 2 * sum(value.nbytes for value in tasks["task1"].state.values())
    for turn in range(5):
        for name in "ab":
            bank.put(name, tasks[f"task{turn % 2}"])
        with pytest.raises(EngineError, match="no row is free: all 2 hold tasks"):
            bank.put("c", tasks["task0"])
        for name in "ab":
            bank.remove(name)
    assert runtime.placed == len(layout)
    assert bank.nbytes == size


def test_a_task_that_is_larger_than_the_bank_makes_it_grow():
    layout, tasks = folded("sa2vp")
    bank = Bank(Recorder(), layout, {}, capacity=2, axes={"rank": 2, "classes": 2})
    bank.put("a", tasks["task0"])
    with bank.lease(bank.entries) as before:
        bank.put("b", tasks["task1"])
        assert before.placed[HEAD_BIAS].shape == (2, 2)
    with bank.lease(bank.entries) as after:
        assert after.placed[HEAD_BIAS].shape == (2, 3)
        for name, task in (("a", "task0"), ("b", "task1")):
            for key, value in tasks[task].state.items():
                assert np.array_equal(after.entries[name].task.state[key], value)
        assert np.isneginf(after.placed[HEAD_BIAS][after.entries["a"].row, 2:]).all()


def test_a_lease_of_some_rows_holds_those_alone():
    layout, tasks = folded("linear")
    bank = Bank(Recorder(), layout, {"a": tasks["task0"], "b": tasks["task1"]}, capacity=2)
    with ThreadPoolExecutor(1) as pool:
        with bank.lease(["a", "a"]) as snapshot:
            held = snapshot.placed[HEAD_BIAS][snapshot.entries["a"].row].copy()
            bank.remove("b")
            bank.put("c", tasks["task1"])  # into the row of b, which this lease does not read
            bank.remove("a")
            waiting = pool.submit(bank.put, "d", tasks["task1"])
            with pytest.raises(TimeoutError):
                waiting.result(0.05)
            assert np.array_equal(snapshot.placed[HEAD_BIAS][snapshot.entries["a"].row], held)
        waiting.result(WAIT_S)
    assert set(bank.entries) == {"c", "d"}


def test_a_row_that_could_not_be_written_is_free_again():
    class Failing(Recorder):
        fails = True

        def update(self, placed, rows, row):
            if self.fails:
                raise EngineError("the device is full")

    layout, tasks = folded("linear")
    runtime = Failing()
    bank = Bank(runtime, layout, {}, capacity=1, axes={"classes": 3})
    with pytest.raises(EngineError, match="the device is full"):
        bank.put("a", tasks["task0"])
    assert not bank.entries
    runtime.fails = False
    bank.put("a", tasks["task1"], version="known")
    assert bank.entries["a"].version == "known"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_rows_that_nobody_wrote_take_no_memory(precision):
    layout = {"prompts": (1024, 256), HEAD_BIAS: ("classes",)}
    before = resident_bytes()
    bank = empty_bank(layout, 1024, {"classes": 3}, bank_dtype(precision))
    assert bank["prompts"].nbytes >= 2**29
    assert resident_bytes() - before < 2**26
    assert not bank["prompts"][::512].any()
    assert np.isneginf(bank[HEAD_BIAS].astype(np.float32)).all()


class Bounded(Recorder):
    """A recorder of a plan: it refuses tensors outside the ranges, as TensorRT does."""

    def __init__(self, tasks, classes=(1, 3, 256)):
        super().__init__()
        self.sizes = Sizes({"tasks": tasks, "classes": classes})

    def place(self, rows):
        low, _, high = self.sizes.ranges["tasks"]
        assert low <= len(rows) <= high
        if rows.ndim == 2:  # the head's bias
            low, _, high = self.sizes.ranges["classes"]
            assert low <= rows.shape[1] <= high
        return super().place(rows)


def test_a_bank_grows_to_the_most_that_the_engine_takes_and_not_beyond():
    layout, tasks = folded("linear")
    bank = Bank(Bounded((1, 32, 64)), layout, {f"t{number}": tasks[f"task{number % 2}"] for number in range(32)})
    for number in range(32, 64):
        bank.put(f"t{number}", tasks[f"task{number % 2}"])
    with pytest.raises(EngineError, match=r"axis tasks would be 65, .* for 64 at most; .* --axis tasks=1:32:65$"):
        bank.put("t64", tasks["task0"])
    assert len(bank.entries) == 64
    bank.put("t7", tasks["task0"], replace=True)  # no row is to spare for the new one
    with bank.lease(bank.entries) as snapshot:
        assert len({entry.row for entry in snapshot.entries.values()}) == 64
        for name, entry in snapshot.entries.items():
            expected = tasks["task0" if name == "t7" else f"task{int(name[1:]) % 2}"].state[HEAD_BIAS][0]
            assert np.array_equal(snapshot.placed[HEAD_BIAS][entry.row, : len(expected)], expected)


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [1, 2, 7, 8, 100])
def test_resident_tasks_leave_in_time_for_the_most_that_the_engine_takes(most, limit):
    layout, tasks = folded("linear")
    runtime = Bounded((1, 1, most))
    bank = Bank(runtime, layout, {}, limit=limit)
    for number in range(12):
        with bank.lease([f"t{number}"], lambda _: (tasks["task0"], "v")) as snapshot:
            assert f"t{number}" in snapshot.entries
        bank.put(f"t{number}", tasks["task1"], replace=True)
    assert len(bank.entries) == min(most, limit) == bank.limit
    assert f"t{12 - bank.limit}" in bank.entries


def test_a_bank_is_never_smaller_than_the_engine_takes():
    layout, tasks = folded("linear")
    for capacity, limit in ((1, None), (None, 1), (None, None)):
        bank = Bank(Bounded((4, 4, 8), (5, 5, 8)), layout, {}, capacity=capacity, axes={"classes": 1}, limit=limit)
        bank.put("a", tasks["task1"])
        with bank.lease(bank.entries) as snapshot:
            assert snapshot.placed[HEAD_BIAS].shape == (4, 5)
            assert np.isneginf(snapshot.placed[HEAD_BIAS][snapshot.entries["a"].row, 3:]).all()


def test_a_task_that_is_larger_than_the_engine_takes_is_refused():
    layout, tasks = folded("linear")
    bank = Bank(Bounded((1, 1, 2), (1, 2, 2)), layout, {"a": tasks["task0"]})
    with pytest.raises(EngineError, match=r"^task 'b': the axis classes would be 3, the engine was built for 2 at m"):
        bank.put("b", tasks["task1"])
    assert list(bank.entries) == ["a"]
