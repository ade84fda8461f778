"""TensorRT plans: the typed ONNX file, compiled for the GPU of this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from prompttune.errors import UsageError
from prompttune.export.formats.base import BuildRequest, Built, Format, Settings
from prompttune.export.formats.onnx import write_onnx
from prompttune.export.runtimes.tensorrt import PLAN_FILE
from prompttune.export.trt.compatibility import gpu_record
from prompttune.export.trt.library import require_cuda, require_tensorrt
from prompttune.export.trt.options import TensorRTOptions
from prompttune.export.trt.profile import axis_ranges, dynamic_axes, input_shapes, needed_sizes
from prompttune.export.trt.progress import bar


class TensorRTFormat(Format):
    """``model.plan``, including the weights. It runs on the kind of GPU and the TensorRT version that built it."""

    name = "trt"
    default_quantization = "static"
    default_device = "cuda"

    def check(self, settings: Settings) -> None:
        """See :meth:`Format.check`.

        Raises:
            MissingExtraError: TensorRT is not installed.
            UsageError: TensorRT does not support a setting, or the device is not a GPU.
            EngineError: this machine does not have a GPU.
        """
        TensorRTOptions.parse(settings.options)
        if settings.quantization == "dynamic":
            raise UsageError("TensorRT only supports int8 with fixed scales: choose the quantization static")
        require_tensorrt()
        require_cuda(settings.target, "building a TensorRT plan")

    def build(self, request: BuildRequest, folder: Path) -> Built:
        """See :meth:`Format.build`."""
        settings = request.settings
        options = TensorRTOptions.parse(settings.options)
        version = require_tensorrt()
        index = require_cuda(settings.target, "building a TensorRT plan")
        # Imports TensorRT, which is known to be installed.
        from prompttune.export.trt.builder import build_plan

        with tempfile.TemporaryDirectory(prefix=".typed.", dir=folder) as temporary:
            typed = write_onnx(request, Path(temporary), symmetric=True)
            needed = needed_sizes(request.model.state_layout(), request.states)
            ranges = axis_ranges(typed.inputs, needed, settings.axes)
            shapes = {spec.name: input_shapes(spec, ranges) for spec in typed.inputs if dynamic_axes([spec])}
            with torch.cuda.device(index):
                build_plan(
                    Path(temporary) / typed.files[0],
                    folder / PLAN_FILE,
                    shapes,
                    options,
                    tf32=settings.precision != "fp32",
                    on_progress=lambda share: request.on_stage(f"building the TensorRT plan {bar(share)}"),
                )
        details = {
            "tensorrt": version,
            **gpu_record(index),
            "profile": {axis: list(sizes) for axis, sizes in ranges.items()},
            **options.to_dict(),
        }
        return Built(typed.inputs, typed.outputs, [PLAN_FILE], opset=typed.opset, details=details)
