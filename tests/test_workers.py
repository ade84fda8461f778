"""Engine workers, in this process and in one of their own: answers, rows that come and go, deaths."""

import asyncio
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

import prompttune as pt
from prompttune.errors import EngineError, MissingExtraError, PrompttuneError, UsageError
from prompttune.export import EngineFolder
from prompttune.export.folder import load_version
from prompttune.export.formats import ExportSettings
from prompttune.export.runtimes import Runtime, RuntimeOptions
from prompttune.serve.bank import BankFullError
from prompttune.serve.workers import Key, VersionGoneError, Worker, WorkerDiedError, WorkerSettings, main
from prompttune.serve.workers import worker as worker_module
from prompttune.serve.workers.main import portable
from prompttune.serve.workers.store import HostCache, Store
from tests.conftest import THREADS
from tests.engines import SIZE, checkpoint, copied, noise
from tests.serving import pause

WAIT_S = 60
MAX_BATCH = 6
KINDS = pytest.mark.parametrize("process", [False, True], ids=["in-process", "process"])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine of ``task0`` and ``task1``, and of ``task4`` with more classes and a larger rank."""
    opened = pt.Engine(copied("sa2vp", tmp_path_factory.mktemp("workers")), threads=THREADS)
    opened.add_task("task4", checkpoint("sa2vp", 4), parity=False)
    return opened


@pytest.fixture(scope="module")
def settings(engine):
    """Three rows, allocated for the two smaller tasks."""
    return WorkerSettings(
        engine=engine.folder.path,
        runtime=RuntimeOptions(threads=THREADS),
        rows=3,
        axes={"rank": 3, "classes": 3},
        max_batch=MAX_BATCH,
        host_bytes=2**24,
    )


class Driver:
    """A worker, and the event loop that it is called on."""

    def __init__(self, runner, worker, engine):
        self._runner = runner
        self.worker = worker
        self.folders = {Key(name, engine.version(name)): engine.folder.path / "tasks" / name for name in engine.tasks}
        self.keys = {key.task: key for key in self.folders}

    def do(self, call):
        return self._runner.run(asyncio.wait_for(call, WAIT_S))

    def load(self, *tasks):
        for task in tasks:
            self.do(self.worker.load(self.keys[task], self.folders[self.keys[task]]))

    async def answer(self, images, tasks, slot=0):
        self.worker.images(slot)[: len(images)] = images
        return (await self.worker.run(slot, [[self.keys[task]] for task in tasks])).logits[:, 0]

    def ask(self, images, tasks, slot=0):
        return self.do(self.answer(images, tasks, slot))


@pytest.fixture(scope="module", params=[False, True], ids=["in-process", "process"])
def shared(request, settings, engine):
    with asyncio.Runner() as runner:
        driver = Driver(runner, Worker(settings, request.param), engine)
        try:
            assert "ONNX Runtime" in driver.do(driver.worker.start())
            yield driver
        finally:
            driver.do(driver.worker.close())


@pytest.fixture
def driver(shared):
    """A running worker that holds nothing."""
    yield shared
    for key in shared.keys.values():
        shared.do(shared.worker.evict(key, keep=False))
    stats = shared.do(shared.worker.stats())
    assert (stats.rows, stats.host_tasks, stats.host_bytes) == (0, 0, 0)


def agree(found, wanted, classes):
    """Whether rows of logits agree over their tasks' classes and are padded after them."""
    return all(
        np.abs(one[:count] - other[:count]).max() <= 1e-5 and np.isneginf(one[count:]).all()
        for one, other, count in zip(found, wanted, classes, strict=True)
    )


# ------------------------------------------------------------------------------------------------------- answers


