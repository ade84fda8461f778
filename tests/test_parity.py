"""The comparison with PyTorch: mixed batches, swaps, accuracy, and that it can fail."""

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import prompttune as pt
from prompttune.data import load_data
from prompttune.errors import UsageError
from prompttune.export import EngineFolder, Gate, add_task
from prompttune.export.parity.accuracy import AHEAD, PIECE, read_ahead
from prompttune.export.parity.compare import compare_mixed
from prompttune.export.parity.invariance import check_swaps
from prompttune.export.parity.samples import Samples
from prompttune.task_types import ClassificationConfig
from tests.drawing import drawn_model
from tests.engines import backbone, config_of, copied, exported, noise
from tests.test_parity_figures import report, tally


class Fake:
    """Two tasks whose answers do not depend on the image; ``change`` spoils them."""

    description = "fake"

    def __init__(self, change=lambda answers, tasks: answers):
        self.change = change

    def logits(self, images, tasks):
        if not isinstance(tasks[0], str):  # lists of tasks: each list is answered as a batch
            return np.stack([self.logits(images, row) for row in zip(*tasks, strict=True)], axis=1)
        answers = np.array([[1.0, 2.0, -np.inf] if task == "a" else [3.0, 1.0, 2.0] for task in tasks], np.float32)
        return self.change(answers, tasks)


def crosstalk(answers, tasks):
    """Alone as it should be; in a batch each row is shifted by its neighbour."""
    return answers + np.float32(0.25 if len(tasks) > 1 else 0.0)


def reference(images, task):
    return np.array([[1.0, 2.0] if task == "a" else [3.0, 1.0, 2.0]] * len(images), np.float32)


def test_mixed_batches_are_held_against_single_runs():
    images = {"a": noise(2), "b": noise(2)}
    comparisons, apart = compare_mixed(Fake(crosstalk), reference, images, (1, 2, 4))
    assert apart == 0.25
    assert [one.batch_size for one in comparisons] == [2, 4]
    assert {one.max_abs for one in comparisons} == {0.25}
    assert compare_mixed(Fake(crosstalk), reference, {"a": noise(2)}, (1, 2)) == ([], None)


def test_swaps_of_an_honest_engine_are_exact():
    images = {"a": noise(2), "b": noise(2)}
    swaps = check_swaps(Fake(), images, (1, 4))
    assert all(one.exact for one in swaps)
    found = {(one.task, one.other, one.batch_size, one.between) for one in swaps}
    assert found == {(*pair, size, between) for pair in ("ab", "ba") for size in (1, 4) for between in (1, 4)}
    assert check_swaps(Fake(), {"a": noise(2)}, (1, 4)) == []


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_left_of_another_task_fails_the_swap(batch_size):
    """An engine that blends the last task into the next one, at one batch size alone, by one unit in the last place."""
    last = []

    def blend(answers, tasks):
        stale = bool(last) and last[-1] != tasks[0]
        last.append(tasks[0])
        changed = stale and len(tasks) == batch_size
        return np.where(np.isfinite(answers) & changed, np.nextafter(answers, np.float32(9)), answers)

    def a_first(swaps):
        return [one for one in swaps if one.task == "a"]

    swaps = check_swaps(Fake(blend), {"a": noise(2), "b": noise(2)}, (1, 4))
    assert {one.batch_size for one in a_first(swaps) if not one.exact} == {batch_size}
    made = report(tally([[1.0, 2.0]], [[1.0, 2.0]]), swaps=tuple(swaps), gate=Gate.for_precision("int8"))
    assert "its answer changes" in made.failures[0]
    assert 0 < max(one.max_abs for one in swaps) < 1e-6


def test_a_buffer_that_is_used_again_does_not_hide_a_difference():
    buffer, calls = np.zeros((4, 3), np.float32), []

    def reuse(answers, tasks):
        calls.append(tasks)
        buffer[: len(answers)] = answers + len(calls)
        return buffer[: len(answers)]

    assert not any(one.exact for one in check_swaps(Fake(reuse), {"a": noise(2), "b": noise(2)}, (1, 4)))


class Wrong:
    """An engine that is off for one task."""

    description = "wrong"

    def __init__(self, engine):
        self.engine = engine

    def logits(self, images, tasks):
        found = self.engine.logits(images, tasks)
        found[[task == "task1" for task in tasks], 0] += 0.01
        return found


