"""ONNX Runtime on a GPU: what is asked of it, shown by stand-ins on the host; and the real thing where there is one."""

import contextlib
import ctypes
import dataclasses
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import prompttune as pt
from prompttune.errors import EngineError, MissingExtraError, UsageError
from prompttune.export import EngineFolder
from prompttune.export.banks import BankForm
from prompttune.export.formats import ExportSettings
from prompttune.export.formats.onnx import OnnxFormat
from prompttune.export.layout import declare_inputs, declare_outputs
from prompttune.export.runtimes import RuntimeOptions, onnxruntime, onnxruntime_cuda
from prompttune.export.runtimes.onnxruntime import OnnxRuntime, providers
from prompttune.export.runtimes.onnxruntime_tensorrt import provider_ranges, tensorrt_settings
from prompttune.export.runtimes.tensors import CAPTURE_LOCK
from prompttune.serve.bank import Bank
from tests.engines import SHARING, build_request, checkpoint, copied, exported, model_of, noise
from tests.segmenting import drawn_segmentation, tiny
from tests.segmenting import engine_of as segmentation_engine

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
_INT8 = "MatMulIntegerToFloat"
NUMPY = {1: np.float32, 10: np.float16, 16: ml_dtypes.bfloat16, 7: np.int64}
"""ONNX element type → numpy's."""


def available(monkeypatch, *names):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*names, CPU])


# ----------------------------------------------------------------------------------------------------- providers


def test_providers_of_a_cpu():
    assert providers(RuntimeOptions()) == [CPU]


@pytest.mark.parametrize("graph", [False, True])
def test_providers_of_cuda(monkeypatch, graph):
    available(monkeypatch, TENSORRT, CUDA)
    found = providers(RuntimeOptions("cuda:2", cuda_graph=graph))
    assert found == [(CUDA, {"device_id": 2, "use_tf32": 0, "enable_cuda_graph": graph}), CPU]


def test_providers_of_tensorrt(monkeypatch):
    available(monkeypatch, TENSORRT, CUDA)
    found = providers(RuntimeOptions("cuda:1", cuda_graph=True, provider="tensorrt"))
    # The precision is in the model's types, so no trt_fp16_enable; what TensorRT leaves to CUDA has no TF32.
    tensorrt = {"device_id": 1, "trt_cuda_graph_enable": True}
    assert found == [(TENSORRT, tensorrt), (CUDA, {"device_id": 1, "use_tf32": 0}), CPU]


def test_tensorrt_is_told_shapes_and_where_to_keep_what_it_builds(monkeypatch, tmp_path):
    folder = EngineFolder(copied("sa2vp", tmp_path))
    manifest = folder.manifest
    ranges = provider_ranges(folder.path, manifest)
    named = {axis for spec in manifest.inputs for axis in spec.shape if isinstance(axis, str)}
    assert ranges.keys() == named
    assert (ranges["batch"], ranges["tasks"][2]) == ((1, 8, 32), 64)
    found = tensorrt_settings(manifest, ranges, tmp_path / "a" / "cache")
    for place, key in enumerate(("min", "opt", "max")):
        shapes = dict(one.split(":") for one in found[f"trt_profile_{key}_shapes"].split(","))
        assert shapes.keys() == {spec.name for spec in manifest.inputs}
        assert shapes["image"] == f"{(1, 8, 32)[place]}x3x64x64"
        assert shapes["bank.head.bias"] == f"{ranges['classes'][place]}"
        assert shapes["bank.adapters.down_bias"].startswith(f"{ranges['tasks'][place]}x")
    engines = Path(found["trt_engine_cache_path"])
    assert engines.is_dir()
    assert found["trt_timing_cache_path"] == str(engines.parent) == str(tmp_path / "a" / "cache")
    assert found["trt_engine_cache_enable"] is found["trt_timing_cache_enable"] is True
    # Other weights behind the same graph: ONNX Runtime would take the one's engine for the other's.
    files = {name: dataclasses.replace(file, sha256="0" * 64) for name, file in manifest.files.items()}
    other = tensorrt_settings(dataclasses.replace(manifest, files=files), ranges, tmp_path / "a" / "cache")
    assert other["trt_engine_cache_path"] != str(engines)
    assert other["trt_timing_cache_path"] == found["trt_timing_cache_path"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    default = Path(tensorrt_settings(manifest, ranges, None)["trt_engine_cache_path"])
    assert default == tmp_path / "home" / "prompttune" / "tensorrt" / engines.name
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"cannot keep TensorRT's engines in .*file: Not a directory; name a cache$"):
        tensorrt_settings(manifest, ranges, tmp_path / "file")


