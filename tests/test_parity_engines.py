"""The comparison of two engines, which needs neither PyTorch's forward nor the backbone's weights."""

import numpy as np
import pytest

import prompttune as pt
from prompttune.errors import EngineError, UsageError
from prompttune.export import EngineFolder, Gate, add_task
from prompttune.export.parity.compare import runner_reference
from tests.drawing import drawn_model
from tests.engines import backbone, checkpoint, config_of, copied, exported, noise
from tests.test_export_folder import reseal
from tests.test_parity import Fake


def without_weights(folder):
    reseal(folder / "engine.json", lambda values: values["backbone"].update(weights="random:5"))
    return folder


def test_two_engines_without_the_weights(tmp_path):
    first = without_weights(copied("linear", tmp_path))
    with pytest.raises(EngineError, match="--weights"):
        pt.validate_engine(first)
    found = pt.validate_engine(first, against=exported("linear"))
    assert found.passed
    assert {one.reference for one in found.comparisons} == {"engine"}
    assert found.max_abs < 1e-5  # a product with the head's classes rounds by the number of rows
    assert len(found.swaps) == 8
    assert "thresholds of fp32" in found.notes[0]


def test_only_common_tasks_are_compared_and_differing_ones_noticed(tmp_path):
    other = copied("linear", tmp_path)
    add_task(other, "extra", checkpoint("linear", 2), parity=False)
    EngineFolder(other).remove_task("task0")
    found = pt.validate_engine(exported("linear"), against=other)
    assert {one.task for one in found.comparisons} == {"task1"}
    # The same labels over other parameters: another version, and another answer.
    changed = drawn_model(backbone(), config_of("linear"), 3, seed=9)
    changed.save(tmp_path / "changed")
    add_task(other, "task1", tmp_path / "changed", replace=True, parity=False)
    found = pt.validate_engine(exported("linear"), against=other)
    assert not found.passed
    assert found.notes[1] == "not the same versions on both sides: task1"


def test_engines_that_cannot_be_compared_are_refused(tmp_path):
    other = copied("linear", tmp_path)
    add_task(other, "task1", checkpoint("linear", 4), replace=True, parity=False)
    with pytest.raises(EngineError, match="task 'task1' has other labels"):
        pt.validate_engine(exported("linear"), against=other)
    EngineFolder(other).remove_task("task0")
    EngineFolder(other).remove_task("task1")
    with pytest.raises(EngineError, match=r"no task is in both engines: .* has none"):
        pt.validate_engine(exported("linear"), against=other)
    reseal(other / "engine.json", lambda values: values["backbone"].update(image_size=96))
    with pytest.raises(EngineError, match=r"takes images of 64 pixels, .* of 96"):
        pt.validate_engine(exported("linear"), against=other)
    with pytest.raises(UsageError, match="leave out the other engine"):
        pt.validate_engine(exported("linear"), against=exported("linear"), debug=True)


def test_the_looser_precision_decides(tmp_path):
    other = copied("linear", tmp_path)
    reseal(other / "engine.json", lambda values: values.update(precision="fp16"))
    found = pt.validate_engine(exported("linear"), against=other)
    assert found.gate == Gate.for_precision("fp16")
    assert found.notes == ("thresholds of fp16, the looser of fp32 and fp16",)


def test_another_engine_as_reference_is_run_in_batches():
    sizes = []

    class Counting(Fake):
        def logits(self, images, tasks):
            sizes.append(len(tasks))
            return super().logits(images, tasks)

    task = EngineFolder(exported("linear")).read_task("task0")  # two classes
    answers = runner_reference(Counting(), {"a": task}, 4)(noise(6), "a")
    assert sizes == [4, 2]
    assert np.array_equal(answers, [[1.0, 2.0]] * 6)