def test_mixed_batches_of_every_size_answer_as_the_engine_does(driver, engine):
    driver.load("task0", "task1", "task4")  # the third has more classes and a larger rank than was allocated for
    for rows in range(1, MAX_BATCH + 1):
        images, tasks = noise(rows, seed=rows), [f"task{(0, 4, 1)[row % 3]}" for row in range(rows)]
        found = driver.ask(images, tasks, slot=rows % 2)
        assert found.dtype == np.float32
        assert found.flags.writeable
        classes = [len(engine.labels(task)) for task in tasks]
        assert agree(found, engine.logits(images, tasks), classes)


def test_an_image_answers_for_several_tasks_beside_one_for_fewer(driver, engine):
    driver.load("task0", "task1", "task4")
    images, asked = noise(2), [["task4", "task0", "task1"], ["task1"]]
    driver.worker.images(0)[:2] = images
    run = driver.worker.run(0, [[driver.keys[task] for task in row] for row in asked])
    found = driver.do(run).logits
    assert found.shape[:2] == (2, 3)
    for image, row in enumerate(asked):
        wanted = engine.logits(images[[image] * len(row)], row)
        assert agree(found[image, : len(row)], wanted, [len(engine.labels(task)) for task in row])


def test_a_task_answers_the_same_bits_after_another(driver):
    driver.load("task0", "task1")
    images = noise(3)
    first = driver.ask(images, ["task0"] * 3)
    other = driver.ask(images, ["task1"] * 3, slot=1)
    assert not np.array_equal(first, other)
    assert np.array_equal(driver.ask(images, ["task0"] * 3), first)


def test_the_engines_own_time_is_told(driver):
    driver.load("task0")
    started = time.perf_counter()
    answer = driver.do(driver.worker.run(0, [[driver.keys["task0"]]]))
    assert 0 < answer.seconds < time.perf_counter() - started


def test_loads_and_batches_go_on_together(driver):
    driver.load("task0", "task1")
    images, tasks = noise(4), ["task0", "task1"] * 2
    wanted = driver.ask(images, tasks)
    moving = driver.keys["task4"]

    async def come_and_go(running):
        turns = 0
        while not running.done():
            await driver.worker.load(moving, driver.folders[moving])
            await driver.worker.evict(moving, keep=turns % 2 == 0)
            turns += 1
        return turns

    async def both():
        async def ask(slot):
            return [await driver.answer(images, tasks, slot) for _ in range(15)]

        running = asyncio.gather(ask(0), ask(1))
        turns = await come_and_go(running)
        return turns, [logits for answers in await running for logits in answers]

    turns, answers = driver.do(both())
    assert turns >= 2
    assert len(answers) == 30
    # Growing pads with more classes; what is computed for the others stays.
    assert all(agree(found, wanted, [2, 3, 2, 3]) for found in answers)


# ---------------------------------------------------------------------------------------------------------- rows


def test_a_state_comes_back_from_memory_and_from_disk(driver, tmp_path):
    key = driver.keys["task1"]
    folder = Path(shutil.copytree(driver.folders[key], tmp_path / "task1"))
    images = noise(2)
    driver.do(driver.worker.load(key, folder))
    wanted = driver.ask(images, ["task1"] * 2)
    held = driver.do(driver.worker.stats())
    assert (held.rows, held.host_tasks) == (1, 0)
    assert held.row_bytes > 0
    assert held.resident_bytes > held.row_bytes

    driver.do(driver.worker.evict(key))
    kept = driver.do(driver.worker.stats())
    assert (kept.rows, kept.host_tasks) == (0, 1)
    assert kept.host_bytes == sum(value.nbytes for value in load_version(folder)[0].state.values())
    assert kept.row_bytes == held.row_bytes

    folder.rename(tmp_path / "away")  # so it can come from memory alone
    driver.do(driver.worker.load(key, folder))
    assert np.array_equal(driver.ask(images, ["task1"] * 2), wanted)

    driver.do(driver.worker.evict(key, keep=False))
    with pytest.raises(VersionGoneError, match=f"no longer holds version {key.version} of the task 'task1'"):
        driver.do(driver.worker.load(key, folder))
    (tmp_path / "away").rename(folder)
    driver.do(driver.worker.load(key, folder))
    assert np.array_equal(driver.ask(images, ["task1"] * 2), wanted)


