"""Building and running with a TensorRT that only records: every failure is noticed, every wish reaches the library."""

import contextlib
import json
import threading
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import prompttune as pt
from prompttune.errors import EngineError, UsageError
from prompttune.export.banks import BankForm, needed_sizes, stack_states
from prompttune.export.formats import ExportSettings, tensorrt
from prompttune.export.formats.tensorrt_builder import build_plan
from prompttune.export.formats.tensorrt_options import TensorRTOptions
from prompttune.export.formats.torch_tensorrt import bounded, compile_program, compile_settings, widened
from prompttune.export.graph import trace
from prompttune.export.layout import TensorSpec, axis_ranges
from prompttune.export.runtimes import tensorrt_plan as execution
from prompttune.export.runtimes.tensorrt_layers import summarise
from prompttune.export.runtimes.tensorrt_library import ErrorLog
from prompttune.export.runtimes.tensorrt_plan import TensorRTPlan
from prompttune.export.runtimes.tensors import CAPTURE_LOCK, as_torch, check_tensors, place_rows, update_rows
from prompttune.export.runtimes.torch_tensorrt import TorchTensorRTRuntime, check_versions
from tests.engines import checkpoint, model_of
from tests.fake_tensorrt import (
    CACHE_MAGIC,
    VERSION,
    Context,
    DataType,
    Flags,
    Severity,
    fake_tensorrt,
    folded_state,
    install,
)

SHAPES = {"image": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}
INPUTS = [TensorSpec("image", "float32", ("batch", 3, 8, 8)), TensorSpec("task_index", "int64", ("batch", "asked"))]

# ------------------------------------------------------------------------------------------------------ the build


def build(fake, folder, tf32=False, options=None, on_progress=lambda _: None):
    (folder / "model.onnx").touch()
    options = TensorRTOptions.parse(options or {})
    build_plan(fake, folder / "model.onnx", folder / "plan", SHAPES, options, tf32=tf32, on_progress=on_progress)


def test_builder_is_configured(tmp_path):
    fake = fake_tensorrt()
    shares = []
    build(fake, tmp_path, on_progress=shares.append)
    plain = fake.configs[-1]
    assert (tmp_path / "plan").read_bytes() == b"plan"
    assert shares == [0.0, 0.5, 1.0]
    assert fake.networks == [1 << 1]
    assert plain.profiles == [SHAPES]
    assert plain.flags == set()
    assert plain.workspace is None
    assert not hasattr(plain, "hardware_compatibility_level")
    assert plain.profiling_verbosity == "detailed"
    wishes = {"version_compatible": True, "hardware_compatibility": "ampere_plus", "workspace": 7}
    build(fake, tmp_path, True, {**wishes, "optimization_level": 1})
    other = fake.configs[-1]
    assert other.flags == {Flags.TF32, Flags.VERSION_COMPATIBLE}
    assert (other.workspace, other.builder_optimization_level, other.hardware_compatibility_level) == (7, 1, "ampere+")


def test_log_quotes_the_first_errors():
    log = ErrorLog(fake_tensorrt())
    assert str(log.failure("it failed")) == "it failed: TensorRT gave no reason"
    for number in (1, 1, 2, 3, 4):
        log.logger.log(Severity.ERROR, f"cause {number}")
        log.logger.log(Severity.WARNING, "not worth a word")
    assert str(log.failure("it failed")) == "it failed: cause 1; cause 2; cause 3 (and 1 more)"
    assert str(log.failure("it failed")) == "it failed: TensorRT gave no reason"


def test_timing_cache_is_kept(tmp_path):
    fake = fake_tensorrt()
    cache = tmp_path / "timings" / "cache"
    build(fake, tmp_path, options={"timing_cache": str(cache)})
    assert fake.configs[-1].cache.stored == b""
    assert cache.read_bytes() == CACHE_MAGIC + b"+"
    build(fake, tmp_path, options={"timing_cache": str(cache)})
    assert fake.configs[-1].cache.stored == CACHE_MAGIC + b"+"
    assert [one.name for one in cache.parent.iterdir()] == ["cache"]
    cache.write_bytes(b"somebody's only copy")
    with pytest.raises(UsageError, match="is not a timing cache of this TensorRT and GPU"):
        build(fake, tmp_path, options={"timing_cache": str(cache)})
    assert cache.read_bytes() == b"somebody's only copy"


