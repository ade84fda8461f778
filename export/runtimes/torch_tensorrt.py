"""Torch-TensorRT programs."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from numpy.typing import NDArray

from prompttune.errors import EngineError, first_line
from prompttune.export.folder import Manifest
from prompttune.export.layout import bank_input
from prompttune.export.precision.casting import exact_convolutions
from prompttune.export.runtimes.base import Array, RuntimeOptions, refuse_options
from prompttune.export.runtimes.tensorrt_compatibility import check_capability
from prompttune.export.runtimes.tensorrt_library import require_cuda, require_torch_tensorrt
from prompttune.export.runtimes.tensors import TensorRuntime, as_torch

MODEL_FILE = "model.ep"


def versions(library: ModuleType) -> dict[str, str]:
    """Versions that a program is tied to, for JSON."""
    return {"torch_tensorrt": str(library.__version__), "torch": str(torch.__version__)}


class TorchTensorRTRuntime(TensorRuntime):
    """A compiled program on a GPU, without the model's own code. One call runs at a time.

    Raises:
        MissingExtraError: Torch-TensorRT is not installed.
        UsageError: the device is not a CUDA device, or an option does not apply.
        EngineError: the program belongs to other versions or another GPU, or cannot be opened.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: RuntimeOptions) -> None:
        refuse_options(options, "the format torch-trt", "threads", "provider", "cache", "cuda_graph")
        library = require_torch_tensorrt()
        index = require_cuda(options.device, "a Torch-TensorRT engine")
        check_versions(manifest.details, versions(library))
        check_capability(manifest.details, torch.cuda.get_device_capability(index))
        super().__init__(torch.device("cuda", index), f"Torch-TensorRT {library.__version__}")
        self._inputs = manifest.inputs
        self._lock = threading.Lock()
        self._exact = manifest.precision == "fp32"
        path = folder / MODEL_FILE
        try:
            # On a failure it prints a traceback before it raises; the error's own line is enough.
            with torch.cuda.device(self._device), contextlib.redirect_stderr(io.StringIO()):
                self._stream = torch.cuda.Stream()
                self._module = library.load(str(path)).module()
        except Exception as problem:  # Torch-TensorRT's errors share no base class below Exception
            raise EngineError(f"Torch-TensorRT cannot open {path}: {first_line(problem)}") from None

    def run(self, inputs: Mapping[str, NDArray[Any]], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`.

        Raises:
            EngineError: the program failed.
        """
        # An engine inside the program has one execution context, so calls take turns.
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.no_grad():
            try:
                held = {name: as_torch(one).to(self._device) for name, one in inputs.items()}
                held |= {bank_input(key): placed for key, placed in bank.items()}
                with exact_convolutions(self._exact):  # of what TensorRT left to PyTorch
                    answer = self._module(*(held[spec.name] for spec in self._inputs))
                # A compiled graph may hand out its one output in a tuple.
                (logits,) = answer if isinstance(answer, (tuple, list)) else (answer,)
                found: Array = logits.float().cpu().numpy()
            except Exception as problem:  # the engine's errors share no base class below Exception
                raise EngineError(f"the Torch-TensorRT engine failed: {first_line(problem)}") from None
            finally:
                self._stream.synchronize()
        return found


def check_versions(details: Mapping[str, Any], here: Mapping[str, str]) -> None:
    """Refuse a program of other versions.

    Raises:
        EngineError: torch or Torch-TensorRT differs from the versions that compiled the program.
    """
    for name, version in here.items():
        if details[name] != version:
            package = name.replace("_", "-")
            raise EngineError(
                f"the engine was compiled with {package} {details[name]}, here is {version}: "
                f"install {package}=={details[name]}, or export the engine again on this machine"
            )
