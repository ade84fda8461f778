"""TensorRT itself on a GPU: build, parity, swaps, mixed batches, limits, stale plans, CUDA graphs, calls at once."""

import concurrent.futures
import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch

import prompttune as pt
from prompttune.errors import EngineError
from prompttune.export import EngineFolder
from prompttune.export.banks import Place, stack_states
from prompttune.export.folder import MANIFEST, write_manifest
from prompttune.export.formats import ExportSettings
from prompttune.export.layout import bank_dtype
from prompttune.export.parity.proof import open_runner
from prompttune.export.runtimes import RuntimeOptions, StateRunner, open_runtime
from tests.engines import SHARING, checkpoint, model_of, noise, workshop

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

CUDA = RuntimeOptions("cuda")
AXES = {"batch": (1, 4, 8), "asked": (1, 1, 4)}
# Half precision and int8 round: the tolerance is on logits of models whose logits are of the order of 1.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}


@functools.cache
def built(method, precision="fp32"):
    folder = workshop() / "trt" / f"{method}-{precision}"
    settings = ExportSettings("trt", precision, device="cuda", axes=AXES)
    runs = [checkpoint(method, number) for number in (0, 1)]
    pt.export_engine(runs, folder, format=settings, parity=False)
    return folder


def runner(folder, options=CUDA):
    engine = EngineFolder(folder)
    return open_runner(engine.path, engine.manifest, {name: engine.read_task(name) for name in engine.tasks()}, options)


def expected(method, number, images):
    with torch.no_grad():
        return model_of(method, number)(torch.from_numpy(images)).logits.numpy()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("method", SHARING)
def test_plan_answers_as_pytorch(method, precision):
    engine, images = runner(built(method, precision)), noise(8)
    assert engine.description.startswith("TensorRT")
    for number in (0, 1):
        wanted = expected(method, number, images)
        for rows in (1, 3, 8):
            found = engine.logits(images[:rows], [f"task{number}"] * rows)
            assert np.abs(found[:, : number + 2] - wanted[:rows]).max() <= TOLERANCES[precision]
            assert np.isneginf(found[:, number + 2 :]).all()
    both = engine.logits(images, [["task0", "task1", "task1"]] * 8)
    for place, number in enumerate((0, 1, 1)):
        wanted = expected(method, number, images)
        assert np.abs(both[:, place, : number + 2] - wanted).max() <= TOLERANCES[precision]
        assert np.isneginf(both[:, place, number + 2 :]).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_fused_attention_answers_as_pytorch(tmp_path, precision):
    settings = ExportSettings("trt", precision, device="cuda", axes=AXES, attention="fused")
    pt.export_engine([checkpoint("sa2vp", 0)], tmp_path / "engine", format=settings, parity=False)
    images = noise(8)
    found = runner(tmp_path / "engine").logits(images, ["task0"] * 8)
    assert np.abs(found - expected("sa2vp", 0, images)).max() <= TOLERANCES[precision]


def test_manifest_has_figures_of_the_layers():
    layers = EngineFolder(built("sa2vp", "fp16")).manifest.details["layers"]
    assert layers["count"] >= sum(layers["types"].values()) > 0
    assert any("half" in one.lower() or "fp16" in one.lower() for one in layers["precisions"])


@pytest.mark.parametrize("method", SHARING)
def test_mixed_batch_equals_single_runs(method):
    engine, images = runner(built(method)), noise(8)
    tasks = ["task0", "task1"] * 4
    mixed = engine.logits(images, tasks)
    for row, task in enumerate(tasks):
        alone = engine.logits(images[row : row + 1], [task])
        classes = int(task[-1]) + 2
        assert np.abs(mixed[row, :classes] - alone[0, :classes]).max() <= TOLERANCES["fp32"]