def test_export_leaves_the_plan_alone_and_records_where_it_runs(monkeypatch, tmp_path):
    gpu = {"gpu": "a GPU", "compute_capability": "9.0"}
    # Not torch.cuda itself: the ONNX exporter would believe it.
    monkeypatch.setattr(tensorrt, "require_cuda", lambda *_: 0)
    monkeypatch.setattr(tensorrt, "gpu_record", lambda _: gpu)
    cuda = types.SimpleNamespace(device=lambda _: contextlib.nullcontext(), is_available=lambda: True)
    monkeypatch.setattr(tensorrt, "TensorRTPlan", lambda *_: types.SimpleNamespace(layers=lambda: {"count": 7}))
    monkeypatch.setattr(tensorrt, "torch", types.SimpleNamespace(cuda=cuda))
    fake = install(monkeypatch, fake_tensorrt())
    stages = []
    settings = ExportSettings("trt", device="cuda", axes={"batch": (1, 2, 4)}, options={"optimization_level": 2})
    runs = [checkpoint("linear", 0), checkpoint("linear", 1)]
    engine = pt.export_engine(runs, tmp_path / "engine", format=settings, parity=False, on_stage=stages.append)
    assert {one.name for one in engine.path.iterdir()} == {"engine.json", "model.plan", "tasks"}
    assert fake.onnx_files == [{"model.onnx", "model.onnx.data"}]
    details = engine.manifest.details
    assert details["tensorrt"] == VERSION
    assert details["layers"] == {"count": 7}
    assert (details["gpu"], details["compute_capability"]) == ("a GPU", "9.0")
    calls = {"batch": [1, 2, 4], "asked": [1, 1, 32], "chosen": [1, 6, 4096], "width": [1, 3, 256]}
    assert details["profile"] == {**calls, "classes": [1, 6, 4096]}
    assert fake.configs[0].profiles[0]["bank.head.bias"] == ((1,), (6,), (4096,))
    assert fake.configs[0].profiles[0]["class_index"] == ((1, 1, 1), (2, 1, 3), (4, 32, 256))
    assert fake.configs[0].flags == set()
    assert any("building the TensorRT plan" in one and "50%" in one for one in stages)


# -------------------------------------------------------------------------------------------------------- the run


def test_tensors_keep_their_bits():
    rows = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    assert as_torch(rows).dtype == torch.bfloat16
    assert as_torch(rows).float().tolist() == [[0, 1, 2], [3, 4, 5]]
    frozen = np.ones(3, np.float32)
    frozen.flags.writeable = False
    assert as_torch(frozen).tolist() == [1, 1, 1]
    assert as_torch(np.ones((2, 3), np.float32).T).is_contiguous()


def test_loads_wait_for_a_capture_and_fail_in_one_line(monkeypatch):
    done = threading.Event()
    stream = types.SimpleNamespace(synchronize=done.set)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    rows, device = np.ones((2, 3), np.float32), torch.device("cpu")
    placed = place_rows(np.zeros((2, 3), np.float32), device)
    for load in (lambda: place_rows(rows, device), lambda: update_rows(placed, rows, slice(1, 2))):
        done.clear()
        with CAPTURE_LOCK:
            thread = threading.Thread(target=load)
            thread.start()
            assert not done.wait(0.05)
        thread.join()
        assert done.is_set()
    assert placed.tolist() == [[0, 0, 0], [1, 1, 1]]

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    stream.synchronize = fails
    for load in (lambda: place_rows(rows, device), lambda: update_rows(placed, rows, slice(1, 2))):
        with pytest.raises(EngineError, match=r"^cannot load a task to cpu: CUDA out of memory\.$"):
            load()


def test_tensors_that_tensorrt_would_misread_are_refused():
    whole = torch.zeros(256, 2)[:, 0]
    with pytest.raises(EngineError, match="must be contiguous"):
        check_tensors({"image": whole}, {"image": torch.float32})
    room = torch.zeros(300)
    shifted = room[1:] if room.data_ptr() % 256 == 0 else room
    with pytest.raises(EngineError, match="multiple of 256 bytes"):
        check_tensors({"image": shifted}, {"image": torch.float32})
    with pytest.raises(EngineError, match=r"task_index is torch\.int32, the engine takes torch\.int64"):
        check_tensors({"task_index": torch.zeros(1, dtype=torch.int32)}, {"task_index": torch.int64})


LAYERS = {
    "json": json.dumps(
        {
            "Layers": [
                {"Name": "_gemm_mha_v2_myl0_3", "LayerType": "kgen", "Outputs": [{"Format/Datatype": "Half"}]},
                {"Name": "norm", "LayerType": "kgen", "Outputs": [{"Datatype": "FP32", "Format": "Row major linear"}]},
                {"Name": "head", "LayerType": "gemm", "Outputs": []},
            ]
        }
    )
}
"""As the engine inspector of TensorRT 10 (combined names) and of 11 writes them."""


