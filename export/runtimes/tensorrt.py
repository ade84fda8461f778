"""TensorRT plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from prompttune.errors import UsageError
from prompttune.export.folder import Manifest
from prompttune.export.layout import IMAGE, TASK_INDEX, bank_input
from prompttune.export.runtimes.base import Array, BankArray, Runtime, RuntimeOptions
from prompttune.export.runtimes.tensors import as_torch, place_rows, update_row
from prompttune.export.trt.compatibility import check_capability, check_version
from prompttune.export.trt.execution import LANES, Plan, Pool
from prompttune.export.trt.library import TENSORRT, TENSORRT_RTX, Library, require_cuda, require_tensorrt
from prompttune.export.trt.profile import check_call

PLAN_FILE = "model.plan"


class ProfiledRuntime(Runtime):
    """Shared parts of both TensorRT runtimes: a bank on a GPU, and the sizes that an engine was built for."""

    def __init__(self, manifest: Manifest, index: int, library: str) -> None:
        """``index`` is the index of the GPU, ``library`` the name and version of the runtime."""
        self._inputs = manifest.inputs
        self._ranges = manifest.sizes.ranges
        self._device = torch.device("cuda", index)
        self._description = f"{library}, {torch.cuda.get_device_name(index)}"

    @property
    def description(self) -> str:
        """See :attr:`Runtime.description`."""
        return self._description

    def place(self, rows: BankArray) -> Any:
        """See :meth:`Runtime.place`."""
        return place_rows(rows, self._device)

    def update(self, placed: Any, rows: BankArray, row: int) -> None:
        """See :meth:`Runtime.update`."""
        update_row(placed, rows, row)

    def _resident(self, images: Array, task_index: NDArray[np.int64], bank: Mapping[str, Any]) -> dict[str, Any]:
        """The bank by input name; a call outside the engine's sizes raises :class:`EngineError`."""
        resident = {bank_input(key): placed for key, placed in bank.items()}
        shapes = {name: tuple(placed.shape) for name, placed in resident.items()}
        check_call(self._inputs, self._ranges, {IMAGE: images.shape, TASK_INDEX: task_index.shape, **shapes})
        return resident


class TensorRTRuntime(ProfiledRuntime):
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
        refuse_options(options, title)
        trt = require_tensorrt(self.library)
        index = require_cuda(options.device, f"a plan of {title}")
        details = manifest.details
        check_version(details["tensorrt"], trt.__version__, details["version_compatible"], self.library)
        check_capability(details, torch.cuda.get_device_capability(index))
        super().__init__(manifest, index, f"{title} {trt.__version__}")
        with torch.cuda.device(self._device):
            plan = Plan(trt, folder / PLAN_FILE, manifest.inputs, manifest.outputs, details["version_compatible"])
        self._pool = Pool(plan, self._device, options.cuda_graph)

    def run(self, images: Array, task_index: NDArray[np.int64], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`.

        Raises:
            EngineError: the call is outside what the plan was built for, or TensorRT failed.
        """
        resident = self._resident(images, task_index, bank)
        logits: Array = self._pool.run(as_torch(images), as_torch(task_index), resident).numpy()
        return logits


class TensorRTRTXRuntime(TensorRTRuntime):
    """A plan of TensorRT for RTX, which compiles its kernels for the GPU when they are first needed."""

    library = TENSORRT_RTX


def refuse_options(options: RuntimeOptions, what: str) -> None:
    """Raise :class:`UsageError` for options that only other runtimes support."""
    for name in ("threads", "provider", "cache"):
        if getattr(options, name) is not None:
            raise UsageError(f"{what} does not support {name}: leave it out")