def test_a_row_is_asked_for_by_version(driver):
    driver.load("task0")
    stranger = Key("task0", "0123456789ab")
    with pytest.raises(EngineError, match="task0@0123456789ab holds no row"):
        driver.do(driver.worker.run(0, [[driver.keys["task0"], stranger]]))
    with pytest.raises(VersionGoneError, match="0123456789ab"):
        driver.do(driver.worker.load(stranger, driver.folders[driver.keys["task0"]]))
    driver.do(driver.worker.evict(stranger))
    driver.load("task0")  # a second time
    assert driver.do(driver.worker.stats()).rows == 1
    assert np.isfinite(driver.ask(noise(1), ["task0"])[0, :2]).all()


def test_damaged_states_are_refused_and_the_others_answer(driver, tmp_path):
    driver.load("task0")
    key = driver.keys["task1"]
    folder = Path(shutil.copytree(driver.folders[key], tmp_path / "task1"))
    state = folder / "state.safetensors"
    whole = state.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        state.write_bytes(damaged)
        with pytest.raises(EngineError, match="is damaged"):
            driver.do(driver.worker.load(key, folder))
    state.unlink()
    with pytest.raises(EngineError, match="is missing"):
        driver.do(driver.worker.load(key, folder))
    state.write_bytes(whole)
    record = folder / "task.json"
    record.write_text(record.read_text().replace('"version": "', '"version": "0'))
    with pytest.raises(EngineError, match="was edited or damaged"):
        driver.do(driver.worker.load(key, folder))
    assert driver.ask(noise(1), ["task0"]).shape[0] == 1


def test_a_state_of_another_engine_does_not_fit(driver, tmp_path):
    other = pt.Engine(copied("linear", tmp_path))
    key = Key("task0", other.version("task0"))
    with pytest.raises(EngineError, match=r"task 'task0@.*does not fit the engine"):
        driver.do(driver.worker.load(key, other.folder.path / "tasks" / "task0"))


def test_rows_run_out(driver, engine, tmp_path):
    driver.load("task0", "task1", "task4")
    task = engine.folder.read_task("task0")
    renamed = replace(task, labels=("other", "labels"))
    key = Key("late", renamed.version)
    EngineFolder(copied("sa2vp", tmp_path)).write_task("late", renamed)
    folder = tmp_path / "engine" / "tasks" / "late"
    with pytest.raises(EngineError, match="no row is free: all 3 hold tasks"):
        driver.do(driver.worker.load(key, folder))
    driver.do(driver.worker.evict(driver.keys["task1"], keep=False))
    driver.do(driver.worker.load(key, folder))
    late = driver.do(driver.worker.run(0, [[key]])).logits
    assert np.array_equal(late, driver.do(driver.worker.run(0, [[driver.keys["task0"]]])).logits)
    # One that comes from memory and finds no row is kept there.
    driver.do(driver.worker.evict(key))
    driver.load("task1")
    shutil.rmtree(folder)
    with pytest.raises(EngineError, match="no row is free"):
        driver.do(driver.worker.load(key, folder))
    driver.do(driver.worker.evict(driver.keys["task1"], keep=False))
    driver.do(driver.worker.load(key, folder))
    driver.do(driver.worker.evict(key, keep=False))


def test_rows_grow_for_a_larger_task_and_not_before(settings, engine):
    slots = np.zeros((2, MAX_BATCH, 3, SIZE, SIZE), np.float32)
    store = Store(settings, slots)
    tasks = {name: Key(name, engine.version(name)) for name in engine.tasks}
    slots[0, :1] = noise(1)
    allocated = store.stats().row_bytes
    for name in ("task0", "task1"):
        store.load(tasks[name], engine.folder.path / "tasks" / name)
    before = store.run(0, [[tasks["task1"]]]).logits[:, 0]
    assert before.shape == (1, 16)  # as wide as calls of few classes are
    assert store.stats().row_bytes == allocated
    store.load(tasks["task4"], engine.folder.path / "tasks" / "task4")
    assert store.stats().row_bytes > allocated
    after = store.run(0, [[tasks["task1"]]]).logits[:, 0]
    assert after.shape == (1, 16)
    assert agree(after, before, [3])


