"""NVIDIA's real parser and builder, which need no GPU: those of TensorRT for RTX, for compute capability 8.9."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prompttune.export import EngineFolder
from prompttune.export.banks import needed_sizes
from prompttune.export.folder import ONNX_FILE
from prompttune.export.formats.tensorrt_builder import build_plan
from prompttune.export.formats.tensorrt_options import TensorRTOptions
from prompttune.export.layout import Shapes, axis_ranges, dynamic_axes, input_shapes
from prompttune.export.runtimes.tensorrt_library import TENSORRT_RTX, require_tensorrt

MAGIC = b"vtrt"
"""What a plan of TensorRT for RTX begins with."""


def build(onnx_file: Path, plan_file: Path, shapes: Mapping[str, Shapes], **told: object) -> list[float]:
    """Build a plan as the format ``trt-rtx`` does; returns the progress that was told."""
    shares: list[float] = []
    given = {"optimization_level": 0, "compute_capability": "8.9", **told}
    on_progress = given.pop("on_progress", shares.append)
    options = TensorRTOptions.parse(given, TENSORRT_RTX)
    library = require_tensorrt(TENSORRT_RTX)
    build_plan(library, onnx_file, plan_file, shapes, options, tf32=False, on_progress=on_progress)
    return shares


def build_engine(engine: Path, plan_file: Path, onnx_file: Path | None = None) -> list[float]:
    """Build a plan of an engine's ONNX file, or another one, for the sizes that a plan of its tasks gets by default."""
    folder = EngineFolder(engine, verify=False)
    manifest = folder.manifest
    states = {task: folder.read_task(task).state for task in folder.tasks()}
    ranges = axis_ranges(manifest.inputs, needed_sizes(manifest.layout, states), {})
    shapes = {spec.name: input_shapes(spec, ranges) for spec in manifest.inputs if dynamic_axes([spec])}
    return build(onnx_file or engine / ONNX_FILE, plan_file, shapes)