def test_validate_passes_an_engine_and_fails_a_wrong_one():
    folder = exported("linear")
    engine = pt.Engine(folder)
    passed = pt.validate_engine(folder, runner=engine)
    assert passed.passed
    assert {one.task for one in passed.comparisons} == {"task0", "task1", "mixed"}
    assert len(passed.swaps) == 8
    assert "synthetic" in passed.images["task0"]
    failed = pt.validate_engine(folder, runner=Wrong(engine), min_agreement=0.0)
    assert not failed.passed
    assert {one.task for one in failed.comparisons if one.max_abs > 1e-3} == {"task1", "mixed"}
    assert pt.validate_engine(folder, runner=Wrong(engine), min_agreement=0.0, atol=0.1).passed
    assert pt.validate_engine(folder, runner=Wrong(engine), tasks=["task0"]).passed


def test_validate_finds_a_state_that_was_swapped(tmp_path):
    folder = copied("linear", tmp_path)
    engine = pt.Engine(folder)
    other = EngineFolder(folder).read_task("task1")
    engine._bank.put("task0", other, replace=True)
    assert not pt.validate_engine(folder, runner=engine, tasks=["task0"], min_agreement=0.0).passed


def test_accuracy_on_labelled_images(tmp_path):
    labels = [str(digit) for digit in range(10)]
    model = drawn_model(backbone(), config_of("linear"), 10)
    assert model.labels == labels
    model.save(tmp_path / "digits")
    folder = copied("linear", tmp_path)
    task = add_task(folder, "digits", tmp_path / "digits", data="demo/digits", images=4)
    assert task.parity["images"] == {"digits": "4 images of demo/digits"}
    (at_export,) = task.parity["accuracy"]
    assert (at_export["images"], at_export["engine"]) == (4, at_export["reference"])
    found = pt.validate_engine(folder, {"digits": "demo/digits"}, images=4, limit=40)
    (accuracy,) = found.accuracy
    assert (accuracy.task, accuracy.images, accuracy.skipped) == ("digits", 40, "")
    whole = next(one for one in found.comparisons if one.images == 40)
    assert whole.max_abs <= 1e-4
    assert whole.top5_agreement > 0.95
    source, transform = load_data("demo/digits").val, model.preprocess.transform()
    read = [source.load(index) for index in np.unique(np.linspace(0, len(source) - 1, 40).astype(int))]
    with torch.no_grad():
        guesses = model(torch.stack([transform(image) for image, _ in read])).logits.argmax(dim=1).tolist()
    right = sum(source.classes[target] == labels[guess] for (_, target), guess in zip(read, guesses, strict=True))
    assert accuracy.reference == accuracy.engine == right / 40
    assert task.parity["accuracy"][0]["evaluation"] is None  # an engine folder does not hold it for a few images
    engine, reference = accuracy.evaluation.engine, accuracy.evaluation.reference
    assert (engine.n, engine.top1, engine.labels) == (40, right / 40, tuple(labels))
    assert np.array_equal(engine.confusion, reference.confusion)
    assert engine.loss == pytest.approx(reference.loss, abs=1e-4)
    assert engine.ece == pytest.approx(reference.ece, abs=1e-4)
    (written,) = json.loads(json.dumps(found.to_dict(), allow_nan=False))["accuracy"]
    assert written["evaluation"] == {"engine": engine.to_dict(), "reference": reference.to_dict()}
    assert written["evaluation"]["engine"]["report"]["3"]["support"] == int(engine.support[3])


def test_images_without_finite_logits_are_wrong_and_named(tmp_path):
    drawn_model(backbone(), config_of("linear"), 10).save(tmp_path / "digits")
    folder = copied("linear", tmp_path)
    add_task(folder, "digits", tmp_path / "digits", parity=False)
    engine, source = pt.Engine(folder), load_data("demo/digits").val
    spoiled = EngineFolder(folder).read_task("digits").preprocess.transform()(source.load(5)[0]).numpy()

    class Spoiled:
        description = "spoiled"

        def logits(self, images, tasks):
            found = engine.logits(images, tasks)
            found[[np.array_equal(image, spoiled) for image in images], 0] = np.nan
            return found

    settings = {"images": 2, "batch_sizes": (4,), "tasks": ["digits"]}
    found = pt.validate_engine(folder, {"digits": "demo/digits"}, runner=Spoiled(), **settings)
    (accuracy,) = found.accuracy
    assert (accuracy.not_finite, accuracy.not_finite_images) == (1, (source.describe(5),))
    assert accuracy.evaluation.engine.not_finite.sum() == 1
    assert accuracy.evaluation.reference.not_finite.sum() == 0
    assert accuracy.evaluation.engine.n == accuracy.images == len(source)
    assert not found.passed
    assert f"not finite for 1 of {len(source)} images of demo/digits" in found.warnings[-1]
    assert source.describe(5) in found.warnings[-1]
    json.dumps(found.to_dict(), allow_nan=False)


