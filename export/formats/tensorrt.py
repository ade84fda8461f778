"""TensorRT plans: the typed ONNX file, compiled for the GPU of this machine or, by TensorRT for RTX, for named ones."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch

from prompttune.errors import EngineError, UsageError
from prompttune.export.banks import needed_sizes
from prompttune.export.formats.base import BuildRequest, Built, ExportSettings, Format
from prompttune.export.formats.onnx import write_onnx
from prompttune.export.formats.tensorrt_builder import bar, build_plan
from prompttune.export.formats.tensorrt_options import TensorRTOptions
from prompttune.export.layout import axis_ranges, dynamic_axes, input_shapes
from prompttune.export.runtimes.base import RuntimeOptions
from prompttune.export.runtimes.tensorrt import PLAN_FILE
from prompttune.export.runtimes.tensorrt_compatibility import gpu_record
from prompttune.export.runtimes.tensorrt_library import (
    TENSORRT,
    TENSORRT_RTX,
    Library,
    require_cuda,
    require_lean_runtime,
    require_tensorrt,
)
from prompttune.export.runtimes.tensorrt_plan import TensorRTPlan


class TensorRTFormat(Format):
    """``model.plan``, including the weights. It runs on the kind of GPU and the TensorRT version that built it."""

    name, title = "trt", "TensorRT plan"
    options = TensorRTOptions
    default_quantization = "static"
    default_device = "cuda"
    library: ClassVar[Library] = TENSORRT

    def check(self, settings: ExportSettings) -> None:
        """See :meth:`Format.check`.

        Raises:
            MissingExtraError: TensorRT is not installed.
            UsageError: TensorRT does not support a setting, or the device is not a GPU.
            EngineError: this machine does not have a GPU, or not the lean runtime of a version compatible plan.
        """
        options = TensorRTOptions.parse(settings.options, self.library)
        if settings.quantization == "dynamic":
            raise UsageError("TensorRT only supports int8 with fixed scales: choose the quantization static")
        if settings.attention == "fused" and settings.precision not in ("fp16", "bf16"):
            raise UsageError(
                f"TensorRT only has fused attention in fp16 and bf16, not for {settings.precision}: "
                "choose one of them, or the attention explicit"
            )
        trt = require_tensorrt(self.library)
        if options.version_compatible:
            require_lean_runtime(trt.__version__)
        self._check_device(settings)

    def _check_device(self, settings: ExportSettings) -> None:
        require_cuda(settings.target, "building a TensorRT plan")

    def _target(self, settings: ExportSettings, options: TensorRTOptions) -> dict[str, Any]:  # noqa: ARG002
        """The GPUs that the plan is for, as :func:`check_capability` reads them."""
        return gpu_record(require_cuda(settings.target, "building a TensorRT plan"))

    def build(self, request: BuildRequest, folder: Path) -> Built:
        """See :meth:`Format.build`."""
        settings = request.settings
        options = TensorRTOptions.parse(settings.options, self.library)
        trt = require_tensorrt(self.library)
        here = torch.cuda.device(RuntimeOptions(settings.target).cuda_index) if torch.cuda.is_available() else None
        with tempfile.TemporaryDirectory(prefix=".typed.", dir=folder) as temporary:
            typed = write_onnx(request, Path(temporary), symmetric=True)
            needed = needed_sizes(request.model.state_layout(), request.states)
            ranges = axis_ranges(typed.inputs, needed, request.axes)
            shapes = {spec.name: input_shapes(spec, ranges) for spec in typed.inputs if dynamic_axes([spec])}
            with here or contextlib.nullcontext():
                build_plan(
                    trt,
                    Path(temporary) / typed.files[0],
                    folder / PLAN_FILE,
                    shapes,
                    options,
                    tf32=settings.precision != "fp32",
                    on_progress=lambda share: request.on_stage(f"building the TensorRT plan {bar(share)}"),
                )
                layers = None
                if here:  # no plan opens without a GPU, and one for other GPUs does not open on this one
                    with contextlib.suppress(EngineError):
                        plan = (folder / PLAN_FILE, typed.inputs, typed.outputs, options.version_compatible)
                        layers = TensorRTPlan(trt, *plan).layers()
        details = {
            "tensorrt": trt.__version__,
            "profile": {axis: list(sizes) for axis, sizes in ranges.items()},
            "layers": layers,
            **options.to_dict(),
            **self._target(settings, options),
        }
        return Built(typed.inputs, typed.outputs, [PLAN_FILE], opset=typed.opset, details=details)


class TensorRTRTXFormat(TensorRTFormat):
    """``model.plan`` of TensorRT for RTX, built without a GPU for named compute capabilities."""

    name, title = "trt-rtx", "plan of TensorRT for RTX, built without a GPU"
    library = TENSORRT_RTX

    def _check_device(self, settings: ExportSettings) -> None:
        if RuntimeOptions(settings.target).cuda_index is None:
            raise UsageError(f"a plan of TensorRT for RTX runs on a GPU: give the device cuda, not {settings.target}")

    def check_proof(self, settings: ExportSettings) -> None:  # noqa: ARG002
        """See :meth:`Format.check_proof`."""
        if not torch.cuda.is_available():
            raise UsageError(
                "a plan of TensorRT for RTX is built without a GPU but not compared with PyTorch without one: export "
                "without the comparison (--no-parity), and run `prompttune validate` where the GPU is"
            )

    def _target(self, settings: ExportSettings, options: TensorRTOptions) -> dict[str, Any]:  # noqa: ARG002
        named = options.compute_capability
        return {
            "gpu": "RTX",
            "compute_capability": ", ".join(named),
            "hardware_compatibility": "none" if named else "ampere_plus",
        }
