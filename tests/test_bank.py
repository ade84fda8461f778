"""The bank of task states: rows that come and go while calls read others."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from prompttune.errors import EngineError, UsageError
from prompttune.export.banks import BankForm
from prompttune.export.folder import EngineTask
from prompttune.export.layout import CHOSEN, CLASS_INDEX, CLASS_ROWS, TASK_INDEX, Sizes, bank_dtype
from prompttune.export.runtimes import Runtime
from prompttune.export.tasks import fold_checkpoint
from prompttune.serve.bank import BakedBank, Bank, BankFullError, _Spans
from prompttune.serve.memory import resident_bytes
from tests.engines import backbone, checkpoint, model_of

WAIT_S = 60
HEAD_BIAS = "head.bias"


class Recorder(Runtime):
    """A runtime that keeps the host's tensors and counts what it is asked."""

    description = "recorder"

    def __init__(self):
        self.placed = 0
        self.updated = []

    def place(self, rows):
        self.placed += 1
        return rows

    def update(self, placed, rows, changed):
        assert placed is rows
        self.updated.append(changed)

    def run(self, inputs, bank):
        raise NotImplementedError


def folded(method):
    """The form of a bank and two tasks of two and three classes, without an engine."""
    tasks = {f"task{number}": fold_checkpoint(checkpoint(method, number), backbone()).task for number in (0, 1)}
    return BankForm(model_of(method, 0).state_layout()), tasks


def assert_holds(form, snapshot, name, task):
    """The placed tensors have the state of a task in its place, and padding as the first class."""
    place = snapshot.entries[name].place
    for key, value in task.state.items():
        held = snapshot.placed[key][form.slice_of(key, place)]
        held = held[None] if form.lies_by_class(key) else held
        assert np.array_equal(held[tuple(slice(size) for size in value.shape)], value), key
    assert np.isneginf(snapshot.placed[HEAD_BIAS][0])
    assert not snapshot.placed["head.weight"][0].any()


def test_bank_writes_a_row_and_not_the_rest():
    form, tasks = folded("sa2vp")
    runtime = Recorder()
    bank = Bank(runtime, form, {"a": tasks["task1"]})
    assert runtime.placed == len(form.layout)
    bank.put("b", tasks["task0"])  # grows
    assert runtime.placed == 2 * len(form.layout)
    runtime.updated.clear()
    bank.put("c", tasks["task0"])  # one of the rows that growing left free
    assert runtime.placed == 2 * len(form.layout)
    place = bank.entries["c"].place
    assert runtime.updated == [form.slice_of(key, place) for key in form.layout]
    assert {one.stop - one.start for one in runtime.updated} == {1, 2}  # its row, and its two classes
    with bank.lease(bank.entries) as snapshot:
        for name in "bc":
            assert (snapshot.placed["adapters.down"][snapshot.entries[name].place.row, :, :, 2:] == 0).all()
        for name, task in (("a", "task1"), ("b", "task0"), ("c", "task0")):
            assert_holds(form, snapshot, name, tasks[task])


def test_bank_keeps_a_row_while_a_call_may_read_it():
    form, tasks = folded("linear")
    bank = Bank(Recorder(), form, {"a": tasks["task1"]})
    bank.put("b", tasks["task0"])
    with bank.lease(bank.entries) as snapshot:
        for _ in range(20):
            bank.put("b", tasks["task1"], replace=True)
        assert_holds(form, snapshot, "b", tasks["task0"])
    for _ in range(20):
        bank.put("b", tasks["task1"], replace=True)
    rows, classes = bank._rooms, len(bank._rows["head.weight"])
    assert rows <= 64  # rows are used again
    assert classes <= 64
    for _ in range(200):
        bank.put("b", tasks["task1"], replace=True)
    assert (bank._rooms, len(bank._rows["head.weight"])) == (rows, classes)


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

    def update(self, placed, rows, changed):
        self._pass()
        super().update(placed, rows, changed)


@pytest.mark.parametrize(("capacity", "placed"), [(None, 2), (4, 1)], ids=["growth", "row"])
def test_calls_do_not_wait_for_whoever_writes(capacity, placed):
    form, tasks = folded("linear")
    runtime = Gate()
    bank = Bank(runtime, form, {"a": tasks["task1"]}, capacity=capacity)
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
    assert runtime.placed == placed * len(form.layout)
    assert set(bank.entries) == {"a", "b"}


def test_tasks_in_the_model_can_neither_be_added_nor_removed():
    _, tasks = folded("linear")
    bank = BakedBank({})
    with pytest.raises(UsageError, match="'a' cannot be added: the tasks of this engine are baked into its model"):
        bank.put("a", tasks["task0"], replace=True)
    with pytest.raises(UsageError, match="'a' cannot be removed: the tasks of this engine are baked into its model"):
        bank.remove("a")


