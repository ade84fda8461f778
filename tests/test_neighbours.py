"""An image's answer does not depend on its neighbours in the batch; the check that says so can fail."""

import json

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import prompttune as pt
from prompttune.export import Gate
from prompttune.export.formats.onnx_file import _average_by_product
from prompttune.export.parity.html import write_html
from prompttune.export.parity.invariance import check_neighbours
from tests.engines import checkpoint, exported, noise, workshop
from tests.test_parity import Fake, crosstalk
from tests.test_parity_figures import report, tally

IMAGES = {"a": noise(4), "b": noise(4)}


@pytest.fixture(scope="module")
def int8():
    runs = [checkpoint("sa2vp", number) for number in (0, 1)]
    folder = workshop() / "neighbours-int8"
    pt.export_engine(runs, folder, format=pt.ExportSettings(precision="int8"), batch_sizes=(1, 4), images=8)
    return pt.Engine(folder)


def batched(engine, images, order, size):
    found = [engine.logits(images[order[start : start + size]], "task0") for start in range(0, len(order), size)]
    return np.concatenate(found)[np.argsort(order)]


@pytest.mark.slow
def test_dynamic_int8_answers_bit_for_bit_whatever_shares_the_batch(int8):
    images = np.concatenate([noise(15), 20 * noise(1, seed=1)])  # the last one would set the scale of a whole batch
    alone = batched(int8, images, np.arange(16), 1)
    for order in (np.arange(16), np.random.default_rng(1).permutation(16)):
        for size in (3, 8, 16):
            assert np.array_equal(batched(int8, images, order, size), alone)


def test_an_export_looks_at_the_neighbours(int8):
    found = int8.folder.manifest.parity["neighbours"]
    tried = [(one["task"], one["among"], one["batch_size"]) for one in found]
    ways = ("own images", "own images in reverse", "images of other tasks", "other tasks of the same images")
    assert tried == [(task, among, 4) for task in ("task0", "task1") for among in ways]
    assert {(one["images"], one["changed"], one["max_rel"]) for one in found} == {(4, 0, 0.0)}


def test_what_leaks_into_a_neighbour_is_found_and_fails_the_gate(tmp_path):
    found = check_neighbours(Fake(crosstalk), IMAGES, (1, 2, 4), ["a", "b"])
    assert [one.batch_size for one in found if one.task == "a"] == [2, 4, 4, 4, 4]
    assert {one.max_rel for one in found if one.task == "a"} == {0.125}
    assert {one.changed for one in found} == {0}
    made = report(tally([[1.0]], [[1.0]]), neighbours=tuple(found), gate=Gate.for_precision("int8"))
    assert "task 'a': in batches of 2 with own images its logits differ" in made.failures[0]
    assert "by 0.125 of the largest, allowed 1e-05" in made.failures[0]
    written = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert (written["max_neighbours"], written["neighbours"][0]["max_rel"]) == (1e-5, 0.125)
    write_html(made, "engine", tmp_path / "report.html")
    assert "Neighbours" in (page := (tmp_path / "report.html").read_text())
    assert '<td class="bad">1.25e-01</td>' in page


def test_the_place_in_the_batch_and_other_tasks_are_neighbours_too():
    def by_place(answers, tasks):
        return answers * np.where(np.arange(len(tasks)) == 2, np.float32(-1), np.float32(1))[:, None]

    def by_task(answers, tasks):
        return answers * np.float32(1 + 0.5 * (len(set(tasks)) > 1))

    by_among = [
        {one.among for one in check_neighbours(Fake(change), IMAGES, (1, 4), ["a", "b"]) if one.max_rel > 0.1}
        for change in (by_place, by_task)
    ]
    everything = {"own images", "own images in reverse", "images of other tasks", "other tasks of the same images"}
    assert by_among == [everything, {"images of other tasks"}]


def test_the_other_tasks_of_an_image_are_neighbours_too():
    class Blending(Fake):
        """Each further task of an image moves the answer of the first."""

        def logits(self, images, tasks):
            return super().logits(images, tasks) * np.float32(1 + 0.25 * (len(tasks[0]) - 1))

    found = check_neighbours(Blending(), IMAGES, (1, 4), ["a", "b"])
    apart = [(one.task, one.among, one.max_rel) for one in found if one.max_rel]
    assert apart == [(task, "other tasks of the same images", 0.25) for task in "ab"]
    made = report(tally([[1.0]], [[1.0]]), neighbours=tuple(found), gate=Gate.for_precision("fp32"))
    assert not made.passed
    assert "task 'a': in batches of 4 with other tasks of the same images its logits differ" in made.failures[0]


def test_an_honest_engine_passes_and_a_single_row_has_no_neighbours():
    assert {one.max_rel for one in check_neighbours(Fake(), IMAGES, (1, 4), ["a", "b"])} == {0.0}
    assert check_neighbours(Fake(), IMAGES, (1,), ["a", "b"]) == []
    lost = check_neighbours(Fake(lambda answers, tasks: answers + np.float32(np.nan)), IMAGES, (2,), ["a"])
    assert not report(tally([[1.0]], [[1.0]]), neighbours=tuple(lost)).passed


def test_validate_refuses_an_engine_whose_rows_touch_each_other():
    """Far within what agreement and rounding of int8 let pass."""
    engine = pt.Engine(exported("linear"))

    class Touching:
        description = "touching"

        def logits(self, images, tasks):
            return engine.logits(images, tasks) * np.float32(1 + 1e-4 * (len(tasks) - 1))

    folder = engine.folder.path
    assert pt.validate_engine(folder, runner=engine, images=4).passed
    found = pt.validate_engine(folder, runner=Touching(), images=4, atol=1.0)
    assert "of the same images alone" in found.failures[0]
    assert len(found.failures) == len(found.neighbours) == 10


@pytest.mark.parametrize("keepdims", [0, 1])
def test_averages_of_tokens_are_the_same_bits_alone_and_in_a_batch(keepdims):
    """A last digit would flip roundings of the int8 products behind it: LSPT over a ViT without class token."""
    tokens = np.random.default_rng(0).standard_normal((8, 16, 64), dtype=np.float32)
    shape = ["batch", 1, 64] if keepdims else ["batch", 64]
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="mean", keepdims=keepdims)],
        "average",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array([1]), "axes")],
    )
    opset = [helper.make_opsetid("", 20)]
    model = onnx_ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))
    _average_by_product(model)
    written = onnx_ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    (together,) = session.run(None, {"x": tokens})
    alone = np.concatenate([session.run(None, {"x": tokens[row : row + 1]})[0] for row in range(8)])
    assert np.array_equal(together, alone)
    np.testing.assert_allclose(together, tokens.mean(axis=1, keepdims=bool(keepdims)), atol=1e-6)