@pytest.mark.parametrize("size", ["rows", "slots", "max_batch"])
def test_nothing_is_no_size(size, settings):
    with pytest.raises(UsageError, match="at least one row, one slot and one image in a batch"):
        replace(settings, **{size: 0})


def test_the_hosts_memory_is_bounded(engine):
    tasks = {Key(name, "v"): engine.folder.read_task(name) for name in engine.tasks}
    sizes = {key: sum(value.nbytes for value in task.state.values()) for key, task in tasks.items()}
    first, second, third = tasks
    cache = HostCache(sizes[first] + sizes[third])
    for key in (first, second, first, third):
        cache.keep(key, tasks[key])
        assert cache.nbytes <= sizes[first] + sizes[third]
    assert cache.take(second) is None  # kept longest ago
    assert len(cache.tasks) == 2
    assert cache.nbytes == sizes[first] + sizes[third]
    taken = cache.take(first)
    for name, value in tasks[first].state.items():
        assert np.array_equal(taken.state[name], value)
        assert not np.shares_memory(taken.state[name], value)
    assert cache.nbytes == sizes[third]
    small = HostCache(sizes[first] - 1)
    small.keep(first, tasks[first])
    assert (len(small.tasks), small.nbytes) == (0, 0)


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    """An engine whose tasks ``zebra`` and ``ant`` are constants, in this order."""
    folder = tmp_path_factory.mktemp("baked")
    runs = {"zebra": checkpoint("linear", 0), "ant": checkpoint("linear", 1)}
    pt.export_engine(runs, folder / "engine", format=ExportSettings(baked=True), parity=False)
    return pt.Engine(folder / "engine")


@KINDS
def test_a_baked_engine_holds_its_rows_from_the_beginning(process, baked, tmp_path):
    folder = baked.folder.path
    keys = {name: Key(name, baked.version(name)) for name in ("ant", "zebra")}
    worker = Worker(WorkerSettings(folder, RuntimeOptions(), 1, {}, 2, 2**20), process)

    async def serve():
        await worker.start()
        try:
            for name, key in keys.items():
                await worker.load(key, folder / "tasks" / name)
                await worker.evict(key)
            images = noise(2)
            worker.images(1)[:] = images
            found = (await worker.run(1, [[keys["ant"]], [keys["zebra"]]])).logits[:, 0]
            assert agree(found, baked.logits(images, ["ant", "zebra"]), [3, 2])
            with pytest.raises(VersionGoneError, match="does not hold version 0 of the task 'ant'"):
                await worker.load(Key("ant", "0"), tmp_path)
            with pytest.raises(EngineError, match="ant@0 holds no row"):
                await worker.run(1, [[Key("ant", "0")]])
            assert (await worker.stats()).rows == 2
        finally:
            await worker.close()

    asyncio.run(asyncio.wait_for(serve(), WAIT_S))


# ------------------------------------------------------------------------------------- callers that leave, closing


def test_a_cancelled_caller_stops_nothing(driver):
    driver.load("task0", "task1")
    images = noise(MAX_BATCH)
    wanted = driver.ask(images, ["task0"] * MAX_BATCH)

    async def leave():
        driver.worker.images(0)[:] = images
        batch = asyncio.create_task(driver.worker.run(0, [[driver.keys["task0"]]] * MAX_BATCH))
        load = asyncio.create_task(driver.worker.load(driver.keys["task4"], driver.folders[driver.keys["task4"]]))
        await asyncio.sleep(0)
        for one in (batch, load):
            one.cancel()
        for one in (batch, load):
            with pytest.raises(asyncio.CancelledError):
                await one

    driver.do(leave())
    # Replies still belong to their calls, and the load has gone on.
    assert driver.do(driver.worker.stats()).rows == 3
    assert agree(driver.ask(images, ["task0"] * MAX_BATCH), wanted, [2] * MAX_BATCH)
    assert agree(driver.ask(images[:1], ["task1"]), driver.ask(images[:1], ["task1"], slot=1), [3])


