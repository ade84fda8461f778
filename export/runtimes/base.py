"""Interface and registry of the runtimes: run a model file, and keep banks where it can read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prompttune.errors import UsageError
from prompttune.export.banks import Index, StackedBank, stack_states
from prompttune.export.folder import Manifest
from prompttune.export.layout import ASKED, BATCH, CLASS_ROWS, IMAGE, TASK_INDEX, Sizes, State, bank_dtype
from prompttune.export.layout import Array as Array
from prompttune.export.options import RuntimeOptions as RuntimeOptions

BankArray = NDArray[Any]
"""A bank tensor on the host, in the engine's bank precision."""


class Runtime(ABC):
    """One model file, open on one device. Calls of :meth:`run` from several threads may overlap."""

    sizes = Sizes()
    """What the model takes; :func:`open_runtime` takes it from the manifest unless the runtime has set it."""
    asks_many = True
    """Whether a call answers several tasks for an image, see :attr:`Manifest.asks_many`."""
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
    def update(self, placed: Any, rows: BankArray, changed: slice) -> None:
        """Copy changed rows of the host's copy to the placed tensor, while other rows may be in use."""

    def without_graphs(self) -> Runtime:
        """The same model for calls that are not worth their own CUDA graph."""
        return self

    @abstractmethod
    def run(self, inputs: Mapping[str, NDArray[Any]], bank: Mapping[str, Any]) -> Array:
        """Logits float32 [B, K, C], as the manifest declares them.

        Args:
            inputs: the declared inputs that are not the bank's, in their order: contiguous images, float32 and
                normalised [B, 3, S, S], and the index, within the bank, as the caller has checked.
            bank: placed tensor of each state key; empty for an engine with its bank baked in.
        """

    keeps_images = False
    """Whether the image's part runs by itself, see :meth:`image_state`."""

    def image_state(self, images: Array) -> dict[str, BankArray]:
        """What images [B, 3, S, S] come to without a task, [B, ...] by name, for :meth:`answer`."""
        raise NotImplementedError

    def answer(self, found: Mapping[str, BankArray], index: Index, bank: Mapping[str, Any]) -> Array:
        """Logits [B, K, C] of an image state, see :meth:`logits`."""
        raise NotImplementedError

    def logits(self, images: Array, index: Index, bank: Mapping[str, Any]) -> Array:
        """Logits [B, K, C] of K tasks for each image, see :meth:`run`; in as many calls as the model needs.

        Args:
            images: contiguous float32, normalised [B, 3, S, S].
            index: see :meth:`prompttune.export.banks.BankForm.index`.
            bank: see :meth:`run`.
        """
        rows, asked = index[TASK_INDEX].shape
        if not self.asks_many:  # one row for each pair of an image and a task
            pairs = self._split({IMAGE: np.repeat(images, asked, 0), TASK_INDEX: index[TASK_INDEX].reshape(-1)}, bank)
            return pairs.reshape(rows, asked, *pairs.shape[1:])
        most = self.sizes.most(ASKED, asked)
        parts = []
        for start in range(0, asked, most):
            held = self.sizes.holding({ASKED: min(most, asked - start)}, "a call")[ASKED]
            some = np.minimum(np.arange(start, start + held), asked - 1)
            part = {name: one if name == CLASS_ROWS or held == asked else one[:, some] for name, one in index.items()}
            parts.append(self._split({IMAGE: images, **part}, bank)[:, : min(most, asked - start)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _split(self, inputs: Mapping[str, NDArray[Any]], bank: Mapping[str, Any]) -> Array:
        """:meth:`run` for any number of images: in as many calls as the model needs, the last one filled up."""
        rows = len(inputs[IMAGE])
        most = self.sizes.most(BATCH, rows)
        parts = []
        for start in range(0, rows, most):
            count = min(most, rows - start)
            held = self.sizes.holding({BATCH: count}, "a call")[BATCH]
            if held == rows:
                return self.run(inputs, bank)
            some = np.minimum(np.arange(start, start + held), rows - 1)
            part = {name: one if name == CLASS_ROWS else one[some] for name, one in inputs.items()}
            parts.append(np.array(self.run(part, bank)[:count]))  # a buffer may be reused
        return np.concatenate(parts)


def refuse_options(options: RuntimeOptions, what: str, *names: str) -> None:
    """Raise :class:`UsageError` for the options ``names``, which the runtime ``what`` does not support."""
    for name in names:
        if getattr(options, name):
            raise UsageError(f"{what} does not support {name}: leave it out")


class StateRunner:
    """Tasks of fixed states behind a runtime, for comparison with PyTorch."""

    def __init__(self, runtime: Runtime, manifest: Manifest, states: Mapping[str, State]) -> None:
        self._runtime = runtime
        names = states if manifest.baked is None else manifest.baked
        self._number = {name: number for number, name in enumerate(names)}
        self._bank: dict[str, Any] = {}
        self._stacked: StackedBank | None = None
        if manifest.baked is None:
            dtype = bank_dtype(manifest.bank_precision)
            self._stacked = stack_states(manifest.form, states.values(), dtype, runtime.sizes)
            self._bank = {key: runtime.place(rows) for key, rows in self._stacked.rows.items()}
        self.description = runtime.description

    def logits(self, images: Array, tasks: Sequence[str] | Sequence[list[str]]) -> Array:
        """Logits of images [B, 3, S, S]; C is at least the largest class count of ``tasks``.

        Args:
            images: normalised float32.
            tasks: a task for each image gives [B, C], K tasks for each image give [B, K, C].
        """
        single = isinstance(tasks[0], str)
        numbers = [[self._number[task] for task in ([row] if isinstance(row, str) else row)] for row in tasks]
        if self._stacked is None:
            index = {TASK_INDEX: np.array(numbers, dtype=np.int64)}
        else:
            index = self._stacked.index(numbers, self._runtime.sizes)
        logits = self._runtime.logits(np.ascontiguousarray(images), index, self._bank)
        return logits[:, 0] if single else logits
