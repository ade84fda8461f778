"""Registry of the runtimes, and the one way to open an engine's model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from prompttune.errors import EngineError, UsageError
from prompttune.export.folder import EngineFolder, Manifest
from prompttune.export.runtimes.base import Runtime, RuntimeOptions
from prompttune.export.runtimes.choice import COMPILED, ONNXRUNTIME, OPENVINO, runtime_of
from prompttune.export.runtimes.image_cache import ImageCache
from prompttune.registry import Registry

OpenRuntime: TypeAlias = Callable[[Path, Manifest, RuntimeOptions], Runtime]
RUNTIMES: Registry[OpenRuntime] = Registry("runtime", "prompttune.runtimes", base=Runtime)
"""Runtime of each format, by the format's name."""
RUNTIMES.add("onnx", "prompttune.export.runtimes.onnxruntime:OnnxRuntime")
RUNTIMES.add("aoti", "prompttune.export.runtimes.aoti:AotiRuntime")
RUNTIMES.add("trt", "prompttune.export.runtimes.tensorrt:TensorRTRuntime")
RUNTIMES.add("trt-rtx", "prompttune.export.runtimes.tensorrt:TensorRTRTXRuntime")
RUNTIMES.add("torch-trt", "prompttune.export.runtimes.torch_tensorrt:TorchTensorRTRuntime")
ONNX_RUNTIMES: Registry[OpenRuntime] = Registry("runtime of ONNX engines", "prompttune.onnx_runtimes", base=Runtime)
"""Runtimes of the format ``onnx``, by their names in :class:`RuntimeOptions`."""
ONNX_RUNTIMES.add(ONNXRUNTIME, "prompttune.export.runtimes.onnxruntime:OnnxRuntime")
ONNX_RUNTIMES.add(OPENVINO, "prompttune.export.runtimes.openvino:OpenVinoRuntime")


def open_runtime(folder: Path, manifest: Manifest, options: RuntimeOptions | None = None) -> Runtime:
    """Open a folder's model with the runtime of its format.

    Raises:
        UsageError: the runtime does not support an option.
        EngineError: the format is unknown, or the runtime cannot open the model.
        MissingExtraError: the format or the device needs an extra that is not installed.
    """
    if manifest.format not in RUNTIMES:
        raise EngineError(f"{folder} has the format {manifest.format!r}; known: {', '.join(RUNTIMES)}")
    options = options or RuntimeOptions()
    known = ONNX_RUNTIMES if manifest.format == "onnx" else RUNTIMES
    opened = known[runtime_of(folder, manifest, options)](folder, manifest, options)
    opened.sizes = opened.sizes if opened.sizes.ranges else manifest.sizes
    opened.asks_many = manifest.asks_many
    if options.image_cache:
        return ImageCache(opened, options.image_cache << 20, options.skip_unchanged)
    if options.skip_unchanged:
        raise UsageError("--skip-unchanged compares with kept images: give --image-cache MIB as well")
    return opened


def open_checked(folder: EngineFolder, options: RuntimeOptions) -> Runtime:
    """:func:`open_runtime` of a folder whose files have their recorded digests.

    Both run at the same time for ONNX files on a CPU, which hold no code. A damaged file leaves no compiled model.

    Raises:
        EngineError: a file is damaged, or see :func:`open_runtime`.
    """
    if folder.manifest.format != "onnx" or options.cuda_index is not None:
        folder.check()
        return open_runtime(folder.path, folder.manifest, options)
    compiled = options.cache or folder.path / COMPILED
    of_others = {*options.cache.glob("*.blob")} if options.cache else set()
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(folder.check)
        try:
            return open_runtime(folder.path, folder.manifest, options)
        finally:
            if problem := checked.exception():
                for blob in {*compiled.glob("*.blob")} - of_others:
                    blob.unlink(missing_ok=True)
                raise problem
