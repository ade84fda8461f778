"""What ONNX Runtime's TensorRT provider is told: the sizes to build for, and where to keep what it builds."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import onnxruntime as ort

from prompttune.errors import EngineError
from prompttune.export.folder import EngineFolder, Manifest
from prompttune.export.layout import (
    ASKED,
    BATCH,
    Range,
    axis_ranges,
    bind_axes,
    dynamic_axes,
    input_shapes,
)


def provider_ranges(folder: Path, manifest: Manifest) -> dict[str, Range]:
    """The range of each dynamic axis, from the tasks that the folder holds, with room for larger ones.

    Sizes are rounded up to powers of two: another range would make what was built for the former one useless.
    """
    axes = dynamic_axes(manifest.inputs)
    shapes = []
    if manifest.baked is None:
        for record in EngineFolder(folder, verify=False).scan().records.values():
            with contextlib.suppress(EngineError):  # a damaged task must not affect others
                shapes.append(bind_axes(manifest.layout, record.shapes, record.name))
    held = manifest.form.needed_for_all(shapes)
    needed = {axis: 1 << (max(held.get(axis, 1), 1) - 1).bit_length() for axis in axes if axis not in (BATCH, ASKED)}
    return axis_ranges(manifest.inputs, needed, {})


def tensorrt_settings(manifest: Manifest, ranges: Mapping[str, Range], cache: Path | None) -> dict[str, Any]:
    """Options of the provider for one engine.

    ONNX Runtime names what it keeps after the graph, not after the weights, so each engine gets a folder of its own in
    ``cache``. Timings are of use to every engine.

    Raises:
        EngineError: the folder cannot be made.
    """
    shapes = {spec.name: input_shapes(spec, ranges) for spec in manifest.inputs if dynamic_axes([spec])}
    profile = {
        f"trt_profile_{which}_shapes": ",".join(f"{name}:{'x'.join(map(str, s[i]))}" for name, s in shapes.items())
        for i, which in enumerate(("min", "opt", "max"))
    }
    place = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prompttune" / "tensorrt"
    # The GPU's compute capability is in the name that ONNX Runtime gives a file.
    parts = [*(file.sha256 for file in manifest.files.values()), ort.__version__]
    with contextlib.suppress(metadata.PackageNotFoundError):
        parts.append(metadata.version("tensorrt-cu13-libs"))
    engines = place / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    try:
        engines.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise EngineError(f"cannot keep TensorRT's engines in {place}: {problem.strerror}; name a cache") from None
    return {
        **profile,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(place),
    }
