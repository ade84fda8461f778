"""ONNX Runtime on a GPU: what is asked of it, shown by stand-ins on the host; and the real thing where there is one."""

import contextlib
import ctypes
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import torch

import prompttune as pt
from prompttune.errors import EngineError, MissingExtraError, UsageError
from prompttune.export import EngineFolder
from prompttune.export.formats import Settings
from prompttune.export.layout import TensorSpec
from prompttune.export.runtimes import RuntimeOptions, onnxruntime_cuda
from prompttune.export.runtimes.onnxruntime import OnnxRuntime, providers
from tests.engines import SHARING, checkpoint, exported, model_of, noise

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
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
    assert found == [(CUDA, {"device_id": 2, "enable_cuda_graph": graph}), CPU]


def test_providers_of_tensorrt(monkeypatch, tmp_path):
    available(monkeypatch, TENSORRT, CUDA)
    found = providers(RuntimeOptions("cuda", provider="tensorrt"))
    assert found == [(TENSORRT, {"device_id": 0, "trt_cuda_graph_enable": False}), (CUDA, {"device_id": 0}), CPU]
    cache = tmp_path / "a" / "cache"
    options = RuntimeOptions("cuda:1", cuda_graph=True, provider="tensorrt", cache=cache)
    (name, settings), *others = providers(options)
    assert name == TENSORRT
    assert settings == {
        "device_id": 1,
        "trt_cuda_graph_enable": True,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache),
    }
    assert "trt_fp16_enable" not in settings  # the precision is in the model's types
    assert others == [(CUDA, {"device_id": 1}), CPU]
    assert cache.is_dir()


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
    """Computes ``mean(image) + bias[task_index]`` at the bound addresses."""

    def __init__(self, names=(CUDA, CPU), bank="bank.head.bias"):
        self.names, self.bank, self.calls, self.running, self.failure = names, bank, [], 0, None

    def get_providers(self):
        return list(self.names)

    def get_inputs(self):
        return [types.SimpleNamespace(name="image", shape=["batch", 3, 64, 64])]

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options):
        assert not self.running or options.get_run_config_entry("gpu_graph_id") == "-1"
        self.running += 1
        self.calls.append((options.get_run_config_entry("gpu_graph_id"), binding))
        if self.failure:
            raise RuntimeError(self.failure)
        mean = binding.array("image").mean(axis=(1, 2, 3), dtype=np.float32)
        time.sleep(0.002)
        bias = binding.array(self.bank)[binding.array("task_index")] if self.bank else 0
        binding.array("logits")[:] = mean[:, None] + np.asarray(bias, np.float32)
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

    def open_engine(session=None, classes="classes", **options):
        session = session or Session()
        session.opened = []
        folder = exported("linear")  # before torch is changed

        def open_session(*arguments, **named):
            session.opened.append((arguments, named))
            return session

        monkeypatch.setattr(ort, "InferenceSession", open_session)
        # torch writes to the host where it would write to the device.
        monkeypatch.setattr(onnxruntime_cuda.torch, "device", lambda kind, index: real_device("cpu", index))
        manifest = types.SimpleNamespace(
            precision="fp32",
            bank_precision="fp32",
            outputs=(TensorSpec("logits", "float32", ("batch", classes)),),
        )
        runtime = OnnxRuntime(folder, manifest, RuntimeOptions("cuda", **options))
        return runtime, session

    return open_engine


real_device = torch.device