def test_ranges_have_room_and_stay_as_tasks_come(tmp_path):
    """Another range would make what was built for the former one useless."""
    folder = EngineFolder(copied("linear", tmp_path))
    before = provider_ranges(folder.path, folder.manifest)
    assert (before["classes"], before["width"]) == ((1, 8, 4096), (1, 4, 256))  # of tasks of two and three classes
    folder.write_task("another", folder.read_task("task0"))
    (folder.path / "tasks" / "another" / "state.safetensors").write_bytes(b"damaged")
    assert provider_ranges(folder.path, folder.manifest) == before
    task = folder.read_task("task0")
    state = {key: np.repeat(value, 200, axis=1) for key, value in task.state.items()}
    wide = dataclasses.replace(task, labels=tuple(map(str, range(400))), state=state)
    folder.write_task("wide", wide)
    after = provider_ranges(folder.path, folder.manifest)
    assert (after["classes"], after["chosen"], after["width"]) == ((1, 512, 4096), (1, 512, 4096), (1, 512, 1024))


def test_options_are_those_that_the_provider_knows():
    """Names in ONNX Runtime 1.31.1's library of the TensorRT provider; it refuses others, and booleans like 1."""
    manifest = EngineFolder(exported("linear")).manifest
    with tempfile.TemporaryDirectory() as cache:
        found = tensorrt_settings(manifest, provider_ranges(exported("linear"), manifest), Path(cache))
    assert found.keys() == {
        "trt_profile_min_shapes",
        "trt_profile_opt_shapes",
        "trt_profile_max_shapes",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
    }
    assert {str(value) for value in found.values() if not isinstance(value, str)} == {"True"}


@pytest.mark.parametrize(
    ("options", "here", "error", "message"),
    [
        ({"provider": "tensorrt"}, [CUDA], UsageError, "belong to a GPU: give the device cuda"),
        ({"cuda_graph": True}, [CUDA], UsageError, "belong to a GPU: give the device cuda"),
        ({"cache": "x"}, [CUDA], UsageError, "belong to a GPU: give the device cuda"),
        (
            {"device": "cuda", "provider": "openvino"},
            [CUDA],
            UsageError,
            "unknown provider 'openvino'; known: tensorrt",
        ),
        ({"device": "cuda", "cache": "x"}, [CUDA], UsageError, "a cache belongs to the provider tensorrt"),
        ({"device": "cuda:a"}, [CUDA], UsageError, "unknown device 'cuda:a'; known: cpu, cuda, cuda:INDEX"),
        ({"device": "cuda"}, [], MissingExtraError, r"pip install 'prompttune\[gpu\]'; or run on the device cpu"),
        ({"device": "cuda", "provider": "tensorrt"}, [CUDA], MissingExtraError, "or leave the provider out"),
    ],
)
def test_what_does_not_go_together_is_one_line(monkeypatch, options, here, error, message):
    available(monkeypatch, *here)
    with pytest.raises(error, match=message) as problem:
        pt.Engine(exported("linear"), **options)
    assert "\n" not in str(problem.value)


# ----------------------------------------------------------------------------------------------------- stand-ins