@KINDS
def test_a_worker_that_cannot_open_its_engine_says_why(process, settings, tmp_path):
    folder = copied("linear", tmp_path)
    (folder / "model.onnx").write_bytes(b"no model")
    broken = Worker(replace(settings, engine=folder), process)
    missing = Worker(replace(settings, engine=tmp_path / "none"), process)

    async def fail():
        for worker, error, message in (
            (broken, EngineError, r"model\.onnx is damaged: 8 bytes instead of \d+: export the engine again$"),
            (missing, EngineError, "no engine manifest at"),
        ):
            with pytest.raises(error, match=message):
                await worker.start()
            await worker.close()

    asyncio.run(asyncio.wait_for(fail(), WAIT_S))


@asynccontextmanager
async def started(settings, engine):
    """A process worker that holds ``task0``, its key, and how often it told of its death."""
    worker, key, deaths = Worker(settings), Key("task0", engine.version("task0")), []
    worker.on_death = lambda: deaths.append(True)
    try:
        await worker.start()
        await worker.load(key, engine.folder.path / "tasks" / "task0")
        yield worker, key, deaths
    finally:
        await worker.close()


def pid_of(worker):
    return worker.process_id


def is_running(pid):
    """Whether a process is there and not just waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def in_a_loop(serve):
    """Run a test's coroutine, bounded in time."""
    asyncio.run(asyncio.wait_for(serve(), WAIT_S))


def test_closing_answers_what_runs_and_refuses_the_rest(settings, engine):
    async def serve():
        async with started(settings, engine) as (worker, key, deaths):
            await close(worker, key, engine)
            assert not is_running(pid_of(worker))
        assert deaths == []

    async def close(worker, key, engine):
        images = noise(MAX_BATCH)
        worker.images(0)[:] = images
        worker.images(1)[:] = images
        batches = [asyncio.create_task(worker.run(slot, [[key]] * MAX_BATCH)) for slot in (0, 1)]
        await asyncio.sleep(0)
        await asyncio.gather(worker.close(), worker.close())
        for batch in batches:
            assert agree((await batch).logits[:, 0], engine.logits(images, "task0"), [2] * MAX_BATCH)
        for call in (worker.run(0, [[key]]), worker.load(key, Path("anywhere")), worker.evict(key), worker.stats()):
            with pytest.raises(WorkerDiedError, match="is closed"):
                await call
        await worker.close()

    async def serve_here():
        worker, key = Worker(settings, process=False), Key("task0", engine.version("task0"))
        await worker.start()
        await worker.load(key, engine.folder.path / "tasks" / "task0")
        await close(worker, key, engine)

    in_a_loop(serve)
    in_a_loop(serve_here)


# --------------------------------------------------------------------------------------------------------- deaths