class FakeEngine:
    """An opened plan with image, task_index and logits."""

    def __init__(self, context, **dtypes):
        self.context = context
        self.dtypes = {"image": DataType.FLOAT, "task_index": DataType.INT64, "logits": DataType.FLOAT, **dtypes}
        self.num_io_tensors = len(self.dtypes)

    def get_tensor_name(self, index):
        return list(self.dtypes)[index]

    def get_tensor_mode(self, name):
        return "output" if name == "logits" else "input"

    def get_tensor_dtype(self, name):
        return self.dtypes[name]

    def create_execution_context(self):
        return self.context

    def create_engine_inspector(self):
        return types.SimpleNamespace(get_engine_information=lambda form: LAYERS[form])


OUTPUTS = [TensorSpec("logits", "float32", ("batch", "asked", "width"))]
STREAM = types.SimpleNamespace(cuda_stream=5, device=torch.device("cpu"), synchronize=lambda: None)


def opened(tmp_path, engine, version_compatible=False):
    fake = fake_tensorrt(engine=engine)
    (tmp_path / "model.plan").write_bytes(b"plan")
    return fake, TensorRTPlan(fake, tmp_path / "model.plan", INPUTS, OUTPUTS, version_compatible)


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("", None),
        ("profile", "cannot make an execution context"),
        ("shape", r"refuses the shape \[2, 3, 8, 8\] of image"),
        ("address of task_index", "refuses the address of task_index"),
        ("address of logits", "refuses the address of logits"),
        ("inference", "TensorRT lacks image"),
        ("run", "failed to run"),
    ],
)
def test_every_refusal_is_noticed(monkeypatch, tmp_path, refuses, message):
    context = Context((2, 1, 7), refuses)
    fake, plan = opened(tmp_path, FakeEngine(context), version_compatible=True)
    assert fake.runtime.engine_host_code_allowed
    monkeypatch.setattr(execution, "check_tensors", lambda *_: None)  # host memory is aligned to less
    inputs = {"image": torch.zeros(2, 3, 8, 8), "task_index": torch.zeros(2, 1, dtype=torch.int64)}
    with contextlib.nullcontext() if message is None else pytest.raises(EngineError, match=message):
        session = execution.Session(plan, STREAM)
        logits = session.bind(inputs)
        session.enqueue()
        assert context.shapes == {"image": (2, 3, 8, 8), "task_index": (2, 1)}
        assert context.addresses == {name: one.data_ptr() for name, one in (*inputs.items(), ("logits", logits))}
        assert (logits.shape, logits.dtype, context.runs) == ((2, 1, 7), torch.float32, 1)


def test_plans_that_do_not_open_or_fit_are_refused(tmp_path):
    with pytest.raises(EngineError, match=r"TensorRT cannot open .*model\.plan: TensorRT gave no reason"):
        opened(tmp_path, None)
    with pytest.raises(EngineError, match=r"image is DataType\.HALF, declared was torch\.float32"):
        opened(tmp_path, FakeEngine(None, image=DataType.HALF))
    with pytest.raises(EngineError, match="not the declared ones"):
        opened(tmp_path, FakeEngine(None, more=DataType.HALF))


def test_layers_become_a_few_figures(tmp_path):
    _, plan = opened(tmp_path, FakeEngine(None))
    assert plan.layers() == {
        "count": 3,
        "types": {"kgen": 2, "gemm": 1},
        "precisions": {"Half": 1, "FP32": 1},
        "fused_attention": 1,
    }
    names = json.dumps({"Layers": ["_gemm_mha_v2_myl0_3", "norm"]})  # of a plan without details
    assert summarise(names) == {"count": 2, "types": {}, "precisions": {}, "fused_attention": 1}


# ----------------------------------------------------------------------------------------------------- torch-trt