class Binding:
    """Notes what is bound, and reads and writes the very addresses."""

    def __init__(self):
        self.inputs, self.outputs, self.synchronized = {}, {}, 0

    def bind_input(self, name, kind, index, element, shape, address):
        assert (kind, index) == ("cuda", 0)
        self.inputs[name] = (element, shape, address)

    def bind_output(self, name, kind, index, element, shape, address):
        assert (kind, index) == ("cuda", 0)
        self.outputs[name] = (element, shape, address)

    def synchronize_outputs(self):
        self.synchronized += 1

    def array(self, name):
        element, shape, address = {**self.inputs, **self.outputs}[name]
        dtype = np.dtype(NUMPY[element])
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class Session:
    """Computes ``mean(image) + bias[class_rows][class_index]`` at the bound addresses."""

    def __init__(self, names=(CUDA, CPU), bank="bank.head.bias"):
        self.names, self.bank, self.calls, self.running, self.failure = names, bank, [], 0, None
        self.threads, self.map = [], ()

    def get_providers(self):
        return list(self.names)

    def get_inputs(self):
        return [types.SimpleNamespace(name="image", shape=["batch", 3, 64, 64])]

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options):
        self.threads.append(threading.current_thread().name)
        assert not self.running or options.get_run_config_entry("gpu_graph_id") == "-1"
        self.running += 1
        self.calls.append((options.get_run_config_entry("gpu_graph_id"), binding))
        if self.failure:
            raise RuntimeError(self.failure)
        mean = binding.array("image").mean(axis=(1, 2, 3), dtype=np.float32)
        time.sleep(0.002)
        bias = np.zeros(())
        if self.bank:
            bias = binding.array(self.bank)[binding.array("class_rows")][binding.array("class_index")]  # [B, K, C]
        logits = mean[:, None, None] + np.asarray(bias, np.float32)
        binding.array("logits")[:] = logits.reshape(*logits.shape, *(1 for _ in self.map)) + np.zeros(
            self.map, np.float32
        )
        self.running -= 1

    @property
    def graphs(self):
        return [graph for graph, _ in self.calls]


@pytest.fixture
def opened(monkeypatch):
    """Opens an engine on a GPU that is the host in truth; gives the runtime and its session."""
    available(monkeypatch, TENSORRT, CUDA)
    synchronized = []
    stream = types.SimpleNamespace(synchronize=lambda: synchronized.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)

    def open_engine(session=None, classes="width", precision="fp32", **options):
        session = session or Session()
        session.opened = []
        folder = exported("linear")  # before torch is changed

        def open_session(*arguments, **named):
            session.opened.append((arguments, named))
            return session

        monkeypatch.setattr(ort, "InferenceSession", open_session)
        # torch writes to the host where it would write to the device.
        monkeypatch.setattr(onnxruntime_cuda.torch, "device", lambda kind, index: real_device("cpu", index))
        inputs = tuple(declare_inputs({"head.bias": ("classes",)} if session.bank else {}, 64))
        outputs = tuple(declare_outputs(classes, session.map))
        whole = EngineFolder(folder).manifest
        manifest = dataclasses.replace(whole, precision=precision, inputs=inputs, outputs=outputs)
        runtime = OnnxRuntime(folder, manifest, RuntimeOptions("cuda", **options))
        return runtime, session

    return open_engine


real_device = torch.device