class Slow:
    """Images that count themselves; the first one waits until it is let go."""

    task_type = ClassificationConfig()

    def __init__(self, count):
        self.count, self.first, self.lock = count, threading.Event(), threading.Lock()
        self.loaded, self.others = [], threading.Semaphore(0)

    def load(self, index):
        if index == 0:
            assert self.first.wait(60)
        with self.lock:
            self.loaded.append(index)
        self.others.release()
        if index == 9:
            raise OSError("damaged")
        return Image.new("L", (64, 64), index % 256).convert("RGB"), index


def test_images_are_read_ahead_in_order_and_only_so_far():
    task = EngineFolder(exported("linear")).read_task("task0")
    most, source = AHEAD * PIECE, Slow(500)
    images = read_ahead(source, task, range(500))
    taker = threading.Thread(target=lambda: taken.append(next(images)))
    taken = []
    taker.start()
    for _ in range(most - PIECE):  # all but those behind the first in its thread
        assert source.others.acquire(timeout=60)
    assert not taken
    source.first.set()
    taker.join(60)
    for _ in range(PIECE):
        assert source.others.acquire(timeout=60)
    assert sorted(source.loaded) == list(range(most))
    rest = list(images)
    assert [index for index, _, _ in taken + rest] == list(range(500))
    assert [index for index, image, _ in rest if image is None] == [9]
    assert all(target == index for index, image, target in rest if image is not None)
    assert rest[3][1].shape == (3, 64, 64)


def test_reading_ahead_ends_early_and_passes_errors_on():
    task = EngineFolder(exported("linear")).read_task("task0")
    source, others = Slow(500), set(threading.enumerate())
    source.first.set()
    images = read_ahead(source, task, range(500))
    next(images)
    images.close()
    assert len(source.loaded) <= AHEAD * PIECE
    assert not [one for one in threading.enumerate() if one.name.startswith("decode") and one not in others]
    source.load = lambda index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(source, task, range(500)))


def test_classes_that_are_not_the_labels_give_no_accuracy():
    found = pt.validate_engine(exported("linear"), "demo/digits", images=2, limit=8)
    assert [(one.task, one.images, one.engine) for one in found.accuracy] == [("task0", 8, None), ("task1", 8, None)]
    assert all("not the task's labels" in one.skipped for one in found.accuracy)


def test_data_of_one_task_are_scored_whatever_classes_it_lacks():
    found = pt.validate_engine(exported("linear"), {"task1": "demo/digits"}, images=2, limit=8)
    (accuracy,) = found.accuracy
    assert (accuracy.task, accuracy.images, accuracy.skipped) == ("task1", 8, "")
    assert accuracy.engine is not None
    assert "synthetic" in found.images["task0"]


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="unknown task 'nobody'"):
        pt.validate_engine(exported("linear"), {"nobody": "demo/digits"})
    with pytest.raises(UsageError, match="unknown task 'nobody'"):
        pt.validate_engine(exported("linear"), tasks=["nobody"])
    for settings in ({"atol": -1.0}, {"min_agreement": 2.0}, {"batch_sizes": ()}, {"batch_sizes": (0,)}, {"images": 0}):
        with pytest.raises(UsageError):
            pt.validate_engine(exported("linear"), **settings)


def test_noise_is_the_same_each_time():
    task = EngineFolder(exported("linear")).read_task("task0")
    first, words = Samples(seed=3).draw("task0", task, 2)
    assert np.array_equal(first, Samples(seed=3).draw("task0", task, 2)[0])
    assert not np.array_equal(first, Samples(seed=4).draw("task0", task, 2)[0])
    assert first.shape == (2, 3, 64, 64)
    assert "seed 3" in words
