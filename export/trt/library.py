"""The door to TensorRT and Torch-TensorRT: is the library here, is a GPU here, and one clear line if not."""

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
    """Check that TensorRT can be used, and return its version.

    Raises:
        MissingExtraError: it is not installed. A folder of type stubs does not count.
        EngineError: it is installed, but its libraries do not load.
    """
    module = _import("tensorrt")
    if module is None or not hasattr(module, "Builder"):
        raise MissingExtraError("tensorrt", "tensorrt", INSTEAD)
    return str(module.__version__)


def require_torch_tensorrt() -> ModuleType:
    """Torch-TensorRT, imported.

    Raises:
        MissingExtraError: it is not installed.
        EngineError: it is installed, but it or TensorRT's libraries do not load.
    """
    module = _import("torch_tensorrt")
    if module is None:
        raise MissingExtraError("torch-tensorrt", "torch-tensorrt", INSTEAD)
    return module


def _import(name: str) -> ModuleType | None:
    """A module, or None if there is none of that name; what it prints while it fails is held back."""
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
    """Check that a device is a CUDA device of this machine, and return its index.

    Args:
        device: ``cuda`` or ``cuda:INDEX``.
        what: what needs it, for the message.

    Raises:
        UsageError: it is no CUDA device, or there are fewer.
        EngineError: PyTorch finds no CUDA device at all.
    """
    index = RuntimeOptions(device).cuda_index
    if index is None:
        raise UsageError(f"{what} needs a CUDA device: give the device cuda, not {device}")
    if not torch.cuda.is_available():
        raise EngineError(f"{what} needs a CUDA device and PyTorch finds none here: use a GPU host, {INSTEAD}")
    if index >= torch.cuda.device_count():
        raise UsageError(f"there is no device cuda:{index}: this machine has {torch.cuda.device_count()}")
    return index
