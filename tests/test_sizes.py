"""Engines that were built for ranges of sizes: every bank and every call stays within them, or is refused in words."""

import dataclasses

import numpy as np
import pytest

import prompttune as pt
from prompttune.errors import EngineError
from prompttune.export import EngineFolder, add_task, validate_engine
from prompttune.export.folder import write_manifest
from prompttune.export.layout import bank_input
from prompttune.export.runtimes import RuntimeOptions
from prompttune.export.runtimes.onnxruntime import OnnxRuntime
from prompttune.serve.service.assembly import EngineSettings, make_service
from prompttune.serve.service.catalogue import Catalogue
from prompttune.serve.workers import Key, WorkerSettings
from prompttune.serve.workers.store import Store
from tests.engines import checkpoint, copied, noise

RANGES = {
    "batch": [2, 4, 6],
    "asked": [1, 1, 2],
    "tasks": [2, 2, 4],
    "rank": [3, 3, 4],
    "classes": [8, 8, 16],
    "chosen": [4, 4, 16],
    "width": [4, 4, 8],
}
TASKS = [f"t{number}" for number in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An engine whose manifest says what a plan's does, and six tasks, two more than it takes at once."""
    path = copied("sa2vp", tmp_path_factory.mktemp("sizes"))
    opened = EngineFolder(path)
    for number, name in enumerate(TASKS):
        opened.write_task(name, opened.read_task(f"task{number % 2}"))
    write_manifest(path, dataclasses.replace(opened.manifest, details={"profile": RANGES}))
    return path


@pytest.fixture
def calls(folder, monkeypatch):
    """Rows of each call; one that a plan would refuse is an error."""
    manifest, rows, run = EngineFolder(folder).manifest, [], OnnxRuntime.run

    def bounded(self, inputs, bank):
        shapes = {bank_input(key): tuple(value.shape()) for key, value in bank.items()}
        shapes |= {name: one.shape for name, one in inputs.items()}
        for spec in manifest.inputs:
            for size, axis in zip(shapes[spec.name], spec.shape, strict=True):
                low, _, high = manifest.sizes.ranges[axis] if isinstance(axis, str) else (axis, axis, axis)
                assert low <= size <= high, f"{spec.name} is {shapes[spec.name]}"
        rows.append(len(inputs["image"]))
        return run(self, inputs, bank)

    monkeypatch.setattr(OnnxRuntime, "run", bounded)
    return rows


@pytest.mark.parametrize(("count", "expected"), [(1, [2]), (2, [2]), (6, [6]), (7, [6, 2]), (15, [6, 6, 3])])
def test_any_number_of_images_is_answered_in_calls_that_the_engine_takes(folder, calls, count, expected):
    images, names = noise(count), [["task0", "task1"][row % 2] for row in range(count)]
    found = pt.Engine(folder).logits(images, names)
    assert calls == expected
    for row in range(count):
        alone = pt.Engine(folder, tasks=[names[row]]).logits(np.repeat(images[row : row + 1], 2, 0), names[row])
        own = alone.shape[1]
        assert np.allclose(found[row, :own], alone[0], atol=1e-5)
        assert np.isneginf(found[row, own:]).all()


def test_tasks_take_turns_where_the_engine_takes_fewer(folder, calls):
    engine = pt.Engine(folder, resident_tasks=100)
    names = [*TASKS, "task0", "task1"]
    answers = engine.answer(noise(6), names)
    assert [len(one.logits) for one in answers] == [2, 3, 2, 3, 2, 3]
    assert engine.bank.limit == 4
    assert pt.Engine(folder).bank.limit == 3  # a row is to spare


def test_validation_and_its_proof_stay_within_the_sizes(folder, calls):
    report = validate_engine(folder, batch_sizes=(1, 8), images=2)
    assert report.passed
    assert len(report.images) == 4
    assert any("4 of 6 tasks" in note for note in report.notes)
    with pytest.raises(EngineError, match="the bank: the axis tasks would be 6, the engine was built for 4 at most"):
        validate_engine(folder, tasks=[*TASKS, "task0", "task1"], batch_sizes=(1,), images=1)


def test_tasks_that_the_engine_never_takes_are_not_added(folder, calls, tmp_path):
    engine = pt.Engine(folder)
    for add in (lambda: add_task(folder, "big", checkpoint("sa2vp", 4), parity=False),
                lambda: engine.add_task("big", checkpoint("sa2vp", 4))):  # fmt: skip
        with pytest.raises(EngineError, match=r"task 'big': the axis rank would be 6, the engine was built for 4 at m"):
            add()
    assert "big" not in EngineFolder(folder).tasks()
    engine.add_task("fits", checkpoint("sa2vp", 1), save=False)  # proven with as many others as there are rows
    unbounded = EngineFolder(copied("sa2vp", tmp_path))
    add_task(unbounded.path, "big", checkpoint("sa2vp", 4), parity=False)
    watched = Catalogue(EngineFolder(folder), [unbounded.path / "tasks"]).scan()
    assert "the axis rank would be 6" in watched.problems["big"]
    assert set(watched.records) == {*TASKS, "task0", "task1"}


def test_a_server_keeps_to_the_sizes(folder, calls):
    async def settings():
        service = make_service(EngineSettings(folder, resident_tasks=64, max_batch=16))
        return service._replicas[0].capacity, service._replicas[0].settings

    import asyncio

    capacity, made = asyncio.run(settings())
    assert (capacity, made.rows, made.max_batch) == (4, 4, 6)
    slots = np.zeros((2, 9, *noise(1).shape[1:]), np.float32)
    store = Store(WorkerSettings(folder, RuntimeOptions(), rows=1, axes={}, max_batch=9, host_bytes=0), slots)
    assert calls == [2, 6, 3]
    key = Key("task1", EngineFolder(folder).load_task("task1")[1])
    store.load(key, folder / "tasks" / "task1")
    assert store.run(0, [[key]]).logits.shape == (1, 1, 8)  # as wide as calls get
