"""An engine of more tasks than are resident: what is loaded, what leaves, and that no answer shows it."""

import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import prompttune as pt
from prompttune.errors import EngineError, UsageError
from prompttune.export import EngineFolder, validate_engine
from prompttune.export import folder as folders
from prompttune.serve import engine as engines
from tests.engines import checkpoint, copied, noise

TASKS = [f"t{number}" for number in range(6)]
WAIT_S = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six tasks, of two class counts and ranks in turn."""
    path = copied("sa2vp", tmp_path_factory.mktemp("many"))
    opened = EngineFolder(path)
    for number, name in enumerate(TASKS):
        like = opened.read_task(f"task{number % 2}")
        state = {key: value * (1 + 0.1 * number) for key, value in like.state.items()}
        opened.write_task(name, dataclasses.replace(like, state=state))
    return path


@pytest.fixture(scope="module")
def whole(folder):
    """Every task resident."""
    return pt.Engine(folder)


@pytest.fixture
def read(monkeypatch):
    """Names of the tasks whose states are read, in order."""
    names, real = [], folders.load_version
    monkeypatch.setattr(folders, "load_version", lambda one: names.append(one.name) or real(one))
    return names


def same(found, expected):
    assert [(one.task, one.label, one.task_version) for one in found] == [
        (one.task, one.label, one.task_version) for one in expected
    ]
    assert [one.probability for one in found] == pytest.approx([one.probability for one in expected], abs=1e-6)


def test_opening_reads_no_state_of_many_tasks_and_asking_reads_what_is_asked_for(folder, whole, read, monkeypatch):
    monkeypatch.setattr(engines, "EAGER", 4)
    engine = pt.Engine(folder)
    assert (read, engine.tasks) == ([], whole.tasks)
    for name in TASKS:
        assert (engine.labels(name), engine.version(name)) == (whole.labels(name), whole.version(name))
        assert engine.preprocess(name) == whole.preprocess(name)
    assert read == []
    same(engine.predict(noise(2), ["t3", "t0"]), whole.predict(noise(2), ["t3", "t0"]))
    engine.predict(noise(1), "t3")
    assert read == ["t3", "t0"]
    with pytest.raises(UsageError, match="unknown task 't9'; known: t0, t1, "):
        engine.predict(noise(1), "t9")


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_batch_of_more_tasks_than_rows_is_answered_as_if_all_were_resident(folder, whole, rows):
    engine = pt.Engine(folder, resident_tasks=rows)
    images, names = noise(12), [*TASKS, *reversed(TASKS)]
    same(engine.predict(images, names), whole.predict(images, names))
    found, expected = engine.logits(images, names), whole.logits(images, names)
    assert found.shape == expected.shape
    assert np.allclose(found, expected, atol=1e-5)
    assert len(engine.bank.entries) == rows
    for one, other in zip(engine.answer(images, names), whole.answer(images, names), strict=True):
        assert (one.labels, one.task_version, len(one.logits)) == (other.labels, other.task_version, len(other.logits))


def test_the_task_that_was_not_asked_for_the_longest_leaves(folder, read):
    engine = pt.Engine(folder, resident_tasks=2)
    for name in ("t0", "t1", "t0", "t2"):
        engine.predict(noise(1), name)
    assert set(engine.bank.entries) == {"t0", "t2"}
    assert read == ["t0", "t1", "t2"]


def test_answers_are_right_while_threads_push_each_others_tasks_out(folder, whole):
    engine, images = pt.Engine(folder, resident_tasks=2), noise(2)
    pairs = [(one, other) for one in TASKS for other in TASKS if one < other]
    expected = {pair: whole.predict(images, pair) for pair in pairs}
    start = threading.Barrier(4)

    def ask(seed):
        start.wait()
        for place in np.random.default_rng(seed).integers(len(pairs), size=25):
            same(engine.predict(images, pairs[place]), expected[pairs[place]])

    with ThreadPoolExecutor(4) as pool:
        for asked in [pool.submit(ask, seed) for seed in range(4)]:
            asked.result(WAIT_S)


def test_a_task_that_is_in_no_folder_is_not_lost(folder):
    engine = pt.Engine(folder, resident_tasks=1)
    engine.add_task("guest", checkpoint("sa2vp", 3), save=False, parity=False)
    before = engine.predict(noise(1), "guest")
    engine.predict(noise(1), "t0")
    assert set(engine.bank.entries) == {"t0"}
    assert "guest" in engine.tasks
    assert len(engine.labels("guest")) == 5
    same(engine.predict(noise(1), "guest"), before)
    engine.remove_task("guest", save=False)
    with pytest.raises(UsageError, match="unknown task 'guest'"):
        engine.predict(noise(1), "guest")


def test_named_tasks_have_room_from_the_start(folder, monkeypatch):
    """Padding, and with it the last digits, must not depend on what was loaded first."""
    monkeypatch.setattr(engines, "EAGER", 0)
    engine = pt.Engine(folder, tasks=TASKS)
    engine.predict(noise(1), "t0")
    with engine.bank.lease(["t0"]) as snapshot:
        assert snapshot.placed["adapters.down_bias"].shape()[-1] == 3  # t0 has the rank two, t1 has three
    with pytest.raises(UsageError, match="unknown task 'tx'"):
        pt.Engine(folder, tasks=["tx"])


def test_a_bound_below_one_is_refused(folder):
    with pytest.raises(UsageError, match="at least 1"):
        pt.Engine(folder, resident_tasks=0)


def test_adding_a_task_reads_a_few_others(folder, read):
    with EngineFolder(folder).locked():
        EngineFolder(folder).read_some(3, besides="t0")
    assert read == ["t1", "t2", "t3"]


def test_validating_many_tasks_takes_some_and_says_so(folder, monkeypatch):
    monkeypatch.setattr("prompttune.export.parity.validate.MOST_TASKS", 2)
    report = validate_engine(folder, batch_sizes=[1], images=2)
    assert set(report.images) == {"t0", "t4"}
    assert any("2 of 8 tasks" in note for note in report.notes)
    assert set(validate_engine(folder, batch_sizes=[1], images=2, tasks=TASKS[:3]).images) == set(TASKS[:3])


def test_a_damaged_task_is_told_when_it_is_asked_for(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "engine")
    (path / "tasks/t0/state.safetensors").write_bytes(b"")
    engine = pt.Engine(path, resident_tasks=2)
    with pytest.raises(EngineError, match=r"t0.*is damaged"):
        engine.predict(noise(2), ["t1", "t0"])
    assert engine.predict(noise(1), "t1")