def test_a_bank_of_fixed_size_fills_up_and_keeps_its_memory():
    form, tasks = folded("sa2vp")
    runtime = Recorder()
    bank = Bank(runtime, form, {}, capacity=2, axes={"rank": 3, "classes": 3})
    bank.put("a", tasks["task1"])
    bank.put("b", tasks["task1"])
    bank.remove("a")
    bank.remove("b")
    size, placed = bank.nbytes, runtime.placed
    state = tasks["task1"].state
    one = sum(value.nbytes for key, value in state.items() if form.lies_by_class(key)) // 3  # of three classes
    rest = sum(value.nbytes for key, value in state.items() if not form.lies_by_class(key))
    assert 2 * rest + 7 * one <= size <= 2 * rest + 13 * one
    for turn in range(5):
        for name in "ab":
            bank.put(name, tasks[f"task{turn % 2}"])
        with pytest.raises(EngineError, match="no row is free: all 2 hold tasks"):
            bank.put("c", tasks["task0"])
        for name in "ab":
            bank.remove(name)
    assert runtime.placed == placed
    assert bank.nbytes == size


def test_a_task_that_is_larger_than_the_bank_makes_it_grow():
    form, tasks = folded("sa2vp")
    bank = Bank(Recorder(), form, {}, capacity=2, axes={"rank": 2, "classes": 2})
    bank.put("a", tasks["task0"])
    with bank.lease(bank.entries) as before:
        bank.put("b", tasks["task1"])
        assert before.placed["adapters.down"].shape[-1] == 2
        assert_holds(form, before, "a", tasks["task0"])
    with bank.lease(bank.entries) as after:
        assert after.placed["adapters.down"].shape[-1] == 3
        for name, task in (("a", "task0"), ("b", "task1")):
            for key, value in tasks[task].state.items():
                assert np.array_equal(after.entries[name].task.state[key], value)
            assert_holds(form, after, name, tasks[task])


def test_a_lease_of_some_rows_holds_those_alone():
    form, tasks = folded("linear")
    bank = Bank(Recorder(), form, {"a": tasks["task0"], "b": tasks["task1"]}, capacity=2)
    with ThreadPoolExecutor(1) as pool:
        with bank.lease(["a", "a"]) as snapshot:
            bank.remove("b")
            bank.put("c", tasks["task1"])  # into the row of b, which this lease does not read
            bank.remove("a")
            waiting = pool.submit(bank.put, "d", tasks["task1"])
            with pytest.raises(TimeoutError):
                waiting.result(0.05)
            assert_holds(form, snapshot, "a", tasks["task0"])
        waiting.result(WAIT_S)
    assert set(bank.entries) == {"c", "d"}


def test_a_row_that_could_not_be_written_is_free_again():
    class Failing(Recorder):
        fails = True

        def update(self, placed, rows, changed):
            if self.fails:
                raise EngineError("the device is full")

    form, tasks = folded("linear")
    runtime = Failing()
    bank = Bank(runtime, form, {}, capacity=1, axes={"classes": 3})
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
    bank = BankForm(layout).empty({"tasks": 1024, "classes": 3}, bank_dtype(precision))
    assert bank["prompts"].nbytes >= 2**29
    assert resident_bytes() - before < 2**26
    assert not bank["prompts"][::512].any()
    assert np.isneginf(bank[HEAD_BIAS].astype(np.float32)).all()


class Bounded(Recorder):
    """A recorder of a plan: it refuses tensors outside the ranges, as TensorRT does."""

    def __init__(self, tasks, classes=(1, 3, 256), width=(1, 1, 256)):
        super().__init__()
        self.sizes = Sizes({"tasks": tasks, "classes": classes, "chosen": classes, "width": width})

    def place(self, rows):
        low, _, high = self.sizes.ranges["classes"]  # tasks are of linear, which has a head alone
        assert low <= len(rows) <= high
        return super().place(rows)


def head(classes, seed=0):
    """A task of the method linear."""
    drawn = np.random.default_rng(seed)
    width = model_of("linear", 0).backbone.width
    state = {
        "head.weight": drawn.standard_normal((1, classes, width), np.float32),
        HEAD_BIAS: drawn.standard_normal((1, classes), np.float32),
    }
    like = fold_checkpoint(checkpoint("linear", 0), backbone()).task
    return EngineTask(tuple(map(str, range(classes))), like.preprocess, state)


