"""TensorRT plans."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray

from prompttune.errors import first_line
from prompttune.export.folder import Manifest
from prompttune.export.layout import bank_input
from prompttune.export.runtimes.base import Array, RuntimeOptions, refuse_options
from prompttune.export.runtimes.tensorrt_compatibility import check_capability, check_version
from prompttune.export.runtimes.tensorrt_library import TENSORRT, TENSORRT_RTX, Library, require_cuda, require_tensorrt
from prompttune.export.runtimes.tensorrt_plan import STREAMS, PlanStream, TensorRTPlan
from prompttune.export.runtimes.tensors import CAPTURE_LOCK, TensorRuntime, as_torch

PLAN_FILE = "model.plan"


class TensorRTRuntime(TensorRuntime):
    """A plan on a GPU, with the bank. A changed task is one copied row: the plan is never refitted.

    Raises:
        MissingExtraError: TensorRT is not installed.
        UsageError: the device is not a CUDA device, or an option does not apply.
        EngineError: the plan belongs to another TensorRT or GPU, or cannot be opened.
    """

    library: ClassVar[Library] = TENSORRT
    calls_at_once = STREAMS

    def __init__(self, folder: Path, manifest: Manifest, options: RuntimeOptions) -> None:
        title = self.library.title
        refuse_options(options, title, "threads", "provider", "cache")
        trt = require_tensorrt(self.library)
        index = require_cuda(options.device, f"a plan of {title}")
        details = manifest.details
        check_version(details["tensorrt"], trt.__version__, details["version_compatible"], self.library)
        check_capability(details, torch.cuda.get_device_capability(index))
        super().__init__(torch.device("cuda", index), f"{title} {trt.__version__}")
        with torch.cuda.device(self._device):
            plan = (folder / PLAN_FILE, manifest.inputs, manifest.outputs, details["version_compatible"])
            self._plan = TensorRTPlan(trt, *plan)
        self._cuda_graph = options.cuda_graph
        self._free: queue.LifoQueue[PlanStream | None] = queue.LifoQueue()  # None is made at its first use
        for _ in range(STREAMS):
            self._free.put(None)

    def run(self, inputs: Mapping[str, NDArray[Any]], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`.

        Raises:
            EngineError: TensorRT failed.
        """
        resident = {bank_input(key): placed for key, placed in bank.items()}
        stream = self._free.get()
        try:
            if stream is None:
                with CAPTURE_LOCK, torch.cuda.device(self._device):
                    stream = PlanStream(self._plan, self._device, self._cuda_graph)
            logits: Array = stream.run({name: as_torch(one) for name, one in inputs.items()}, resident).numpy()
        except RuntimeError as problem:  # CUDA's errors, lack of memory among them, and TensorRT's through pybind11
            raise self._plan.log.failure("the TensorRT engine failed", first_line(problem)) from None
        finally:
            self._free.put(stream)
        return logits


class TensorRTRTXRuntime(TensorRTRuntime):
    """A plan of TensorRT for RTX, which compiles its kernels for the GPU when they are first needed."""

    library = TENSORRT_RTX
