"""Import of TensorRT and Torch-TensorRT, with one clear line if the library or the GPU is missing."""

from __future__ import annotations

import contextlib
import importlib
import io
from types import ModuleType

import torch

from prompttune.errors import EngineError, MissingExtraError, UsageError, first_line
from prompttune.export.runtimes.base import RuntimeOptions

INSTEAD = "or export with --format onnx, which runs on a CPU and on CUDA"


def require_tensorrt() -> str:
    """Check that TensorRT can be used; return its version.

    Raises:
        MissingExtraError: it is not installed. A folder of type stubs does not count.
        EngineError: it is installed, but its libraries do not load.
    """
    module = _import("tensorrt")
    if module is None or not hasattr(module, "Builder"):
        raise MissingExtraError("tensorrt", "tensorrt", INSTEAD)
    return str(module.__version__)


def require_torch_tensorrt() -> ModuleType:
    """Import Torch-TensorRT.

    Raises:
        MissingExtraError: it is not installed.
        EngineError: it is installed, but it or TensorRT's libraries do not load.
    """
    module = _import("torch_tensorrt")
    if module is None:
        raise MissingExtraError("torch-tensorrt", "torch-tensorrt", INSTEAD)
    return module


def _import(name: str) -> ModuleType | None:
    """A module, or None if it does not exist; its output while it fails is suppressed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(name)
    except Exception as problem:  # without libnvinfer: ImportError, OSError, or Torch-TensorRT's plain Exception
        if isinstance(problem, ModuleNotFoundError) and problem.name == name:
            return None
        raise EngineError(
            f"{name} is installed but does not load: {first_line(problem)}; "
            "install it together with the TensorRT libraries of its own version"
        ) from None


def require_cuda(device: str, what: str) -> int:
    """Check that a device is a CUDA device of this machine; return its index.

    Args:
        device: ``cuda`` or ``cuda:INDEX``.
        what: what needs the device, for the message.

    Raises:
        UsageError: the device is not a CUDA device, or its index is too large.
        EngineError: PyTorch does not find a CUDA device.
    """
    index = RuntimeOptions(device).cuda_index
    if index is None:
        raise UsageError(f"{what} needs a CUDA device: give the device cuda, not {device}")
    if not torch.cuda.is_available():
        raise EngineError(f"{what} needs a CUDA device and PyTorch finds none here: use a GPU host, {INSTEAD}")
    if index >= torch.cuda.device_count():
        raise UsageError(f"the device cuda:{index} does not exist: this machine has {torch.cuda.device_count()}")
    return index