def test_a_bank_grows_to_the_most_that_the_engine_takes_and_not_beyond():
    form, tasks = folded("linear")
    bank = Bank(Bounded((1, 32, 64)), form, {f"t{number}": tasks[f"task{number % 2}"] for number in range(32)})
    for number in range(32, 64):
        bank.put(f"t{number}", tasks[f"task{number % 2}"])
    with pytest.raises(EngineError, match=r"axis tasks would be 65, .* for 64 at most; .* --axis tasks=1:32:65$"):
        bank.put("t64", tasks["task0"])
    assert len(bank.entries) == 64
    bank.put("t7", tasks["task0"], replace=True)  # no row is to spare for the new one
    with bank.lease(bank.entries) as snapshot:
        assert len({entry.place.row for entry in snapshot.entries.values()}) == 64
        for name in snapshot.entries:
            assert_holds(form, snapshot, name, tasks["task0" if name == "t7" else f"task{int(name[1:]) % 2}"])


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [1, 2, 7, 8, 100])
def test_resident_tasks_leave_in_time_for_the_most_that_the_engine_takes(most, limit):
    form, tasks = folded("linear")
    runtime = Bounded((1, 1, most))
    bank = Bank(runtime, form, {}, limit=limit)
    for number in range(12):
        with bank.lease([f"t{number}"], lambda _: (tasks["task0"], "v")) as snapshot:
            assert f"t{number}" in snapshot.entries
        bank.put(f"t{number}", tasks["task1"], replace=True)
    assert len(bank.entries) == min(most, limit) == bank.limit
    assert f"t{12 - bank.limit}" in bank.entries


def test_a_bank_is_never_smaller_than_the_engine_takes():
    form, tasks = folded("linear")
    for capacity, limit in ((1, None), (None, 1), (None, None)):
        bank = Bank(Bounded((4, 4, 8), (9, 9, 16)), form, {}, capacity=capacity, axes={"classes": 1}, limit=limit)
        bank.put("a", tasks["task1"])
        assert bank._rooms >= 4
        with bank.lease(bank.entries) as snapshot:
            assert len(snapshot.placed[HEAD_BIAS]) == 9
            place = snapshot.entries["a"].place
            rest = np.delete(snapshot.placed[HEAD_BIAS], np.s_[place.first : place.first + 3])
            assert np.isneginf(rest).all()


def test_a_task_that_is_larger_than_the_engine_takes_is_refused():
    form, tasks = folded("linear")
    for ranges, refused in (
        (((1, 1, 2), (1, 3, 3)), "classes would be 4, the engine was built for 3"),
        (((1, 1, 2), (1, 3, 64), (1, 2, 2)), "width would be 3, the engine was built for 2"),
    ):
        bank = Bank(Bounded(*ranges), form, {"a": tasks["task0"]})
        with pytest.raises(EngineError, match=f"^task 'b': the axis {refused} at m"):
            bank.put("b", tasks["task1"])
        assert list(bank.entries) == ["a"]


def test_the_least_recent_tasks_leave_until_the_classes_of_another_fit():
    form, _ = folded("linear")
    tasks = {f"t{number}": head(10, number) for number in range(5)} | {"wide": head(25, 9)}
    bank = Bank(Bounded((1, 1, 64), (1, 1, 51)), form, {name: tasks[name] for name in list(tasks)[:5]}, limit=60)
    assert len(bank.entries) == 5  # five times ten classes, and padding
    with bank.lease(["t0"], None):
        pass
    with bank.lease(["wide"], lambda name: (tasks[name], "v")) as snapshot:
        assert set(snapshot.entries) == {"t0", "t4", "wide"}
        for name in snapshot.entries:
            assert_holds(form, snapshot, name, tasks[name])
    bank.put("t4", tasks["wide"], replace=True)  # wider than before: room is made, and not by the new one
    assert set(bank.entries) == {"t4", "wide"}
    with bank.lease(bank.entries) as snapshot:
        for name in snapshot.entries:
            assert_holds(form, snapshot, name, tasks["wide"])


def test_an_engine_opens_with_more_classes_than_it_takes_at_once():
    form, _ = folded("linear")
    tasks = {f"t{number}": head(10, number) for number in range(5)}
    bank = Bank(Bounded((1, 1, 64), (1, 1, 31)), form, tasks, limit=60)
    assert set(bank.entries) == {"t2", "t3", "t4"}


def test_a_lease_has_the_tasks_that_fit_and_the_next_one_has_others():
    form, _ = folded("linear")
    tasks = {f"t{number}": head(10, number) for number in range(7)}
    bank = Bank(Bounded((1, 1, 64), (1, 1, 31)), form, {}, limit=60)
    waiting, sizes, read = list(tasks), [], []
    while waiting:
        with bank.lease(waiting, lambda name: read.append(name) or (tasks[name], "v")) as snapshot:
            held = [name for name in waiting if name in snapshot.entries]
            for name in held:
                assert_holds(form, snapshot, name, tasks[name])
        sizes.append(len(held))
        waiting = [name for name in waiting if name not in held]
    assert sizes == [3, 3, 1]


