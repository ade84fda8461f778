"""What NVIDIA's builder does with a graph, a profile, a callback and a damaged file, and the format ``trt-rtx``."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import EngineError, UsageError
from prompttune.export import EngineFolder
from prompttune.export.formats import FORMATS, ExportSettings
from prompttune.export.formats import tensorrt_builder as builder
from prompttune.export.formats.tensorrt_options import COMPUTE_CAPABILITIES, TensorRTOptions
from prompttune.export.layout import TensorSpec
from prompttune.export.runtimes.tensorrt_library import TENSORRT_RTX, error_log, require_tensorrt
from prompttune.export.runtimes.tensorrt_plan import TensorRTPlan
from tests.engines import build_request, checkpoint
from tests.tensorrt_rtx import MAGIC, build

WIDTH = 32
SHAPES = {"image": ((1, WIDTH), (2, WIDTH), (4, WIDTH))}
INPUTS = [TensorSpec("image", "float32", ("batch", WIDTH))]
OUTPUTS = [TensorSpec("logits", "float32", ("batch", WIDTH))]


def product(folder, operator="Relu", external=False):
    """An ONNX file with a product and another operator."""
    path = folder / "model.onnx"
    weights = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "weights")
    nodes = [
        helper.make_node("MatMul", ["image", "weights"], ["product"]),
        helper.make_node(operator, ["product"], ["logits"], "activation"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("image", "logits")]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", ends[:1], ends[1:], [weights]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, path, save_as_external_data=external, location="model.onnx.data", size_threshold=0)
    return path


def test_plan_is_built_and_progress_rises_to_1(tmp_path):
    shares = build(product(tmp_path), tmp_path / "plan", SHAPES)
    assert (tmp_path / "plan").read_bytes().startswith(MAGIC)
    assert shares == sorted(set(shares))
    assert len(shares) > 3
    assert shares[-1] == 1


@pytest.mark.parametrize("named", [*COMPUTE_CAPABILITIES, ("8.6", "8.9"), ()], ids=str)
def test_every_compute_capability_that_is_offered_builds(tmp_path, named):
    build(product(tmp_path), tmp_path / "plan", SHAPES, compute_capability=named)
    assert (tmp_path / "plan").read_bytes().startswith(MAGIC)


def unknown_operator(path):
    product(path.parent, "Unheard")


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def weights_gone(path):
    product(path.parent, external=True)
    (path.parent / "model.onnx.data").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unknown_operator, r"^TensorRT cannot read the model: .*Plugin not found.* \(node 'activation'\)"),
        (cut, r"^TensorRT cannot read the model: .*Failed to parse the ONNX model"),
        (weights_gone, r"^TensorRT cannot read the model: .*Failed to import initializer: weights"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path, spoil, message):
    path = product(tmp_path)
    spoil(path)
    with pytest.raises(EngineError, match=message) as problem:
        build(path, tmp_path / "plan", SHAPES)
    assert "\n" not in str(problem.value)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"image": ((1, 32), (8, 32), (4, 32))}, r"^TensorRT refuses the optimisation profile: .*image"),
        ({"image": ((1, 31), (2, 31), (4, 31))}, r"^TensorRT cannot build the plan: .*Dimension mismatch.*image"),
        ({"image": ((1,), (2,), (4,))}, r"^TensorRT cannot build the plan: .*image has 2 dimensions"),
        ({}, r"^TensorRT cannot build the plan: .*image"),
    ],
)
def test_profiles_that_do_not_fit_are_one_line(tmp_path, shapes, message):
    with pytest.raises(EngineError, match=message) as problem:
        build(product(tmp_path), tmp_path / "plan", shapes)
    assert "\n" not in str(problem.value)


def test_a_workspace_that_is_too_small_is_one_line(tmp_path):
    with pytest.raises(EngineError, match=r"^TensorRT cannot build the plan: .*workspace"):
        build(product(tmp_path), tmp_path / "plan", SHAPES, workspace=1)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ZeroDivisionError])
def test_a_callback_that_fails_ends_the_build(tmp_path, problem):
    shares = []

    def fail(share):
        shares.append(share)
        raise problem

    with pytest.raises(problem):
        build(product(tmp_path), tmp_path / "plan", SHAPES, on_progress=fail)
    assert shares == [0.0]
    assert not (tmp_path / "plan").exists()


def test_reasons_are_given_while_another_plan_is_open(tmp_path):
    """TensorRT keeps to the first log of a process as long as anything that was made with it lives."""
    library = require_tensorrt(TENSORRT_RTX)
    other = library.Runtime(error_log(library).logger)
    with pytest.raises(EngineError, match="workspace"):
        build(product(tmp_path), tmp_path / "plan", SHAPES, workspace=1)
    del other


def test_a_damaged_plan_is_told(tmp_path):
    build(product(tmp_path), tmp_path / "plan", SHAPES)
    whole = (tmp_path / "plan").read_bytes()
    library = require_tensorrt(TENSORRT_RTX)
    for damaged in (whole[:1000], b"not a plan" * 100):
        (tmp_path / "plan").write_bytes(damaged)
        with pytest.raises(EngineError, match=r"^TensorRT cannot open .*plan: .*Serialization assertion") as problem:
            TensorRTPlan(library, tmp_path / "plan", INPUTS, OUTPUTS, False)
        assert "\n" not in str(problem.value)


# ------------------------------------------------------------------------------------------------------- attention


def attention(folder):
    """An ONNX file with the operator Attention in a type that no fused kernel takes."""
    names, shape = ("query", "key", "value"), ("batch", 2, 17, 32)
    *inputs, output = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (*names, "logits"))
    node = helper.make_node("Attention", names, ["logits"], "attention")
    graph = helper.make_graph([node], "graph", inputs, [output])
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path, dict.fromkeys(names, tuple((size, *shape[1:]) for size in (1, 2, 4)))


def test_attention_is_decomposed_where_no_kernel_takes_it(monkeypatch, tmp_path):
    path, shapes = attention(tmp_path)
    build(path, tmp_path / "plan", shapes)
    assert (tmp_path / "plan").read_bytes().startswith(MAGIC)
    monkeypatch.setattr(builder, "decompose_attention", lambda *_: None)
    with pytest.raises(EngineError, match="Attention operation was not supported by a dedicated kernel"):
        build(path, tmp_path / "plan", shapes)


@pytest.mark.parametrize("name", ["trt", "trt-rtx"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_fused_attention_of_other_precisions_is_refused_by_name(name, precision):
    settings = ExportSettings(name, precision, attention="fused").resolved()
    with pytest.raises(UsageError, match=f"only has fused attention in fp16 and bf16, not for {precision}: choose one"):
        FORMATS[name]().check(settings)


def test_fused_attention_builds(tmp_path):
    options = {"compute_capability": "8.9", "optimization_level": 0}
    settings = ExportSettings("trt-rtx", "fp16", attention="fused", options=options)
    stages = []
    request = replace(build_request("sa2vp", settings), on_stage=stages.append)
    kind = FORMATS["trt-rtx"]()
    kind.check(request.settings)
    built = kind.build(request, tmp_path)
    assert (tmp_path / "model.plan").read_bytes().startswith(MAGIC)
    assert built.files == ["model.plan"]
    assert "building the TensorRT plan" in stages[-1]
    assert "100%" in stages[-1]


# ---------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timing_cache": "cache"}, "TensorRT for RTX has no timing_cache: it measures nothing while it builds"),
        ({"version_compatible": True}, "TensorRT for RTX has no version_compatible: a plan opens in the version"),
        ({"hardware_compatibility": "ampere_plus"}, "no hardware_compatibility: name compute capabilities"),
        ({"compute_capability": "9.0"}, r"capability '9\.0'; known: 8\.0, 8\.6, 8\.9, 12\.0, 12\.1$"),
        ({"compute_capability": ["8.9", "7.5"]}, r"capability '7\.5'; known: 8\.0, 8\.6, 8\.9, 12\.0, 12\.1$"),
    ],
)
def test_what_the_library_lacks_is_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message):
        FORMATS["trt-rtx"]().check(ExportSettings("trt-rtx", options=options).resolved())


def test_tensorrt_itself_takes_no_compute_capability():
    with pytest.raises(UsageError, match="TensorRT has no compute_capability: it builds for the GPU of this machine"):
        TensorRTOptions.parse({"compute_capability": "8.9"})


def run(*arguments):
    return CliRunner().invoke(cli, ["export", str(checkpoint("linear", 0)), "--format", "trt-rtx", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_a_proof_without_a_gpu_is_refused_before_the_work(tmp_path):
    told = run("--output", str(tmp_path / "engine"))
    assert told.exit_code == 2
    assert "export without the comparison (--no-parity)" in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    told = run("--output", str(tmp_path / "engine"), "--device", "cpu", "--no-parity")
    assert "runs on a GPU: give the device cuda, not cpu" in told.stderr


def test_the_command_exports_without_a_gpu(tmp_path):
    options = ["--compute-capability", "8.6", "--compute-capability", "8.9", "--optimization-level", "0"]
    folder = tmp_path / "engine"
    told = run("--output", str(folder), "--no-parity", *options, "--axis", "classes=1:2:8", "--json")
    assert told.exit_code == 0, told.output
    details = json.loads(told.stdout)["details"]
    assert {path.name for path in folder.iterdir()} == {"engine.json", "model.plan", "tasks"}
    assert (folder / "model.plan").read_bytes().startswith(MAGIC)
    assert details["compute_capability"] == "8.6, 8.9"
    assert details["tensorrt"] == require_tensorrt(TENSORRT_RTX).__version__
    assert details["profile"]["classes"] == [1, 2, 8]
    assert EngineFolder(folder).manifest.format == "trt-rtx"
    if not torch.cuda.is_available():
        assert details["layers"] is None
        with pytest.raises(EngineError, match="a plan of TensorRT for RTX needs a CUDA device and PyTorch finds none"):
            pt.Engine(folder, device="cuda")


# ------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_answers_as_pytorch(tmp_path, precision):
    if torch.cuda.get_device_capability() not in {tuple(map(int, one.split("."))) for one in COMPUTE_CAPABILITIES}:
        pytest.skip("not a GPU of TensorRT for RTX")
    runs = [checkpoint("sa2vp", number) for number in (0, 1)]
    pt.export_engine(runs, tmp_path / "engine", format=ExportSettings("trt-rtx", precision))
    manifest = EngineFolder(tmp_path / "engine").manifest
    assert manifest.parity["passed"]
    assert manifest.details["layers"]["count"] > 0