@pytest.mark.slow
def test_program_is_captured_with_bounds():
    model = model_of("sa2vp", 0)
    traced = trace(model)
    state = folded_state(model)
    stacked = stack_states(BankForm(model.state_layout()), [state])
    needed = needed_sizes(model.state_layout(), {"a": state})
    ranges = widened(axis_ranges(traced.inputs, needed, {"batch": (2, 2, 2), "asked": (1, 1, 3)}))
    assert ranges["rank"] == (1, 2, 32)
    program = bounded(traced.program, traced.inputs, ranges, "cpu")
    bounds = sorted((int(one.lower), int(one.upper)) for one in program.range_constraints.values())
    assert bounds == [(1, 3), (1, 32), (1, 64), (1, 256), (1, 4096), (1, 4096)]
    names = [node.name for node in program.graph.nodes if node.op == "placeholder" and node.name.startswith("inputs")]
    assert len(names) == len(traced.inputs)
    rows = {f"bank.{key}": value for key, value in stacked.rows.items()}
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32)
    given = {"image": images, **stacked.index([[0, 0]] * 2), **rows}
    with torch.no_grad():
        found = program.module()(*(torch.from_numpy(given[spec.name]) for spec in traced.inputs))
        for number in range(2):
            assert torch.allclose(found[:, number, :2], model(torch.from_numpy(images)).logits, atol=1e-5)


def test_compile_settings_follow_the_version():
    options = TensorRTOptions.parse({"workspace": 9, "timing_cache": "cache", "hardware_compatibility": "ampere_plus"})
    found = compile_settings(options, "fp32", {"use_explicit_typing": None})
    assert found["use_explicit_typing"]
    assert found["disable_tf32"]
    assert found["attn_bias_is_causal"] is False  # the masks of methods are not causal
    assert found["hardware_compatible"]
    assert (found["workspace_size"], found["timing_cache_path"]) == (9, "cache")
    newer = compile_settings(TensorRTOptions(), "bf16", {})
    assert not {"use_explicit_typing", "workspace_size", "timing_cache_path"} & newer.keys()
    assert not newer["disable_tf32"]


def torch_tensorrt(error=None):
    """A Torch-TensorRT that keeps what it is given, in ``given``, and writes an empty program."""
    library = types.SimpleNamespace(given=None)

    def compile_(program, arg_inputs=None, optimization_level=None, use_explicit_typing=False, **settings):
        if error is not None:
            raise error
        library.given = arg_inputs
        return "compiled"

    def save(module, path, output_format="", retrace=True):
        assert (module, output_format, retrace) == ("compiled", "exported_program", False)
        Path(path).touch()

    library.Input, library.save = types.SimpleNamespace, save
    library.dynamo = types.SimpleNamespace(compile=compile_)
    return library


def test_inputs_are_declared_to_torch_tensorrt(tmp_path):
    ranges = {"batch": (1, 2, 4), "asked": (1, 1, 3)}
    fixed = TensorSpec("bank.a", "bfloat16", (3, 4))
    library, path = torch_tensorrt(), tmp_path / "model.ep"
    compile_program(library, None, [*INPUTS, fixed], ranges, TensorRTOptions(), "bf16", path)
    image, index, bank = library.given
    assert (image.min_shape, image.opt_shape, image.max_shape) == SHAPES["image"]
    assert (index.name, index.dtype, index.max_shape) == ("task_index", torch.int64, (4, 3))
    assert (bank.shape, bank.dtype) == ((3, 4), torch.bfloat16)
    assert path.exists()
    failing = torch_tensorrt(RuntimeError("no converter\nfor this"))
    with pytest.raises(EngineError, match=r"^Torch-TensorRT failed: no converter$"):
        compile_program(failing, None, INPUTS, ranges, TensorRTOptions(), "fp32", path)


@pytest.mark.parametrize("given", [lambda out: out, lambda out: (out,), lambda out: [out]])
def test_output_of_a_program_may_come_in_a_tuple(monkeypatch, given):
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    seen = []
    runtime = TorchTensorRTRuntime.__new__(TorchTensorRTRuntime)
    runtime._inputs, runtime._ranges, runtime._device = INPUTS, {"batch": (1, 2, 4)}, torch.device("cpu")
    runtime._lock, runtime._exact, runtime._stream = threading.Lock(), True, STREAM

    def program(images, index):
        seen.append((index.tolist(), torch.backends.cudnn.conv.fp32_precision))
        return given(images.sum(dim=(2, 3)).half()[:, None])

    runtime._module = program
    images = np.ones((2, 3, 8, 8), np.float32)
    found = runtime.run({"image": images, "task_index": np.array([[1], [0]])}, {})
    assert (found.dtype, found.tolist()) == (np.float32, [[[64.0] * 3]] * 2)
    assert seen == [([[1], [0]], "ieee")]


def test_programs_of_other_versions_are_refused():
    here = {"torch_tensorrt": "2.14.0", "torch": "2.14.1"}
    check_versions(here, here)
    with pytest.raises(EngineError, match=r"compiled with torch-tensorrt 2\.13\.0, here is 2\.14\.0: install torch-t"):
        check_versions({**here, "torch_tensorrt": "2.13.0"}, here)