def rows(seed=0, tasks=4, classes=3, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((tasks, classes)).astype(dtype)


def answer(images, bias, index):
    return images.mean(axis=(1, 2, 3), dtype=np.float32)[:, None] + bias[index].astype(np.float32)


def test_inputs_and_outputs_are_bound_where_they_lie(opened):
    runtime, session = opened()
    bias, images, index = rows(), noise(3), np.array([2, 0, 3])
    placed = {"head.bias": runtime.place(bias)}
    found = runtime.run(images, index, placed)
    assert np.allclose(found, answer(images, bias, index))
    ((graph, binding),) = session.calls
    assert graph == "-1"
    assert binding.inputs["image"][:2] == (1, (3, 3, 64, 64))
    assert binding.inputs["task_index"][:2] == (7, (3,))
    assert binding.inputs["bank.head.bias"] == (1, (4, 3), placed["head.bias"].data_ptr())
    assert binding.outputs["logits"][:2] == (1, (3, 3))
    assert binding.synchronized == 1
    assert runtime.description.endswith(CUDA)


@pytest.mark.parametrize(("dtype", "element"), [(np.float16, 10), (ml_dtypes.bfloat16, 16)])
def test_banks_of_lower_precision_keep_their_type(opened, dtype, element):
    runtime, session = opened()
    bias, images, index = rows(dtype=dtype), noise(2), np.array([1, 2])
    found = runtime.run(images, index, {"head.bias": runtime.place(bias)})
    assert found.dtype == np.float32
    assert np.allclose(found, answer(images, bias, index))
    assert session.calls[0][1].inputs["bank.head.bias"][0] == element


def test_baked_engines_know_their_classes(opened):
    runtime, session = opened(Session(bank=None), classes=7)
    assert runtime.run(noise(2), np.array([0, 1]), {}).shape == (2, 7)
    assert set(session.calls[0][1].inputs) == {"image", "task_index"}


def test_the_session_is_asked_for_what_was_chosen(opened, tmp_path):
    _, session = opened(Session((TENSORRT, CUDA, CPU)), threads=3, provider="tensorrt", cache=tmp_path)
    (((path, settings), named),) = session.opened
    assert path == str(exported("linear") / "model.onnx")
    assert settings.intra_op_num_threads == 3
    assert named["providers"] == providers(RuntimeOptions("cuda", provider="tensorrt", cache=tmp_path))


def test_a_provider_that_fell_back_to_the_cpu_is_refused(opened):
    with pytest.raises(EngineError, match=r"^ONNX Runtime cannot use cuda: its CUDA libraries did not load$"):
        opened(Session((CPU,)))


@pytest.mark.parametrize("graph", [False, True])
def test_a_failed_call_is_one_line_and_the_next_one_runs(opened, graph):
    runtime, session = opened(cuda_graph=graph)
    placed = {"head.bias": runtime.place(rows())}
    session.failure = "out of memory\nand more"
    with pytest.raises(EngineError, match=r"^ONNX Runtime failed: out of memory$"):
        runtime.run(noise(1), np.array([0]), placed)
    session.failure, session.running = None, 0
    assert np.allclose(runtime.run(noise(1), np.array([0]), placed), answer(noise(1), rows(), [0]))


def test_a_changed_row_is_copied_alone(opened):
    runtime, session = opened(cuda_graph=True)
    bias, images = rows(), noise(2)
    host = bias.copy()
    placed = {"head.bias": runtime.place(host.copy())}
    address = placed["head.bias"].data_ptr()
    runtime.run(images, np.array([0, 1]), placed)
    host[:] = 9.0
    runtime.update(placed["head.bias"], host, 1)
    found = runtime.run(images, np.array([0, 1]), placed)
    assert np.allclose(found[0], answer(images, bias, [0, 1])[0])
    assert np.allclose(found[1], images[1].mean() + 9)
    assert placed["head.bias"].data_ptr() == address
    assert session.graphs == ["1", "1"]


# --------------------------------------------------------------------------------------------------- CUDA graphs


def test_a_batch_size_keeps_its_graph_and_its_buffers(opened):
    runtime, session = opened(cuda_graph=True)
    bias = rows()
    placed = {"head.bias": runtime.place(bias)}
    for size, seed in ((2, 0), (3, 1), (2, 2), (3, 3), (1, 4)):
        images, index = noise(size, seed), np.arange(size) + 1
        assert np.allclose(runtime.run(images, index, placed), answer(images, bias, index))
    assert session.graphs == ["1", "2", "1", "2", "3"]
    bound = [(binding.inputs, binding.outputs) for _, binding in session.calls]
    assert bound[0] == bound[2]
    assert bound[1] == bound[3]
    assert bound[0] != bound[1]


def test_a_bank_that_moved_is_captured_anew(opened):
    runtime, session = opened(cuda_graph=True)
    images, index = noise(2), np.array([0, 1])
    old, new = rows(0), rows(1, tasks=8, classes=5)
    small, large = ({"head.bias": runtime.place(bias)} for bias in (old, new))
    runtime.run(images, index, small)
    runtime.run(noise(3), np.zeros(3, np.int64), small)
    assert len(runtime._cuda._graphs) == 2
    found = runtime.run(images, index, large)
    assert found.shape == (2, 5)
    assert np.allclose(found, answer(images, new, index))
    assert session.graphs == ["1", "2", "3"]
    assert [key[0] for key in runtime._cuda._graphs] == [2]  # the old bank's buffers are let go
    # A call that still holds the old bank gets a graph of its own, never the dropped number.
    assert np.allclose(runtime.run(images, index, small), answer(images, old, index))
    assert session.graphs[-1] == "4"


@pytest.mark.parametrize("graph", [False, True])
def test_calls_at_once(opened, graph):
    """With a CUDA graph calls take turns, which the stand-in insists on; without one they need not."""
    runtime, session = opened(cuda_graph=graph)
    bias = rows()
    placed, start = {"head.bias": runtime.place(bias)}, threading.Barrier(4)

    def ask(seed):
        start.wait()
        for step in range(8):
            images, index = noise(2, 10 * seed + step), np.array([seed, step % 4])
            assert np.allclose(runtime.run(images, index, placed), answer(images, bias, index))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert len(session.calls) == 32
    assert set(session.graphs) == ({"1"} if graph else {"-1"})


# --------------------------------------------------------------------------------------------------------- a GPU

on_a_gpu = pytest.mark.gpu
BOTH = pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda-graph"])
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1.5e-1}  # of logits of the order of 1; fp32 sums in another order


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
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.usefixtures("needs_cuda_provider")
def test_cuda_in_lower_precision_is_proven(precision, tmp_path):
    runs = [checkpoint("sa2vp", number) for number in (0, 1)]
    settings = Settings("onnx", precision, device="cuda")
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
        assert np.abs(found - expected("linear", 1, images)).max() <= TOLERANCES["fp32"]
    assert any((tmp_path / "cache").iterdir())