def test_a_bank_of_fixed_size_says_that_its_classes_are_full():
    form, _ = folded("linear")
    bank = Bank(Bounded((1, 1, 64), (1, 1, 31)), form, {}, capacity=8, axes={"classes": 10})
    for number in range(3):
        bank.put(f"t{number}", head(10, number))
    with pytest.raises(BankFullError, match=r"^the bank: the axis classes would be 41, the engine was built for 31 at"):
        bank.put("t3", head(10))
    with pytest.raises(BankFullError, match="the axis classes would be 41"):
        bank.put("t1", head(20), replace=True)
    assert set(bank.entries) == {"t0", "t1", "t2"}
    bank.put("t1", head(5), replace=True)
    bank.remove("t0")
    bank.put("t3", head(15, 3))  # the free classes do not lie together
    with bank.lease(bank.entries) as snapshot:
        assert {name: entry.place.classes for name, entry in snapshot.entries.items()} == {"t1": 5, "t2": 10, "t3": 15}
        assert_holds(form, snapshot, "t2", head(10, 2))
        assert_holds(form, snapshot, "t3", head(15, 3))


def test_classes_of_replaced_tasks_are_used_again():
    form, _ = folded("linear")
    bank = Bank(Recorder(), form, {"a": head(10), "b": head(20)})
    before = len(bank._rows[HEAD_BIAS])
    for turn in range(100):
        bank.put("ab"[turn % 2], head(10 + turn % 3, turn), replace=True)
        bank.put("c", head(30, turn))
        bank.remove("c")
    assert len(bank._rows[HEAD_BIAS]) <= 2 * before
    with bank.lease(bank.entries) as snapshot:
        assert_holds(form, snapshot, "a", head(10 + 98 % 3, 98))
        assert_holds(form, snapshot, "b", head(10 + 99 % 3, 99))


def test_spans_are_given_to_the_first_that_fits_and_join_when_they_come_back():
    spans = _Spans(1, 11)
    assert [spans.take(count) for count in (3, 2, 4)] == [1, 4, 6]
    assert spans.take(2) is None
    assert spans.take(1) == 10
    assert spans.take(1) is None
    spans.give(1, 3)
    spans.give(6, 4)
    assert spans.take(5) is None  # nine are free, but not together
    spans.give(4, 2)  # joins both neighbours
    assert spans.take(9) == 1
    spans.give(1, 9)
    spans.give(10, 1)
    assert spans.take(10) == 1
    assert _Spans(1, 1).take(1) is None


def test_spans_never_overlap_and_nothing_is_lost():
    drawn, spans, held = np.random.default_rng(0), _Spans(1, 101), {}
    for _ in range(2000):
        if held and drawn.random() < 0.5:
            start = list(held)[drawn.integers(len(held))]
            spans.give(start, held.pop(start))
        elif (start := spans.take(count := int(drawn.integers(1, 12)))) is not None:
            taken = {one for first, size in held.items() for one in range(first, first + size)}
            assert not taken & set(range(start, start + count))
            assert 1 <= start <= 101 - count
            held[start] = count
    for start, count in held.items():
        spans.give(start, count)
    assert spans.take(100) == 1


def test_a_call_names_each_class_row_once_and_where_it_lies():
    form, _ = folded("linear")
    bank = Bank(Recorder(), form, {"a": head(3), "b": head(2), "c": head(7)})
    with bank.lease(bank.entries) as snapshot:
        index = snapshot.index([["a", "c"], ["c", "c"]], Sizes())
        rows = index[CLASS_ROWS][index[CLASS_INDEX]]  # [B, K, C]
        assert (len(index[CLASS_ROWS]), rows.shape) == (256, (2, 2, 16))
        assert index[CLASS_ROWS][0] == 0
        assert np.count_nonzero(index[CLASS_ROWS]) == 10
        for row, names in zip(range(2), (["a", "c"], ["c", "c"]), strict=True):
            for number, name in enumerate(names):
                place = snapshot.entries[name].place
                assert index[TASK_INDEX][row, number] == place.row
                own = list(range(place.first, place.first + place.classes))
                assert rows[row, number].tolist() == own + [0] * (16 - len(own))
        with pytest.raises(EngineError, match=r"^a call: the axis chosen would be 11, the engine was built for 10 at"):
            snapshot.index([["a", "c"]], Sizes({CHOSEN: (1, 1, 10)}))
        index = snapshot.index([["a", "c"]], Sizes({CHOSEN: (1, 1, 11), "width": (1, 1, 7)}))
        assert (len(index[CLASS_ROWS]), index[CLASS_INDEX].shape) == (11, (1, 2, 7))
