"""Interface and registry of the runtimes: run a model file, and keep banks where it can read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prompttune.errors import EngineError, UsageError
from prompttune.export.folder import Manifest
from prompttune.export.layout import BATCH, Sizes, State, bank_dtype, stack_states
from prompttune.export.layout import Array as Array
from prompttune.export.options import RuntimeOptions as RuntimeOptions
from prompttune.registry import Registry

BankArray = NDArray[Any]
"""A bank tensor on the host, in the engine's bank precision."""


class Runtime(ABC):
    """One model file, open on one device. Calls of :meth:`run` from several threads may overlap."""

    sizes = Sizes()
    """What the model takes; :func:`open_runtime` takes it from the manifest unless the runtime has set it."""
    calls_at_once: ClassVar[int] = 1
    """Calls of :meth:`run` that are worth starting at once; others wait for them."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Runtime, version and device, as text."""

    @abstractmethod
    def place(self, rows: BankArray) -> Any:
        """Place a bank tensor [T, ...] for :meth:`run`; ``rows`` stays the host's copy of it."""

    @abstractmethod
    def update(self, placed: Any, rows: BankArray, row: int) -> None:
        """Copy a changed row of the host's copy to the placed tensor, while other rows may be in use."""

    def without_graphs(self) -> Runtime:
        """The same model for calls that are not worth their own CUDA graph."""
        return self

    @abstractmethod
    def run(self, images: Array, task_index: NDArray[np.int64], bank: Mapping[str, Any]) -> Array:
        """Logits float32 [B, C].

        Args:
            images: contiguous float32, normalised [B, 3, S, S].
            task_index: [B], each within the bank, as the caller has checked.
            bank: placed tensor of each state key; empty for an engine with its bank baked in.
        """

    def logits(self, images: Array, task_index: NDArray[np.int64], bank: Mapping[str, Any]) -> Array:
        """See :meth:`run`, for any number of images: in as many calls as the model needs, the last one filled up."""
        rows = len(images)
        most = self.sizes.most(BATCH, rows)
        parts = []
        for start in range(0, rows, most):
            count = min(most, rows - start)
            held = self.sizes.holding({BATCH: count}, "a call")[BATCH]
            if held == rows:
                return self.run(images, task_index, bank)
            index = np.minimum(np.arange(start, start + held), rows - 1)
            parts.append(np.array(self.run(images[index], task_index[index], bank)[:count]))  # a buffer may be reused
        return np.concatenate(parts)


OpenRuntime: TypeAlias = Callable[[Path, Manifest, RuntimeOptions], Runtime]
RUNTIMES: Registry[OpenRuntime] = Registry("runtime", "prompttune.runtimes", base=Runtime)
"""Runtime of each format, by the format's name."""
RUNTIMES.add("onnx", "prompttune.export.runtimes.onnxruntime:OnnxRuntime")
RUNTIMES.add("aoti", "prompttune.export.runtimes.aoti:AotiRuntime")
RUNTIMES.add("trt", "prompttune.export.runtimes.tensorrt:TensorRTRuntime")
RUNTIMES.add("trt-rtx", "prompttune.export.runtimes.tensorrt:TensorRTRTXRuntime")
RUNTIMES.add("torch-trt", "prompttune.export.runtimes.torch_tensorrt:TorchTensorRTRuntime")


def open_runtime(folder: Path, manifest: Manifest, options: RuntimeOptions | None = None) -> Runtime:
    """Open a folder's model with the runtime of its format.

    Raises:
        EngineError: the format is unknown, or the runtime cannot open the model.
        MissingExtraError: the format or the device needs an extra that is not installed.
    """
    if manifest.format not in RUNTIMES:
        raise EngineError(f"{folder} has the format {manifest.format!r}; known: {', '.join(RUNTIMES)}")
    opened = RUNTIMES[manifest.format](folder, manifest, options or RuntimeOptions())
    opened.sizes = opened.sizes if opened.sizes.ranges else manifest.sizes
    return opened


def refuse_options(options: RuntimeOptions, what: str, *names: str) -> None:
    """Raise :class:`UsageError` for the options ``names``, which the runtime ``what`` does not support."""
    for name in names:
        if getattr(options, name):
            raise UsageError(f"{what} does not support {name}: leave it out")


class StateRunner:
    """Tasks of fixed states behind a runtime, for comparison with PyTorch."""

    def __init__(self, runtime: Runtime, manifest: Manifest, states: Mapping[str, State]) -> None:
        self._runtime = runtime
        self._row = {name: row for row, name in enumerate(states if manifest.baked is None else manifest.baked)}
        self._bank: dict[str, Any] = {}
        if manifest.baked is None:
            dtype = bank_dtype(manifest.bank_precision)
            stacked = stack_states(manifest.layout, states.values(), dtype, runtime.sizes)
            self._bank = {key: runtime.place(rows) for key, rows in stacked.items()}
        self.description = runtime.description

    def logits(self, images: Array, tasks: Sequence[str]) -> Array:
        """Logits [B, C] of images [B, 3, S, S], row i for ``tasks[i]``; C is the largest class count."""
        index = np.array([self._row[task] for task in tasks], dtype=np.int64)
        return self._runtime.logits(np.ascontiguousarray(images), index, self._bank)