def rows(seed=0, tasks=4, classes=3, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((tasks, classes)).astype(dtype)


def answer(images, bias, index):
    return images.mean(axis=(1, 2, 3), dtype=np.float32)[:, None] + bias[index].astype(np.float32)


def place(runtime, bias):
    """The bank of tasks [T, C] of one head's bias, placed."""
    return {"head.bias": runtime.place(bias.reshape(-1).copy())}


def call(images, index, classes=3, tasks=4):
    """Inputs of a call that asks one of four tasks about each image."""
    index = np.asarray(index, np.int64)
    given = {"image": images, "task_index": index[:, None]}
    rows = index[:, None, None] * classes + np.arange(classes)
    return {**given, "class_rows": np.arange(tasks * classes), "class_index": rows}


def run(runtime, images, index, placed, classes=3):
    """Logits [B, C] of one task for each image."""
    return runtime.run(call(images, index, classes), placed)[:, 0]


def test_inputs_and_outputs_are_bound_where_they_lie(opened):
    runtime, session = opened()
    bias, images, index = rows(), noise(3), np.array([2, 0, 3])
    placed = place(runtime, bias)
    found = run(runtime, images, index, placed)
    assert np.allclose(found, answer(images, bias, index))
    ((graph, binding),) = session.calls
    assert graph == "-1"
    assert binding.inputs["image"][:2] == (1, (3, 3, 64, 64))
    assert binding.inputs["task_index"][:2] == (7, (3, 1))
    assert binding.inputs["class_index"][:2] == (7, (3, 1, 3))
    assert binding.inputs["bank.head.bias"] == (1, (12,), placed["head.bias"].data_ptr())
    assert binding.outputs["logits"][:2] == (1, (3, 1, 3))
    assert binding.synchronized == 1
    assert runtime.description.endswith(CUDA)


@pytest.mark.parametrize(("dtype", "element"), [(np.float16, 10), (ml_dtypes.bfloat16, 16)])
def test_banks_of_lower_precision_keep_their_type(opened, dtype, element):
    runtime, session = opened()
    bias, images, index = rows(dtype=dtype), noise(2), np.array([1, 2])
    found = run(runtime, images, index, place(runtime, bias))
    assert found.dtype == np.float32
    assert np.allclose(found, answer(images, bias, index))
    assert session.calls[0][1].inputs["bank.head.bias"][0] == element


def test_baked_engines_know_their_classes(opened):
    runtime, session = opened(Session(bank=None), classes=7)
    index = np.array([[0, 1, 1], [1, 0, 0]])
    assert runtime.run({"image": noise(2), "task_index": index}, {}).shape == (2, 3, 7)
    assert set(session.calls[0][1].inputs) == {"image", "task_index"}


@pytest.mark.parametrize("graph", [False, True])
def test_a_segmentation_binds_maps(opened, graph):
    session = Session()
    session.map = (4, 5)
    runtime, _ = opened(session, cuda_graph=graph)
    bias, images, index = rows(), noise(2), np.array([1, 3])
    found = run(runtime, images, index, place(runtime, bias))
    assert session.calls[0][1].outputs["logits"][:2] == (1, (2, 1, 3, 4, 5))
    assert np.allclose(found, np.broadcast_to(answer(images, bias, index)[:, :, None, None], (2, 3, 4, 5)))


def test_a_segmentations_declared_axes_are_those_of_its_inputs():
    model = drawn_segmentation(tiny(), "linear", "pyramid")
    inputs, outputs = declare_inputs(model.state_layout(), 64), declare_outputs(size=model.head.size)
    manifest = types.SimpleNamespace(inputs=inputs, outputs=outputs)
    calls = onnxruntime_cuda.CudaCalls(None, manifest, RuntimeOptions("cuda"))
    calls.device = torch.device("cpu")
    sizes = {"batch": 3, "asked": 2, "tasks": 4, "width": 6}
    shapes = {spec.name: [sizes.get(axis, axis) for axis in spec.shape] for spec in manifest.inputs}
    tensors = {name: torch.empty(*(size if isinstance(size, int) else 2 for size in s)) for name, s in shapes.items()}
    assert calls._logits(tensors).shape == (3, 2, 6, *model.head.size)


def test_the_session_is_asked_for_what_was_chosen(opened, tmp_path):
    runtime, session = opened(Session((TENSORRT, CUDA, CPU)), threads=3, provider="tensorrt", cache=tmp_path)
    (((path, settings), named),) = session.opened
    assert path == str(exported("linear") / "model.onnx")
    assert settings.intra_op_num_threads == 3
    assert named["enable_fallback"] == 0  # or ONNX Runtime prints a failure and goes on without the provider
    (name, told), *others = named["providers"]
    assert [name, *others] == [TENSORRT, *providers(RuntimeOptions("cuda", provider="tensorrt"))[1:]]
    index = "task_index:32x4,class_rows:4096,class_index:32x4x256"
    assert told["trt_profile_max_shapes"] == f"image:32x3x64x64,{index},bank.head.bias:4096"
    assert Path(told["trt_engine_cache_path"]).parent == tmp_path
    assert runtime.description.endswith(f"{TENSORRT}, fp32 in TF32")


def test_the_tensorrt_provider_gets_no_call_and_no_bank_beyond_its_ranges(opened, tmp_path):
    runtime, session = opened(Session((TENSORRT, CUDA, CPU)), provider="tensorrt", cache=tmp_path)
    assert runtime.sizes.ranges["classes"] == (1, 8, 4096)  # two tasks of two and three classes, and padding
    bias, images, index = rows(), noise(40), np.arange(40) % 4
    given = call(images, index)
    found = runtime.logits(given.pop("image"), given, place(runtime, bias))
    assert np.allclose(found[:, 0], answer(images, bias, index))
    assert [binding.inputs["image"][1][0] for _, binding in session.calls] == [32, 8]
    with pytest.raises(EngineError, match="the axis classes would be 4097, the engine was built for 4096 at most"):
        Bank(runtime, BankForm({"head.bias": ("classes",)}), {}, capacity=65, axes={"classes": 4096})


@pytest.mark.parametrize(("precision", "override", "says"), [("fp16", "", False), ("fp32", "0", False)])
def test_tf32_is_said_where_it_runs(opened, monkeypatch, tmp_path, precision, override, says):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    session = Session((TENSORRT, CUDA, CPU))
    runtime, _ = opened(session, precision=precision, provider="tensorrt", cache=tmp_path)
    assert ("TF32" in runtime.description) == says


@pytest.mark.parametrize(
    ("found", "provider", "message"),
    [
        (
            (CPU,),
            None,
            r"model.onnx: it runs on CPU\w+, not on CUDA\w+; .*libonnxruntime_providers_.*'prompttune\[gpu\]'$",
        ),
        (
            (CUDA, CPU),
            "tensorrt",
            r"it runs on CUDA\w+, not on Tensorrt\w+; .*libonnxruntime_providers_.*'prompttune\[gpu-tensorrt\]'$",
        ),
    ],
)
def test_a_provider_that_was_left_out_is_an_error_with_its_reason(opened, tmp_path, found, provider, message):
    with pytest.raises(EngineError, match=message) as problem:
        opened(Session(found), provider=provider, cache=tmp_path if provider else None)
    assert "\n" not in str(problem.value)


def test_what_onnx_runtime_says_of_a_failure_comes_first(opened, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("[ONNXRuntimeError] : 6 : CUDA failure 35: driver version is insufficient\nmore")

    monkeypatch.setattr(onnxruntime, "_session", fail)
    message = (
        r"^ONNX Runtime cannot open .*model.onnx: .*CUDA failure 35: driver version is insufficient; .*pip install"
    )
    with pytest.raises(EngineError, match=message):
        opened()


def test_int8_is_refused_on_cuda(opened, tmp_path):
    words = r"^ONNX Runtime has no int8 on CUDA: .*choose fp16, or int8 in the format trt"
    with pytest.raises(EngineError, match=words + "; or open the engine on the cpu$"):
        opened(precision="int8")
    for quantization in ("dynamic", "static"):
        settings = ExportSettings("onnx", "int8", quantization=quantization, device="cuda")
        with pytest.raises(UsageError, match=words + "$"):
            pt.export_engine(tmp_path / "no checkpoint is looked at", tmp_path / "engine", format=settings)


@pytest.mark.parametrize(("quantization", "operators"), [("static", {"DequantizeLinear"}), ("dynamic", {_INT8})])
def test_int8_leaves_cuda_no_product_in_int8(quantization, operators, tmp_path):
    """ONNX Runtime fuses static scales into products on a CPU alone, and has the dynamic ones' operator there alone."""
    settings = ExportSettings("onnx", "int8", quantization=quantization, calibration_images=2)
    OnnxFormat().build(build_request("linear", settings.resolved()), tmp_path)
    nodes = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph.node
    kinds = {output: node.op_type for node in nodes for output in node.output}
    products = [node for node in nodes if node.op_type in ("MatMul", _INT8)]
    reached = {kinds[one] for node in products for one in node.input if kinds.get(one) == "DequantizeLinear"}
    assert operators in (reached, {node.op_type for node in products} - {"MatMul"})


@pytest.mark.parametrize("graph", [False, True])
def test_a_failed_call_is_one_line_and_the_next_one_runs(opened, graph):
    runtime, session = opened(cuda_graph=graph)
    placed = place(runtime, rows())
    session.failure = "out of memory\nand more"
    with pytest.raises(EngineError, match=r"^ONNX Runtime failed: out of memory$"):
        run(runtime, noise(1), np.array([0]), placed)
    session.failure, session.running = None, 0
    assert np.allclose(run(runtime, noise(1), np.array([0]), placed), answer(noise(1), rows(), [0]))


def test_a_changed_row_is_copied_alone(opened):
    runtime, session = opened(cuda_graph=True)
    bias, images = rows(), noise(2)
    host = bias.reshape(-1).copy()
    placed = place(runtime, bias)
    address = placed["head.bias"].data_ptr()
    run(runtime, images, np.array([0, 1]), placed)
    host[:] = 9.0
    runtime.update(placed["head.bias"], host, slice(3, 6))
    found = run(runtime, images, np.array([0, 1]), placed)
    assert np.allclose(found[0], answer(images, bias, [0, 1])[0])
    assert np.allclose(found[1], images[1].mean() + 9)
    assert placed["head.bias"].data_ptr() == address
    assert session.graphs == ["1", "1"]


# --------------------------------------------------------------------------------------------------- CUDA graphs


def test_a_batch_size_keeps_its_graph_and_its_buffers(opened):
    runtime, session = opened(cuda_graph=True)
    bias = rows()
    placed = place(runtime, bias)
    for size, seed in ((2, 0), (3, 1), (2, 2), (3, 3), (1, 4)):
        images, index = noise(size, seed), np.arange(size) + 1
        assert np.allclose(run(runtime, images, index, placed), answer(images, bias, index))
    assert session.graphs == ["1", "2", "1", "2", "3"]
    bound = [(binding.inputs, binding.outputs) for _, binding in session.calls]
    assert bound[0] == bound[2]
    assert bound[1] == bound[3]
    assert bound[0] != bound[1]


def test_a_bank_that_moved_is_captured_anew(opened):
    runtime, session = opened(cuda_graph=True)
    images, index = noise(2), np.array([0, 1])
    old, new = rows(0), rows(1, tasks=8, classes=5)
    small, large = (place(runtime, bias) for bias in (old, new))
    run(runtime, images, index, small)
    run(runtime, noise(3), np.zeros(3, np.int64), small)
    assert set(session.threads) == {"onnxruntime-cuda-graph_0"}
    assert len(runtime._cuda._graphs) == 2
    found = run(runtime, images, index, large, classes=5)
    assert found.shape == (2, 5)
    assert np.allclose(found, answer(images, new, index))
    assert session.graphs == ["1", "2", "3"]
    assert [shapes[0][0] for shapes, _ in runtime._cuda._graphs] == [2]  # the old bank's buffers are let go
    # A call that still holds the old bank gets a graph of its own, never the dropped number.
    assert np.allclose(run(runtime, images, index, small), answer(images, old, index))
    assert session.graphs[-1] == "4"


@pytest.mark.parametrize("graph", [False, True])
def test_calls_at_once(opened, graph):
    """With a CUDA graph calls take turns, which the stand-in insists on; without one they need not."""
    runtime, session = opened(cuda_graph=graph)
    bias = rows()
    placed, start = place(runtime, bias), threading.Barrier(4)

    def ask(seed):
        start.wait()
        for step in range(8):
            images, index = noise(2, 10 * seed + step), np.array([seed, step % 4])
            assert np.allclose(run(runtime, images, index, placed), answer(images, bias, index))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert len(session.calls) == 32
    assert set(session.graphs) == ({"1"} if graph else {"-1"})
    # ONNX Runtime keeps captured graphs by thread, for ever.
    assert (len(set(session.threads)) == 1) == graph


def test_a_failed_capture_is_tried_anew_under_another_number(opened):
    runtime, session = opened(cuda_graph=True)
    placed = place(runtime, rows())
    session.failure = "operation not permitted when stream is capturing"
    with pytest.raises(EngineError, match="not permitted when stream is capturing"):
        run(runtime, noise(1), np.array([0]), placed)
    session.failure, session.running = None, 0
    run(runtime, noise(1), np.array([0]), placed)
    run(runtime, noise(1), np.array([0]), placed)
    assert session.graphs == ["1", "2", "2"]


def test_graphs_are_bounded(opened, monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "_GRAPHS", 2)
    runtime, session = opened(cuda_graph=True)
    bias = rows()
    placed = place(runtime, bias)
    for size in (1, 2, 3, 2):
        images, index = noise(size, size), np.zeros(size, np.int64)
        assert np.allclose(run(runtime, images, index, placed), answer(images, bias, index))
    assert session.graphs == ["1", "2", "-1", "2"]


def test_trials_capture_no_graph(opened):
    """A task's proof runs over a bank of its own: its graphs would be kept for nothing, and push out the others."""
    runtime, session = opened(cuda_graph=True)
    served, trial = (place(runtime, rows(seed)) for seed in (0, 1))
    images, index = noise(2), np.array([0, 1])
    run(runtime, images, index, served)
    found = run(runtime.without_graphs(), images, index, trial)
    assert np.allclose(found, answer(images, rows(1), index))
    run(runtime, images, index, served)
    assert session.graphs == ["1", "-1", "1"]
    assert len(set(session.threads)) == 1


def test_an_added_task_is_proven_without_graphs(monkeypatch, tmp_path):
    engine, asked = pt.Engine(copied("linear", tmp_path)), []
    monkeypatch.setattr(engine._runtime, "without_graphs", lambda: asked.append(1) or engine._runtime)
    engine.add_task("late", checkpoint("linear", 2), save=False)
    assert asked


def test_a_capture_holds_the_lock_that_loads_take(opened):
    runtime, session = opened(cuda_graph=True)
    placed, real = place(runtime, rows()), session.run_with_iobinding
    free = []

    def watched(binding, options):
        def attempt():
            free.append(CAPTURE_LOCK.acquire(blocking=False))
            if free[-1]:
                CAPTURE_LOCK.release()

        other = threading.Thread(target=attempt)
        other.start()
        other.join()
        real(binding, options)

    session.run_with_iobinding = watched
    for _ in range(2):
        run(runtime, noise(1), np.array([0]), placed)
    assert free == [False, True]  # captured, replayed


# --------------------------------------------------------------------------------------------------------- a GPU

on_a_gpu = pytest.mark.gpu
BOTH = pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda-graph"])
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}  # of logits of the order of 1; TF32 would give 1e-3


def expected(method, number, images):
    with torch.no_grad():
        return model_of(method, number)(torch.from_numpy(images)).logits.numpy()


@pytest.fixture
def needs_cuda_provider():
    if CUDA not in ort.get_available_providers():
        pytest.skip("ONNX Runtime was installed without CUDA")


@on_a_gpu
@BOTH
@pytest.mark.parametrize("method", SHARING)
@pytest.mark.usefixtures("needs_cuda_provider")
def test_cuda_answers_as_pytorch_alone_and_mixed(method, graph):
    engine, images = pt.Engine(exported(method), device="cuda", cuda_graph=graph), noise(8)
    assert CUDA in engine.description
    wanted = [expected(method, number, images) for number in (0, 1)]
    for _ in range(3):  # a CUDA graph is captured in the first runs and replayed in later ones
        for size in (1, 8):
            for number in (0, 1):
                found = engine.logits(images[:size], f"task{number}")
                assert np.abs(found[:, : number + 2] - wanted[number][:size]).max() <= TOLERANCES["fp32"]
        mixed = engine.logits(images, ["task0", "task1"] * 4)
        for row in range(8):
            number = row % 2
            apart = np.abs(mixed[row, : number + 2] - wanted[number][row]).max()
            assert apart <= TOLERANCES["fp32"]


@on_a_gpu
@BOTH
@pytest.mark.usefixtures("needs_cuda_provider")
def test_cuda_swaps_leave_no_trace(graph):
    engine, images = pt.Engine(exported("sa2vp"), device="cuda", cuda_graph=graph), noise(4)
    engine.logits(images, "task0")  # the run in which a graph is captured
    first = engine.logits(images, "task0")
    other = engine.logits(images, "task1")
    kept = first.tobytes(), other.tobytes()
    assert not np.array_equal(first[:, :2], other[:, :2])
    assert engine.logits(images, "task0").tobytes() == kept[0]
    assert (first.tobytes(), other.tobytes()) == kept  # buffers are reused, answers are copies of them


@on_a_gpu
@BOTH
@pytest.mark.usefixtures("needs_cuda_provider")
def test_cuda_tasks_come_and_go(graph):
    engine, images = pt.Engine(exported("sa2vp"), device="cuda", cuda_graph=graph), noise(4)
    engine.logits(images, "task0")
    engine.add_task("task4", checkpoint("sa2vp", 4), save=False)  # of a larger rank: the bank moves
    engine.add_task("other", checkpoint("sa2vp", 2), save=False)  # fits: one row is copied
    for name, number in (("task4", 4), ("other", 2), ("task0", 0)):
        found = engine.logits(images, name)[:, : number + 2]
        assert np.abs(found - expected("sa2vp", number, images)).max() <= TOLERANCES["fp32"]
    engine.add_task("other", checkpoint("sa2vp", 3), replace=True, save=False)
    found = engine.logits(images, "other")[:, :5]
    assert np.abs(found - expected("sa2vp", 3, images)).max() <= TOLERANCES["fp32"]


@on_a_gpu
@pytest.mark.usefixtures("needs_cuda_provider")
def test_cuda_graphs_from_many_threads():
    """Each thread would have graphs of its own in ONNX Runtime, over memory that they share."""
    engine, start = pt.Engine(exported("sa2vp"), device="cuda", cuda_graph=True), threading.Barrier(6)

    def ask(seed):
        start.wait()
        for step in range(20):
            images, number = noise(1 + (seed + step) % 3, seed), seed % 2
            found = engine.logits(images, f"task{number}")[:, : number + 2]
            assert np.abs(found - expected("sa2vp", number, images)).max() <= TOLERANCES["fp32"]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))