def test_a_killed_worker_fails_what_waits_at_once_and_has_a_successor(settings, engine):
    async def serve():
        async with started(settings, engine) as (worker, key, deaths):
            pause(pid_of(worker))  # so that nothing is answered
            folder = engine.folder.path / "tasks" / "task1"
            calls = [
                worker.run(0, [[key]]),
                worker.run(1, [[key]]),
                worker.load(Key("task1", "v"), folder),
                worker.stats(),
            ]
            waiting = [asyncio.create_task(call) for call in calls]
            await asyncio.sleep(0)
            os.kill(pid_of(worker), signal.SIGKILL)
            started_at = time.monotonic()
            for result in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(result, WorkerDiedError)
                assert "killed or ran out of memory" in str(result)
            assert time.monotonic() - started_at < 5
            while not deaths:
                await asyncio.sleep(0.001)
            with pytest.raises(WorkerDiedError):
                await worker.run(0, [[key]])
            worker.images(0)[0] = 1  # whoever still prepares a batch does no harm
            await worker.close()
            await worker.close()
            assert deaths == [True]
        async with started(settings, engine) as (successor, key, deaths):
            successor.images(0)[:1] = images = noise(1)
            assert agree((await successor.run(0, [[key]])).logits[:, 0], engine.logits(images, "task0"), [2])
        assert deaths == []

    in_a_loop(serve)


def test_the_process_takes_neither_signals_nor_sockets_and_a_slot_stays_in_use_until_its_batch_ends(settings, engine):
    async def serve():
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        async with started(settings, engine) as (worker, key, deaths):
            pid = pid_of(worker)
            held = {str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()}
            assert f"socket:[{os.fstat(listening.fileno()).st_ino}]" not in held
            assert any(one.startswith("socket:") for one in held)
            assert os.getpgid(pid) != os.getpgid(0)
            for one in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, one)
            worker.images(0)[:1] = noise(1)
            wanted = (await worker.run(0, [[key]])).logits
            pause(pid)
            batch = asyncio.create_task(worker.run(0, [[key]]))
            await asyncio.sleep(0)
            batch.cancel()
            await asyncio.wait([batch], timeout=0.05)
            assert not batch.done()  # the slot is in use until the batch has ended
            os.kill(pid, signal.SIGCONT)
            with pytest.raises(asyncio.CancelledError):
                await batch
            assert np.array_equal((await worker.run(0, [[key]])).logits, wanted)
        assert deaths == []

    with ExitStack() as stack:
        in_a_loop(serve)


def test_the_process_of_an_onnx_engine_does_not_import_pytorch(settings, engine):
    async def serve():
        async with started(settings, engine) as (worker, key, _):
            await worker.run(0, [[key]])
            mapped = Path(f"/proc/{pid_of(worker)}/maps").read_text()
        assert "onnxruntime" in mapped
        assert "/torch/" not in mapped

    in_a_loop(serve)


def test_a_start_that_is_given_up_leaves_no_process(settings):
    async def serve():
        worker = Worker(settings)
        start = asyncio.create_task(worker.start())
        while pid_of(worker) is None:
            await asyncio.sleep(0.001)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        await worker.close()
        assert not is_running(pid_of(worker))

    in_a_loop(serve)


SERVER = """
import asyncio, sys
from pathlib import Path
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.workers import Worker, WorkerSettings

async def serve():
    worker = Worker(WorkerSettings(Path(sys.argv[1]), RuntimeOptions(threads=1), 1, {}, 1, 0))
    await worker.start()
    print(worker.process_id, flush=True)
    await asyncio.sleep(60)

asyncio.run(serve())
"""


