"""The engine in Python: answers, refusals, tasks that come and go while it answers."""

import dataclasses
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


@pytest.mark.parametrize("rows", [None, 1])
def test_lists_of_tasks_are_answered_in_their_order(rows):
    engine = pt.Engine(exported("linear"), resident_tasks=rows)
    images, lists = noise(3), [["task1"], ["task0", "task1", "task0"], ("task1", "task0")]
    found = engine.predict(images, lists)
    assert [[one.task for one in row] for row in found] == [list(row) for row in lists]
    answers = engine.answer(images, lists)
    for row, names in enumerate(lists):
        for place, name in enumerate(names):
            alone = engine.predict(images[row : row + 1], name)[0]
            assert (found[row][place].label, found[row][place].task_version) == (alone.label, alone.task_version)
            assert found[row][place].probability == pytest.approx(alone.probability, abs=1e-6)
            assert answers[row][place].labels == tuple(engine.labels(name))
            single = engine.logits(images[row : row + 1], name)[0]
            assert np.abs(answers[row][place].logits - single).max() <= 1e-5
    for_all = engine.predict(images, [["task1", "task0"]])
    assert [[one.task for one in row] for row in for_all] == [["task1", "task0"]] * 3
    assert for_all[2][1].label == engine.predict(images[2:], "task0")[0].label
    assert engine.logits(images, [["task1", "task0"]]).shape == (3, 2, 3)
    assert engine.logits(images, [["task0"]]).shape == (3, 1, 2)
    with pytest.raises(UsageError, match=r"as many tasks for each image as for the others; call answer\(\) for lists"):
        engine.logits(images, lists)


def test_each_list_is_filled_up_to_the_length_of_its_like_alone(monkeypatch):
    """Among a thousand lists a long one must not make the others long."""
    engine, shapes = pt.Engine(exported("linear")), []
    run = type(engine._runtime).run
    monkeypatch.setattr(
        type(engine._runtime),
        "run",
        lambda self, inputs, bank: shapes.append(inputs["task_index"].shape) or run(self, inputs, bank),
    )
    lists = [["task0"], ["task1"] * 3, ["task0", "task1"] * 8, ["task1"], ["task0"] * 4]
    found = engine.answer(noise(5), lists)
    assert sorted(shapes) == [(1, 16), (2, 1), (2, 4)]
    assert [len(row) for row in found] == [1, 3, 16, 1, 4]


def test_pictures_are_prepared_by_each_of_their_tasks(tmp_path):
    folder = copied("linear", tmp_path)
    one = EngineFolder(folder)
    task = one.read_task("task1")
    other = dataclasses.replace(task.preprocess, mean=(0.1, 0.2, 0.3))
    one.write_task("other", dataclasses.replace(task, preprocess=other))
    engine, images = pt.Engine(folder), [picture(seed) for seed in range(2)]
    found = engine.predict(images, [["task1", "other"], ["other"]])
    for row, names in enumerate((["task1", "other"], ["other"])):
        for place, name in enumerate(names):
            alone = engine.predict(images[row], name)[0]
            assert found[row][place].probability == pytest.approx(alone.probability, abs=1e-6)
    assert found[0][0].probability != pytest.approx(found[0][1].probability, abs=1e-4)


def test_ten_thousand_classes_beside_two(tmp_path):
    """The bank pays for each task's own classes, and each answer has its own."""
    folder, many = copied("linear", tmp_path), 10_000
    opened = EngineFolder(folder)
    like = opened.read_task("task0")
    drawn = np.random.default_rng(0)
    state = {
        "head.weight": drawn.standard_normal((1, many, model_of("linear", 0).backbone.width), np.float32),
        "head.bias": drawn.standard_normal((1, many), np.float32),
    }
    wide = dataclasses.replace(like, labels=tuple(f"c{number}" for number in range(many)), state=state)
    opened.write_task("wide", wide)
    engine, images = pt.Engine(folder), noise(3)
    width = state["head.weight"].shape[2]
    assert engine.bank.nbytes <= 2 * (many + 2 + 3 + 1) * (width + 1) * 4  # and not one row of ten thousand a task
    with torch.no_grad():
        features = model_of("linear", 0)(torch.from_numpy(images)).features.numpy()
    wanted = features @ state["head.weight"][0].T + state["head.bias"][0]
    found = engine.answer(images, ["wide", "task0", "wide"])
    assert [len(one.logits) for one in found] == [many, 2, many]
    assert np.abs(found[0].logits - wanted[0]).max() <= 1e-4
    assert np.abs(found[2].logits - wanted[2]).max() <= 1e-4
    narrow = pt.Engine(exported("linear")).logits(images[1:2], "task0")[0]
    assert np.abs(found[1].logits - narrow).max() <= 1e-5
    both = engine.predict(images, [["task0", "wide"]], top_k=1)
    assert [row[1].label for row in both] == [f"c{one}" for one in wanted.argmax(axis=1)]
    before = engine.bank.nbytes
    engine.add_task("late", checkpoint("linear", 2), save=False, parity=False)
    assert engine.bank.nbytes <= 1.001 * before  # four classes more, not ten thousand


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
        (noise(3), [["task0"], ["task1"]], "3 images but 2 lists of tasks: give one list for each image, or one for"),
        (noise(2), [["task0"], []], r"a list of at least one task name for each image, or one list for all, not \[\]"),
        (noise(2), [["task0"], "task1"], "a list of at least one task name for each image, .*, not 'task1'"),
        (noise(1), [["task0", 3]], r"not \['task0', 3\]"),
        (noise(1), [None], "not None"),
        (noise(1), [], "1 images but 0 tasks"),
        (noise(1), [["task0", "tusk1"]], "unknown task 'tusk1'; did you mean task1"),
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