def test_swap_leaves_nothing_behind():
    """A → B → A in the same bank row gives A's logits bit for bit, not a blend of both."""
    engine, images = EngineFolder(built("sa2vp")), noise(4)
    tasks = {name: engine.read_task(name) for name in engine.tasks()}
    runtime = open_runtime(engine.path, engine.manifest, CUDA)
    form = engine.manifest.form
    rows = form.empty({"tasks": 1, "rank": 3, "classes": 1 + 3})
    bank = {key: runtime.place(array) for key, array in rows.items()}
    answers = []
    for name, place in (("task0", Place(0, 1, 2)), ("task1", Place(0, 1, 3)), ("task0", Place(0, 1, 2))):
        form.write(rows, place, tasks[name].state)
        for key, array in rows.items():
            runtime.update(bank[key], array, form.slice_of(key, place))
        index = form.index([[place]] * 4, runtime.sizes)
        answers.append(runtime.run({"image": images, **index}, bank)[:, 0, : place.classes])
    assert np.array_equal(answers[0], answers[2])
    assert not np.array_equal(answers[0], answers[1][:, :2])
    assert np.abs(answers[1] - expected("sa2vp", 1, images)).max() <= TOLERANCES["fp32"]


def stacked(manifest, tasks):
    states = [task.state for task in tasks.values()]
    return stack_states(manifest.form, states, bank_dtype(manifest.bank_precision))


def test_engine_adds_a_task_without_a_rebuild(tmp_path):
    folder = shutil.copytree(built("sa2vp"), tmp_path / "engine")
    plan = (folder / "model.plan").read_bytes()
    engine = pt.Engine(folder, device="cuda")
    engine.add_task("late", checkpoint("sa2vp", 4))
    found = engine.logits(noise(4), "late")
    assert np.abs(found[:, :6] - expected("sa2vp", 4, noise(4))).max() <= TOLERANCES["fp32"]
    assert (folder / "model.plan").read_bytes() == plan


def test_calls_and_banks_keep_to_the_profile():
    found = runner(built("linear")).logits(noise(9), ["task0"] * 9)
    assert np.abs(found[:, :2] - expected("linear", 0, noise(9))).max() <= TOLERANCES["fp32"]
    several = runner(built("linear")).logits(noise(3), [["task0"] * 9] * 3)
    assert np.abs(several[:, 8, :2] - expected("linear", 0, noise(3))).max() <= TOLERANCES["fp32"]
    engine = EngineFolder(built("vpt-shallow"))
    states = {f"copy{number}": engine.read_task("task0").state for number in range(65)}
    with pytest.raises(EngineError, match="the axis tasks would be 65"):
        StateRunner(open_runtime(engine.path, engine.manifest, CUDA), engine.manifest, states)


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"tensorrt": "10.0.1.6"}, "built by TensorRT 10.0.1.6"),
        ({"compute_capability": "5.2"}, "compute capability 5.2"),
    ],
)
def test_stale_plan_is_refused(tmp_path, details, message):
    folder = shutil.copytree(built("linear"), tmp_path / "engine")
    manifest = EngineFolder(folder).manifest
    (folder / MANIFEST).unlink()
    write_manifest(folder, dataclasses.replace(manifest, details={**manifest.details, **details}))
    with pytest.raises(EngineError, match=message):
        runner(folder)


def test_damaged_plan_is_refused(tmp_path):
    folder = shutil.copytree(built("linear"), tmp_path / "engine")
    plan = folder / "model.plan"
    plan.write_bytes(plan.read_bytes()[:1000])
    manifest = EngineFolder(folder, verify=False).manifest
    with pytest.raises(EngineError, match="TensorRT cannot open"):
        open_runtime(folder, manifest, CUDA)