def test_a_worker_ends_with_its_server(engine):
    command = [sys.executable, "-c", SERVER, str(engine.folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            worker = int(server.stdout.readline())
            assert is_running(worker)
        finally:
            server.kill()
        assert "leaked" not in server.stderr.read()
    deadline = time.monotonic() + WAIT_S
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(worker)


def test_errors_survive_the_way():
    for problem, error in (
        (VersionGoneError("gone"), VersionGoneError),
        (BankFullError("no room"), BankFullError),
        (UsageError("wrong"), UsageError),
        (MissingExtraError("tensorrt", "tensorrt"), PrompttuneError),
    ):
        found = pickle.loads(pickle.dumps(portable(problem)))
        assert type(found) is error
        assert str(found) == str(problem)
    assert str(portable(MemoryError("no room\nat all"))) == "the engine worker failed: MemoryError: no room"


# ------------------------------------------------------------------------------------------- several calls at once


@pytest.mark.parametrize("at_once", [1, 2])
def test_as_many_batches_overlap_as_the_runtime_takes(at_once, monkeypatch, settings, engine):
    monkeypatch.setattr(Runtime, "calls_at_once", at_once)
    store = Store(settings, np.zeros((2, MAX_BATCH, 3, SIZE, SIZE), np.float32))
    key = Key("task0", engine.version("task0"))
    store.load(key, engine.folder.path / "tasks" / "task0")
    both, answer = threading.Barrier(2), store._runtime.logits

    def together(*arguments):
        both.wait(WAIT_S if at_once == 2 else 0.5)  # one that comes alone is given up
        return answer(*arguments)

    store._runtime.logits = together
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(store.run, slot, [[key]]) for slot in (0, 1)]
        if at_once == 2:
            assert all(call.result().logits.shape[0] == 1 for call in calls)
        else:
            assert all(isinstance(call.exception(), threading.BrokenBarrierError) for call in calls)


class Overlapping:
    """A store whose batches wait for each other."""

    description = "overlapping"

    def __init__(self, settings, slots):
        assert len(slots) == 2
        self.both = threading.Barrier(2, timeout=WAIT_S)

    def run(self, slot, keys):
        self.both.wait()
        return slot


@KINDS
def test_a_worker_runs_the_batches_of_its_two_slots_at_once(process, monkeypatch, settings):
    """The program of the process runs in threads of this one, so that the test's store is in it."""
    threads = []

    async def spawn(self, memory):
        pairs = [socket.socketpair() for _ in self._turns]
        self._channels += [await asyncio.open_unix_connection(sock=here) for here, _ in pairs]
        monkeypatch.setattr(sys, "argv", ["", *map(str, (os.dup(memory), *(there.detach() for _, there in pairs)))])
        main._in_thread(main.main)

    def in_thread(target, *arguments):
        def run():
            with suppress(SystemExit):
                target(*arguments)

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    for where, name, value in (
        (Worker, "_spawn", spawn),
        (main, "_in_thread", in_thread),
        (main, "_leave_with", lambda server: None),
        (main, "Store", Overlapping),
        (worker_module, "Store", Overlapping),
        (os, "_exit", sys.exit),
    ):
        monkeypatch.setattr(where, name, value)

    async def serve():
        worker = Worker(settings, process)
        assert await worker.start() == "overlapping"
        assert await asyncio.gather(worker.run(0, []), worker.run(1, [])) == [0, 1]
        await worker.close()

    in_a_loop(serve)
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


# ------------------------------------------------------------------------------------------------- the event loop


def test_a_reply_that_arrives_in_pieces_leaves_the_loop_free(settings):
    async def serve():
        worker = Worker(settings)
        here, other = socket.socketpair()
        there = Connection(other.detach())
        worker._channels = [await asyncio.open_unix_connection(sock=here)] * 3
        reply = pickle.dumps("the statistics")
        rescue = threading.Timer(WAIT_S / 2, there.close)  # ends the test where the loop is not free
        rescue.start()
        asked = asyncio.create_task(worker.stats())
        await asyncio.to_thread(there.recv)
        os.write(there.fileno(), len(reply).to_bytes(4, "big") + reply[:5])
        await asyncio.sleep(0.05)
        os.write(there.fileno(), reply[5:])
        assert await asked == "the statistics"
        rescue.cancel()
        await worker.close()

    in_a_loop(serve)


def test_a_close_that_is_cancelled_leaves_the_watch_over_the_process(settings):
    async def serve():
        worker = Worker(settings)
        ended = asyncio.Event()
        worker._watching = asyncio.create_task(ended.wait())
        close = asyncio.create_task(worker.close())
        await asyncio.sleep(0)
        close.cancel()
        with pytest.raises(asyncio.CancelledError):
            await close
        assert not worker._watching.done()
        ended.set()
        for _ in range(2):  # then it has ended
            await worker.close()

    in_a_loop(serve)
