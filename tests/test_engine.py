"""The engine in Python: answers, refusals, tasks that come and go while it answers."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import prompttune as pt
from prompttune.errors import DataError, EngineError, MissingExtraError, ParityError, UsageError
from prompttune.export import EngineFolder
from tests.engines import SIZE, checkpoint, copied, exported, model_of, noise


@pytest.fixture(scope="module")
def engine():
    return pt.Engine(exported("linear"))


def picture(seed, size=(50, 70)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def test_predict_gives_each_row_its_own_task(engine):
    images = noise(4)
    tasks = ["task1", "task0", "task1", "task0"]
    found = engine.predict(images, tasks, top_k=2)
    assert [one.task for one in found] == tasks
    for row, one in enumerate(found):
        model = model_of("linear", int(one.task[-1]))
        with torch.no_grad():
            expected = model(torch.from_numpy(images[row : row + 1])).logits[0].softmax(0)
        assert one.label == engine.labels(one.task)[int(expected.argmax())]
        assert one.probability == pytest.approx(float(expected.max()), abs=1e-4)
        assert [score.probability for score in one.top_k] == sorted(
            (score.probability for score in one.top_k), reverse=True
        )
        assert one.top_k[0] == (one.label, one.probability)
        assert len(one.top_k) == 2
        assert one.task_version == EngineFolder(exported("linear")).read_task(one.task).version
    # Over its own classes alone, whatever the largest task's class count.
    assert sum(score.probability for score in engine.predict(images[:1], "task0", 9)[0].top_k) == pytest.approx(1)


def test_paths_pictures_and_tensors_agree(engine, tmp_path):
    images = [picture(seed) for seed in range(3)]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    transform = engine.preprocess("task1").transform()
    batch = torch.stack([transform(image) for image in images])
    by_tensor = engine.predict(batch, "task1")
    assert engine.predict(images, "task1") == by_tensor
    assert engine.predict(paths, "task1") == by_tensor
    assert engine.predict([str(path) for path in paths], ["task1"] * 3) == by_tensor
    assert engine.predict(images[0], "task1")[0].label == by_tensor[0].label
    assert engine.predict(paths[0], "task1") == engine.predict([paths[0]], "task1")


@pytest.mark.parametrize(
    ("images", "tasks", "message"),
    [
        (np.zeros((2, 3, 32, 32), np.float32), "task0", r"must be \[B, 3, 64, 64\] with B at least 1, not \[2, 3, 32"),
        (np.zeros((3, SIZE, SIZE), np.float32), ["task0"] * 3, r"not \[3, 64, 64\]"),
        (np.zeros((0, 3, SIZE, SIZE), np.float32), "task0", "B at least 1"),
        (np.zeros((1, 3, SIZE, SIZE)), "task0", "float32 and normalised, not float64"),
        (np.zeros((1, 3, SIZE, SIZE), np.uint8), "task0", "not uint8"),
        (noise(2), ["task0"], "2 images but 1 tasks"),
        (noise(1), "tusk0", "unknown task 'tusk0'; did you mean task0"),
        ([3.5], "task0", "a PIL image or a uint8 array, not of the type float"),
    ],
)
def test_wrong_input_is_one_clear_line(engine, images, tasks, message):
    with pytest.raises(UsageError, match=message):
        engine.predict(images, tasks)
    if isinstance(images, np.ndarray):
        with pytest.raises(UsageError, match=message):
            engine.logits(images, tasks)


def test_bad_pictures_and_devices(engine, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read the image .*bad\.jpg"):
        engine.predict([tmp_path / "bad.jpg"], "task0")
    with pytest.raises(DataError, match=r"cannot read the image .*none\.jpg"):
        engine.predict([tmp_path / "none.jpg"], "task0")
    with pytest.raises(UsageError, match="top_k"):
        engine.predict(noise(1), "task0", top_k=0)
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        pt.Engine(exported("linear"), device="tpu")


def test_cuda_without_its_library_names_the_extra():
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    with pytest.raises(MissingExtraError, match=r"prompttune\[gpu\]"):
        pt.Engine(exported("linear"), device="cuda:0")


def test_damaged_state_gives_an_error_not_a_label(tmp_path):
    engine = pt.Engine(copied("linear", tmp_path))
    task = EngineFolder(engine.folder.path).read_task("task0")
    state = {**task.state, "head.bias": np.full_like(task.state["head.bias"], np.nan)}
    engine._bank.put("broken", type(task)(task.labels, task.preprocess, state))
    with pytest.raises(EngineError, match="task 'broken' gave logits that are not finite"):
        engine.predict(noise(1), "broken")
    assert engine.predict(noise(1), "task0")


def test_tasks_come_and_go(tmp_path):
    engine = pt.Engine(copied("linear", tmp_path))
    images = noise(2)
    before = engine.logits(images, "task0")[:, :2]
    for number in range(2, 9):  # past the capacity that the bank began with, and with ever more classes
        engine.add_task(f"task{number}", checkpoint("linear", number), parity=False)
    assert np.abs(engine.logits(images, "task0")[:, :2] - before).max() <= 1e-6
    assert engine.tasks == EngineFolder(tmp_path / "engine").tasks() == [f"task{number}" for number in range(9)]
    with pytest.raises(UsageError, match="already has a task 'task2'"):
        engine.add_task("task2", checkpoint("linear", 3))
    engine.add_task("task2", checkpoint("linear", 3), replace=True)
    assert engine.labels("task2") == engine.labels("task3")
    assert np.array_equal(engine.logits(images, "task2"), engine.logits(images, "task3"))
    engine.remove_task("task8")
    with pytest.raises(UsageError, match="unknown task 'task8'"):
        engine.logits(images, "task8")
    reopened = pt.Engine(tmp_path / "engine")
    assert reopened.tasks == engine.tasks
    assert np.abs(reopened.logits(images, "task2")[:, :5] - engine.logits(images, "task2")[:, :5]).max() <= 1e-6


def test_tasks_of_the_moment_stay_in_memory(tmp_path):
    engine = pt.Engine(copied("linear", tmp_path))
    engine.add_task("guest", checkpoint("linear", 3), save=False)
    engine.remove_task("task0", save=False)
    assert engine.tasks == ["guest", "task1"]
    assert EngineFolder(tmp_path / "engine").tasks() == ["task0", "task1"]


def test_a_task_that_does_not_answer_alike_is_not_added(tmp_path, monkeypatch):
    from prompttune.export.parity import proof

    folder = copied("linear", tmp_path)
    engine = pt.Engine(folder)
    fold = proof.fold_checkpoint

    def folded_wrongly(path, backbone):
        made = fold(path, backbone)
        made.task.state["head.bias"][0, 0] += 1
        return made

    monkeypatch.setattr(proof, "fold_checkpoint", folded_wrongly)
    with pytest.raises(ParityError, match=r"against the checkpoint.*task 'late' was not added"):
        engine.add_task("late", checkpoint("linear", 4))
    assert engine.tasks == EngineFolder(folder).tasks() == ["task0", "task1"]


def test_every_answer_is_of_the_version_that_it_names(tmp_path):
    engine = pt.Engine(copied("linear", tmp_path))
    folder = EngineFolder(engine.folder.path)
    for number in range(2, 6):
        engine.add_task(f"task{number}", checkpoint("linear", number), parity=False)
    versions = [folder.read_task(f"task{number}") for number in (2, 3, 4, 5)]
    engine.add_task("moving", checkpoint("linear", 2), parity=False)
    images = noise(1)
    right = {task.version: engine.predict(images, f"task{2 + at}")[0] for at, task in enumerate(versions)}
    stop, answers = threading.Event(), []

    def ask():
        while not stop.is_set():
            answers.append(engine.predict(images, "moving")[0])

    deadline = time.monotonic() + 120
    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask) for _ in range(3)]
        turn = 0
        while time.monotonic() < deadline and (len(answers) < 100 or len({one.task_version for one in answers}) < 3):
            turn += 1
            engine._bank.put("moving", versions[turn % 4], replace=True)
            engine._bank.put("other", versions[turn % 3], replace=True)
            engine._bank.remove("other")
        stop.set()
    for asker in askers:
        asker.result()
    assert len({one.task_version for one in answers}) >= 3
    for one in answers:
        expected = right[one.task_version]
        assert one.label == expected.label
        assert one.probability == pytest.approx(expected.probability, abs=1e-5)
