"""ONNX files for ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from prompttune.backbones.base import PatchBackbone
from prompttune.errors import EngineError, MissingExtraError, UsageError
from prompttune.export.folder import IMAGE_PART, ONNX_FILE, ONNX_WEIGHTS_FILE, TASK_PART
from prompttune.export.formats.base import BuildRequest, Built, ExportSettings, Format
from prompttune.export.formats.onnx_file import FUSED_OPSET, OPSET, export_onnx
from prompttune.export.formats.onnx_int8 import calibrated, has_products, quantise
from prompttune.export.graph import trace_parts
from prompttune.export.layout import STATE
from prompttune.export.options import RUNTIMES
from prompttune.export.runtimes.choice import ONNXRUNTIME, OPENVINO, has_openvino
from prompttune.export.runtimes.onnxruntime import CPU_INT8
from prompttune.settings import setting


@dataclass(frozen=True)
class OnnxOptions:
    """Options of the format."""

    runtime: str = setting(
        "auto", "Runtime of an ONNX engine that is compared with PyTorch. auto: OpenVINO for bf16 on a CPU, else ONNX "
        "Runtime.", RUNTIMES,
    )  # fmt: skip


class OnnxFormat(Format):
    """``model.onnx`` with its weights beside it."""

    name, title = "onnx", "ONNX Runtime or OpenVINO"
    options = OnnxOptions
    splits = True

    def check(self, settings: ExportSettings) -> None:
        """See :meth:`Format.check`."""
        super().check(settings)
        if settings.precision == "int8" and settings.target != "cpu":
            raise UsageError(CPU_INT8)
        if settings.options.get("runtime") == OPENVINO:
            if settings.target != "cpu":
                raise UsageError("the runtime openvino runs on the cpu alone: give the device cpu")
            if settings.quantization == "dynamic":
                raise UsageError("OpenVINO is slow with scales of each call: give --quantization static")

    def check_proof(self, settings: ExportSettings) -> None:
        """See :meth:`Format.check_proof`."""
        runtime, on_cpu = settings.options.get("runtime", "auto"), settings.target == "cpu"
        bf16 = "bf16" in (settings.precision, settings.bank_precision) and on_cpu
        if bf16 and (runtime == ONNXRUNTIME or not has_openvino()):
            raise UsageError(
                "ONNX Runtime runs bf16 on CUDA alone, so it cannot be compared with PyTorch on the cpu: install "
                "'prompttune[openvino]', give the device cuda, export without the comparison (--no-parity), or choose "
                "fp16"
            )
        if runtime == OPENVINO and not has_openvino():
            raise MissingExtraError(OPENVINO, OPENVINO, "or give another runtime")

    def build(self, request: BuildRequest, folder: Path) -> Built:
        """See :meth:`Format.build`."""
        return write_onnx(request, folder)


def write_onnx(request: BuildRequest, folder: Path, symmetric: bool = False) -> Built:
    """Write ``model.onnx`` with the given settings, quantised if they require it.

    Args:
        request: request to build from.
        folder: output folder.
        symmetric: whether static int8 activations have the zero point 0, which TensorRT needs.

    Raises:
        EngineError: the graph cannot be exported, or not in this precision.
    """
    backbone = request.model.backbone
    # The patch embedding of a PatchBackbone stays in float32.
    convolves = not isinstance(backbone, PatchBackbone) and any(isinstance(m, nn.Conv2d) for m in backbone.modules())
    if request.settings.precision == "bf16" and convolves:
        raise EngineError(
            f"ONNX has no bfloat16 convolution at this operator set and {backbone.name} is made of them: "
            "choose fp16, or the format aoti"
        )
    if request.settings.precision == "int8":
        request = calibrated(request)
    request.on_stage("tracing and writing the graph")
    opset = FUSED_OPSET if request.settings.attention == "fused" else OPSET
    if request.settings.split:
        return _write_parts(request, folder, opset)
    traced = request.trace(probes=True)
    probes = export_onnx(traced, folder, opset)
    runtime = request.settings.options.get("runtime", "auto")
    in_float = quantise(request, folder, symmetric) if request.settings.precision == "int8" else []
    details = {"probes": probes} | ({} if runtime == "auto" else {"runtime": runtime})
    if in_float:
        details["in_float"] = in_float
    return Built(traced.inputs, traced.outputs, _files(folder), opset, details)


def _files(folder: Path) -> list[str]:
    return [name for name in (ONNX_FILE, ONNX_WEIGHTS_FILE) if (folder / name).is_file()]


def _write_parts(request: BuildRequest, folder: Path, opset: int) -> Built:
    """Write the image's part and the tasks' part, each into a folder of its own."""
    settings, files = request.settings, []
    int8 = settings.precision == "int8"
    parts = trace_parts(
        request.model, "fp32" if int8 else settings.precision, str(settings.bank_precision), request.attention
    )
    for part, traced in zip((IMAGE_PART, TASK_PART), parts, strict=True):
        (folder / part).mkdir()
        export_onnx(traced, folder / part, opset)
        if int8 and has_products(folder / part / ONNX_FILE):
            quantise(request, folder / part)
        files += [f"{part}/{name}" for name in _files(folder / part)]
    image, tasks = parts
    inputs = [*image.inputs, *(spec for spec in tasks.inputs if not spec.name.startswith(STATE))]
    return Built(inputs, tasks.outputs, files, opset, {"parts": [spec.to_dict() for spec in image.outputs]})
