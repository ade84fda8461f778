"""Every registered method through export, tasks added afterwards, mixed batches and swaps."""

import functools
import shutil

import numpy as np
import onnx
import pytest
import torch

import prompttune as pt
from prompttune.export import EngineFolder
from prompttune.export.folder import ONNX_FILE
from prompttune.export.formats import ExportSettings
from prompttune.export.formats.onnx_int8 import quantise
from tests.engines import BATCH_SIZES, SHARING, build_request, checkpoint, copied, exported, model_of, noise, workshop
from tests.operators import operators
from tests.tensorrt_rtx import MAGIC, build_engine

TASKS = 5
# test_vit2 has register tokens and LayerScale, no class token, and pools the mean.
# test_swin2 has windows that do not divide its maps, so that shift, padding and mask meet.
CASES = [(method, "test_vit") for method in SHARING] + [("sa2vp", "test_vit2")]
# Rotary embedding: of both pathways, beside keys that are not rotated, around shifts, and with scales of the block's.
CASES += [(method, "test_eva") for method in ("sa2vp", "e2vpt", "expres", "vqt", "ssf")]
# Elsewhere the covering set: linear is a part of sa2vp, whose graph holds all of its nodes, and dam-vp meets the layer
# norms of ConvNeXt on the ViTs. test_methods.py runs every method on every backbone.
CASES += [(method, "test_swin2") for method in ("sa2vp", "vpt-shallow", "vpt-deep", "dam-vp")]
CASES += [("sa2vp", "test_swinv2")]
CASES += [("sa2vp", "test_resnet3"), ("dam-vp", "test_resnet3"), ("sa2vp", "test_convnext4")]
# Hooks on windows, on convolutions of every stride, on depthwise ones, and beside MLPs; maps of stages; pixels.
CASES += [("ssf", "test_swin2"), ("lora", "test_resnet3"), ("adapter", "lcnet_035"), ("vpt-shallow", "test_resnet3")]
CASES += [("adaptformer", "test_swin2"), ("side", "test_convnext4")]
IN_INT8 = [(method, "test_vit") for method in ("sa2vp", "lspt", "lora", "e2vpt", "ssf")]
IN_INT8 += [("sa2vp", "test_eva"), ("sa2vp", "test_swin2"), ("sa2vp", "test_convnext4")]
"""Two pathways, a recurrence, task matrices that read what frozen ones read, prompts among the keys, scales of every
layer, rotation, windows, convolutions."""
# Of TensorRT's published support table, what a graph of ours may need. No IsNaN, Where, Loop, If, Scatter, NonZero.
# A convolution that runs twice, as under dam-vp, keeps its BatchNormalization beside it.
SUPPORTED = """
    Abs Add ArgMax AveragePool BatchNormalization Clip Concat Constant ConstantOfShape Conv Div Einsum Expand
    Gather Gelu Gemm HardSigmoid HardSwish LayerNormalization MatMul Max MaxPool Mul Neg Pad Range ReduceL2
    ReduceMean ReduceSum Relu Reshape Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose
    Unsqueeze
"""

every_case = pytest.mark.parametrize(("method", "backbone"), CASES, ids=lambda value: value)


@functools.cache
def grown(method, backbone):
    """The engine with three tasks more, of other ranks, γ and class counts than it was exported with."""
    folder = workshop() / backbone / method / "grown"
    shutil.copytree(exported(method, backbone), folder)
    engine = pt.Engine(folder)
    for number in range(2, TASKS):
        engine.add_task(f"task{number}", checkpoint(method, number, backbone), parity=number == TASKS - 1)
    return engine


def expected(method, backbone, number, images):
    """The unfolded model's logits."""
    with torch.no_grad():
        return model_of(method, number, backbone)(torch.from_numpy(images)).logits.numpy()


@every_case
def test_export_is_proven(method, backbone):
    report = EngineFolder(exported(method, backbone)).manifest.parity
    assert report["passed"]
    assert {one["batch_size"] for one in report["comparisons"]} == set(BATCH_SIZES)
    assert {one["task"] for one in report["comparisons"]} == {"task0", "task1", "mixed"}
    assert {one["reference"] for one in report["comparisons"]} == {"state", "checkpoint"}
    assert max(one["max_abs"] for one in report["comparisons"]) <= 1e-4
    assert min(one["agreement"] for one in report["comparisons"]) == 1
    assert report["mixed_vs_single"] <= 1e-5


