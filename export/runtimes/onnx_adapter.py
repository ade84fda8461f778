"""ONNX models of one task at a time: a batch is run task by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from prompttune.export.layout import IMAGE
from prompttune.export.runtimes.base import Array, BankArray
from prompttune.export.runtimes.onnxruntime import OnnxRuntime


class OnnxAdapterRuntime(OnnxRuntime):
    """An ONNX file whose task tensors are inputs with leading dimension 1, the form of ONNX Runtime's adapters.

    The rows of each task in a batch make one call, with the task's own bank row.
    """

    def place(self, rows: BankArray) -> Any:
        """See :meth:`Runtime.place`: the host's copy itself, since a call takes a row of it."""
        return rows

    def run(self, images: Array, task_index: NDArray[np.int64], bank: Mapping[str, Any]) -> Array:
        """See :meth:`Runtime.run`."""
        logits: Array | None = None
        for task in np.unique(task_index):
            rows = np.flatnonzero(task_index == task)
            state = {key: ort.OrtValue.ortvalue_from_numpy(value[task : task + 1]) for key, value in bank.items()}
            found = self._call({IMAGE: ort.OrtValue.ortvalue_from_numpy(images[rows]), **state})
            if logits is None:
                logits = np.empty((len(images), found.shape[1]), dtype=np.float32)
            logits[rows] = found
        assert logits is not None
        return logits