@on_a_gpu
@BOTH
@pytest.mark.usefixtures("needs_cuda_provider")
def test_cuda_answers_with_maps(graph):
    folder, images = segmentation_engine("linear", "pyramid"), noise(3)
    found = pt.Engine(folder, device="cuda", cuda_graph=graph).logits(images, ["task0", "task1", "task0"])
    wanted = pt.Engine(folder).logits(images, ["task0", "task1", "task0"])
    assert found.ndim == 4
    assert np.abs(np.where(np.isfinite(wanted), found - wanted, 0)).max() <= TOLERANCES["fp32"]


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.usefixtures("needs_cuda_provider")
def test_cuda_in_lower_precision_is_proven(precision, tmp_path):
    runs = [checkpoint("sa2vp", number) for number in (0, 1)]
    settings = ExportSettings("onnx", precision, device="cuda")
    pt.export_engine(runs, tmp_path / "engine", format=settings)
    assert EngineFolder(tmp_path / "engine").manifest.parity["passed"]
    images = noise(4)
    found = pt.Engine(tmp_path / "engine", device="cuda").logits(images, "task1")
    assert np.abs(found - expected("sa2vp", 1, images)).max() <= TOLERANCES[precision]


@on_a_gpu
@pytest.mark.tensorrt
@pytest.mark.usefixtures("needs_cuda_provider")
def test_the_tensorrt_provider_answers_and_keeps_its_engine(tmp_path):
    options = {"device": "cuda", "provider": "tensorrt", "cache": tmp_path / "cache"}
    images = noise(4)
    for _ in range(2):
        engine = pt.Engine(exported("linear"), **options)
        assert TENSORRT in engine.description
        found = engine.logits(images, ["task1"] * 4)
        assert np.abs(found - expected("linear", 1, images)).max() <= 1e-3  # in TF32
    kept = {path.suffix for path in (tmp_path / "cache").rglob("*")}
    assert kept >= {".engine", ".profile", ".timing"}