def test_cuda_graph_equals_plain_runs():
    """Also after other batch sizes, and after the bank has moved."""
    plain = runner(built("sa2vp"))
    graphs = runner(built("sa2vp"), RuntimeOptions("cuda", cuda_graph=True))
    moved = runner(built("sa2vp"), RuntimeOptions("cuda", cuda_graph=True))
    for rows in (1, 4, 1, 8, 4):
        for seed in (0, 1):
            images = noise(rows, seed)
            tasks = [f"task{row % 2}" for row in range(rows)]
            wanted = plain.logits(images, tasks)
            assert np.array_equal(graphs.logits(images, tasks), wanted)
            moved._bank = {key: placed.clone() for key, placed in moved._bank.items()}
            assert np.array_equal(moved.logits(images, tasks), wanted)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_tasks_load_while_graphs_are_captured(cuda_graph):
    engine = EngineFolder(built("sa2vp"))
    tasks = {name: engine.read_task(name) for name in engine.tasks()}
    runtime = open_runtime(engine.path, engine.manifest, RuntimeOptions("cuda", cuda_graph=cuda_graph))
    held = stacked(engine.manifest, tasks)
    bank = {key: runtime.place(array) for key, array in held.rows.items()}

    def asked(size):
        return {"image": noise(size), **held.index([[0]] * size, runtime.sizes)}

    wanted = {size: runtime.run(asked(size), bank) for size in range(1, 9)}

    def load(_):
        spare = {key: runtime.place(array) for key, array in held.rows.items()}
        for key, array in held.rows.items():
            runtime.update(spare[key], array, held.form.slice_of(key, held.places[1]))

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for _ in range(3):  # copies of the bank, so that every size is captured again
            moved = {key: placed.clone() for key, placed in bank.items()}
            loads = [threads.submit(load, None) for _ in range(8)]
            for size, answer in wanted.items():
                assert np.array_equal(runtime.run(asked(size), moved), answer)
            for one in loads:
                one.result()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_calls_at_once_do_not_mix(cuda_graph):
    engine = runner(built("sa2vp"), RuntimeOptions("cuda", cuda_graph=cuda_graph))
    calls = [(noise(1 + seed % 4, seed), [f"task{seed % 2}"] * (1 + seed % 4)) for seed in range(8)]
    wanted = [engine.logits(*call) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for found, alone in zip(threads.map(lambda call: engine.logits(*call), calls), wanted, strict=True):
                assert np.array_equal(found, alone)


def test_options_reach_tensorrt(tmp_path):
    pytest.importorskip("tensorrt_lean")  # a version compatible plan carries it
    cache = tmp_path / "timings"
    options = {"timing_cache": cache, "version_compatible": True, "hardware_compatibility": "ampere_plus"}
    settings = ExportSettings("trt", device="cuda", axes=AXES, options={**options, "workspace": 1 << 30})
    for _ in range(2):
        pt.export_engine([checkpoint("linear", 0)], tmp_path / "engine", format=settings, parity=False, overwrite=True)
        assert cache.stat().st_size > 0
    images = noise(2)
    found = runner(tmp_path / "engine").logits(images, ["task0"] * 2)
    assert np.abs(found - expected("linear", 0, images)).max() <= TOLERANCES["fp32"]


def test_int8_names_mostly_the_same_classes(tmp_path):
    settings = ExportSettings("trt", "int8", device="cuda", axes=AXES, calibration_images=8)
    pt.export_engine([checkpoint("linear", 0)], tmp_path / "engine", format=settings, parity=False)
    images = noise(8)
    found = runner(tmp_path / "engine").logits(images, ["task0"] * 8)
    wanted = expected("linear", 0, images)
    assert np.isfinite(found).all()
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= 0.75


@pytest.mark.parametrize("precision", TOLERANCES)
def test_torch_tensorrt_answers_as_pytorch(tmp_path, precision):
    pytest.importorskip("torch_tensorrt")
    settings = ExportSettings("torch-trt", precision, device="cuda", axes=AXES)
    runs = [checkpoint("sa2vp", number) for number in (0, 1)]
    pt.export_engine(runs, tmp_path / "engine", format=settings, parity=False)
    engine = runner(tmp_path / "engine")
    for rows in (1, 3, 8):
        images = noise(rows)
        found = engine.logits(images, ["task1"] * rows)
        assert np.abs(found[:, :3] - expected("sa2vp", 1, images)).max() <= TOLERANCES[precision]
    with pytest.raises(EngineError, match="axis batch is 9"):
        engine.logits(noise(9), ["task1"] * 9)
