"""Every method in every precision, with its bank and baked, through NVIDIA's builder; fp32 is in the export matrix."""

import shutil
from dataclasses import replace

import pytest

from prompttune.export.folder import ONNX_FILE
from prompttune.export.formats import Settings, find_format
from prompttune.export.quantise import quantise
from tests.engines import SHARING, build_request, exported
from tests.tensorrt_rtx import MAGIC, build_engine

BAKED = Settings("trt-rtx", "fp16", baked=True)
KINDS = [(method, Settings("trt-rtx", "bf16")) for method in SHARING]
KINDS += [(method, BAKED) for method in SHARING]
KINDS += [("sa2vp", Settings("trt-rtx", "fp16", attention="fused"))]
KINDS += [("sa2vp", Settings("trt-rtx", "int8", calibration_images=2))]


def name_of(value):
    if isinstance(value, str):
        return value
    return "-".join([value.precision, *["baked"] * value.baked, *[value.attention] * bool(value.attention)])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), KINDS, ids=name_of)
def test_nvidias_builder_takes_every_precision(method, settings, tmp_path):
    settings = replace(settings, options={"compute_capability": "8.9", "optimization_level": 0})
    stages = []
    request = replace(build_request(method, settings), on_stage=stages.append)
    kind = find_format("trt-rtx")
    kind.check(request.settings)
    built = kind.build(request, tmp_path)
    assert (tmp_path / "model.plan").read_bytes().startswith(MAGIC)
    assert built.files == ["model.plan"]
    assert [spec.name for spec in built.inputs][2:] == [] or not settings.baked
    assert "building the TensorRT plan" in stages[-1]
    assert "100%" in stages[-1]


@pytest.mark.parametrize("method", SHARING)
def test_nvidias_builder_takes_int8(method, tmp_path):
    """The graph in fp32 as the matrix has it, quantised: exporting it anew is what would take the time."""
    engine = shutil.copytree(exported(method), tmp_path / "engine")
    request = build_request(method, Settings("onnx", "int8", quantization="static"))
    quantise(request, engine, symmetric=True)
    assert (engine / ONNX_FILE).stat().st_size > 0
    build_engine(engine, tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes().startswith(MAGIC)
