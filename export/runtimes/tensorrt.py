"""TensorRT plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from prompttune.export.folder import Manifest
from prompttune.export.layout import bank_input
from prompttune.export.runtimes.base import Array, RuntimeOptions, refuse_options
from prompttune.export.runtimes.tensorrt_compatibility import check_capability, check_version
from prompttune.export.runtimes.tensorrt_library import TENSORRT, TENSORRT_RTX, Library, require_cuda, require_tensorrt
from prompttune.export.runtimes.tensorrt_plan import LANES, Plan, Pool
from prompttune.export.runtimes.tensors import TensorRuntime, as_torch

PLAN_FILE = "model.plan"


class TensorRTRuntime(TensorRuntime):
    """A plan on a GPU, with the bank. A changed task is one copied row: the plan is never refitted.

    Raises:
        MissingExtraError: TensorRT is not installed.
        UsageError: the device is not a CUDA device, or an option does not apply.
        EngineError: the plan belongs to another TensorRT or GPU, or cannot be opened.
    """

    library: ClassVar[Library] = TENSORRT
    calls_at_once = LANES

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
            plan = Plan(trt, folder / PLAN_FILE, manifest.inputs, manifest.outputs, details["version_compatible"])
        self._pool = Pool(plan, self._device, options.cuda_graph)

    def run(self, images: Array, task_index: NDArray[np.int64], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`.

        Raises:
            EngineError: TensorRT failed.
        """
        resident = {bank_input(key): placed for key, placed in bank.items()}
        logits: Array = self._pool.run(as_torch(images), as_torch(task_index), resident).numpy()
        return logits


class TensorRTRTXRuntime(TensorRTRuntime):
    """A plan of TensorRT for RTX, which compiles its kernels for the GPU when they are first needed."""

    library = TENSORRT_RTX
