"""Import of NVIDIA's libraries, with one line if a library or the GPU is missing, and TensorRT's log."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

import torch

from prompttune.errors import EngineError, MissingExtraError, UsageError, first_line
from prompttune.export.options import RuntimeOptions

if TYPE_CHECKING:
    import tensorrt as trt

_SHOWN = 3
"""Largest number of quoted errors: the first ones name the cause, later ones follow from them."""
INSTEAD = "or export with --format onnx, which runs on a CPU and on CUDA"


class TensorRT(Protocol):
    """What is used of a module that answers as ``tensorrt``, in the types of TensorRT 10.13."""

    __version__: str
    Builder: type[trt.Builder]
    BuilderFlag: type[trt.BuilderFlag]
    DataType: type[trt.DataType]
    Dims: type[trt.Dims]
    HardwareCompatibilityLevel: type[trt.HardwareCompatibilityLevel]
    ILogger: type[trt.ILogger]
    IProgressMonitor: type[trt.IProgressMonitor]
    LayerInformationFormat: type[trt.LayerInformationFormat]
    MemoryPoolType: type[trt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[trt.NetworkDefinitionCreationFlag]
    OnnxParser: type[trt.OnnxParser]
    ProfilingVerbosity: type[trt.ProfilingVerbosity]
    Runtime: type[trt.Runtime]
    TensorIOMode: type[trt.TensorIOMode]

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's libraries that build and run plans."""

    title: str
    module: str
    package: str
    """What pip calls it; the extra has the same name."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Option of :class:`TensorRTOptions` that it does not know → what to do instead."""


TENSORRT = Library(
    "TensorRT",
    "tensorrt",
    "tensorrt",
    {"compute_capability": "it builds for the GPU of this machine; export with --format trt-rtx to name others"},
)
TENSORRT_RTX = Library(
    "TensorRT for RTX",
    "tensorrt_rtx_bindings",
    "tensorrt-rtx",
    {
        "timing_cache": "it measures nothing while it builds; leave it out",
        "version_compatible": "a plan opens in the version that built it alone; leave it out",
        "hardware_compatibility": "name compute capabilities, or none for every RTX GPU since Ampere",
    },
)


def require_tensorrt(library: Library = TENSORRT) -> TensorRT:
    """The module of a library.

    Raises:
        MissingExtraError: it is not installed. A folder of type stubs does not count.
        EngineError: it is installed, but its libraries do not load.
    """
    module = _import(library.module)
    if module is None or not hasattr(module, "Builder"):
        raise MissingExtraError(library.package, library.package, INSTEAD)
    return cast(TensorRT, module)


def require_lean_runtime(version: str) -> None:
    """Check that TensorRT finds its lean runtime, which it puts into a version compatible plan.

    Raises:
        EngineError: it is not installed. TensorRT's own package does not bring it.
    """
    name = f"libnvinfer_lean.so.{version.partition('.')[0]}"
    _import("tensorrt_lean")  # loads the library from where pip put it
    try:
        ctypes.CDLL(name)
    except OSError:
        raise EngineError(
            f"version_compatible needs {name}, which is not here: pip install tensorrt-lean=={version}, "
            "or leave version_compatible out"
        ) from None


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


class ErrorLog:
    """Keeps the errors of TensorRT's log, where failures are written instead of raised; several threads may call it."""

    def __init__(self, library: TensorRT) -> None:
        self._lock = threading.Lock()
        self._errors: list[str] = []
        self.logger = _logger(library, self._keep)

    def _keep(self, error: str) -> None:
        with self._lock:
            self._errors.append(" ".join(error.split()))

    def clear(self) -> None:
        """Forget what was kept: the next failure has other causes."""
        with self._lock:
            self._errors.clear()

    def failure(self, what: str, *more: str) -> EngineError:
        """The error to raise, with the failure and its reasons in one line. The kept errors are cleared.

        Args:
            what: the failure.
            more: reasons known from elsewhere, which come first.
        """
        with self._lock:
            reasons = list(dict.fromkeys([*(" ".join(one.split()) for one in more), *self._errors]))
            self._errors.clear()
        left = f" (and {len(reasons) - _SHOWN} more)" if len(reasons) > _SHOWN else ""
        said = "; ".join(reasons[:_SHOWN]) or "TensorRT gave no reason"
        return EngineError(f"{what}: {said}{left}")


@functools.cache
def error_log(library: TensorRT) -> ErrorLog:
    """The log of a library. One for the process: TensorRT ignores another while any object with the first one lives."""
    return ErrorLog(library)


def _logger(library: TensorRT, keep: Callable[[str], None]) -> trt.ILogger:
    if not TYPE_CHECKING:
        trt = library

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                keep(msg)

    return Logger()