@every_case
def test_graph_is_clean(method, backbone):
    path = exported(method, backbone) / ONNX_FILE
    assert set(operators(path)) <= set(SUPPORTED.split())
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name.removeprefix("model.") for tensor in graph.initializer}
    assert stored.isdisjoint(model_of(method, 0, backbone).task_parameters())  # tasks are inputs alone
    assert not [node.name for node in graph.node for prop in node.metadata_props if "stack_trace" in prop.key]


@every_case
def test_nvidias_builder_takes_the_graph(method, backbone, tmp_path):
    shares = build_engine(exported(method, backbone), tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes().startswith(MAGIC)
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize(("method", "backbone"), IN_INT8, ids=lambda value: value)
def test_nvidias_builder_takes_the_graph_in_int8(method, backbone, tmp_path):
    """Quantised as the format does it; exporting it anew would take the time."""
    engine = shutil.copytree(exported(method, backbone), tmp_path / "engine")
    settings = ExportSettings("onnx", "int8", quantization="static", calibration_images=4)
    quantise(build_request(method, settings, backbone), engine, symmetric=True)
    build_engine(engine, tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes().startswith(MAGIC)


@every_case
def test_tasks_added_later_answer_as_pytorch(method, backbone):
    engine = grown(method, backbone)
    images = noise(max(BATCH_SIZES))
    for number in range(TASKS):
        wanted = expected(method, backbone, number, images)
        for rows in BATCH_SIZES:
            found = engine.logits(images[:rows], f"task{number}")
            assert found.shape == (rows, number + 2)
            assert np.abs(found - wanted[:rows]).max() <= 1e-4


@every_case
def test_mixed_batch_equals_single_runs(method, backbone):
    engine = grown(method, backbone)
    names, images = [f"task{number}" for number in range(TASKS)], noise(TASKS)
    mixed = engine.logits(images, names)
    for row, name in enumerate(names):
        single = engine.logits(images[row : row + 1], name)
        assert np.abs(mixed[row, : row + 2] - single[0, : row + 2]).max() <= 1e-5
        assert np.abs(mixed[row, : row + 2] - expected(method, backbone, row, images[row : row + 1])[0]).max() <= 1e-4
        assert np.isneginf(mixed[row, row + 2 :]).all()
    # The tasks do differ: the first two classes of the same image are not the same for two tasks.
    same = engine.logits(np.repeat(images[:1], TASKS, axis=0), names)[:, :2]
    assert len(np.unique(same.round(4), axis=0)) == TASKS


@every_case
def test_several_tasks_of_an_image_equal_single_runs(method, backbone):
    engine, images = grown(method, backbone), noise(3)
    names = [f"task{number}" for number in (3, 0, 4, 0, 1)]
    several = engine.logits(images, [names])
    assert several.shape == (3, 5, TASKS + 1)
    for place, name in enumerate(names):
        classes = int(name[-1]) + 2
        single = engine.logits(images, name)
        assert np.abs(several[:, place, :classes] - single).max() <= 1e-5
        assert np.isneginf(several[:, place, classes:]).all()
    own = [["task0", "task3"], ["task3", "task1"], ["task2", "task2"]]
    for row, (asked, found) in enumerate(zip(own, engine.logits(images, own), strict=True)):
        for name, one in zip(asked, found, strict=True):
            single = engine.logits(images[row : row + 1], name)[0]
            assert np.abs(one[: len(single)] - single).max() <= 1e-5


@every_case
def test_bank_of_one_answers_as_a_bank_of_all(method, backbone, tmp_path):
    folder = copied(method, tmp_path, backbone)
    EngineFolder(folder).remove_task("task1")
    alone, images = pt.Engine(folder), noise(3)
    found = alone.logits(images, "task0")
    assert found.shape == (3, 2)
    assert np.abs(found - grown(method, backbone).logits(images, "task0")[:, :2]).max() <= 1e-5


@every_case
def test_swapping_tasks_leaves_no_trace(method, backbone):
    engine, images = grown(method, backbone), noise(3)
    first = engine.logits(images, "task0")
    other = engine.logits(images, f"task{TASKS - 1}")
    assert not np.array_equal(first[:, :2], other[:, :2])
    assert np.array_equal(first, engine.logits(images, "task0"))


@every_case
def test_adding_tasks_leaves_the_graph_alone(method, backbone):
    before, after = exported(method, backbone), grown(method, backbone).folder.path
    for name in EngineFolder(before).manifest.files:
        assert (before / name).read_bytes() == (after / name).read_bytes()
        assert (before / name).stat().st_mtime_ns == (after / name).stat().st_mtime_ns  # copytree keeps it
    assert EngineFolder(after).tasks() == [f"task{number}" for number in range(TASKS)]
    assert (before / "engine.json").read_bytes() == (after / "engine.json").read_bytes()
