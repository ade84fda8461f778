"""How Triton presents and batches a model."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from prompttune.errors import MissingExtraError, UsageError, choose
from prompttune.export.formats import Settings
from prompttune.export.layout import BATCH

FORMATS = ("onnx", "trt")
"""Formats of engines whose model file a backend of Triton runs."""
CONFIG_FILE, LABELS_FILE, README_FILE = "config.pbtxt", "labels.txt", "README.md"
VERSION = "1"
"""Name of the folder that holds the engine; Triton counts a model's versions."""
MAX_BATCH_SIZE = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TritonSettings:
    """Settings of the model in Triton."""

    name: str = "prompttune"
    """Name of the model, and of its folder in the repository."""
    bank_inputs: bool = False
    """Whether to keep the tasks out of the model: every request carries its states, and none are batched."""
    max_batch_size: int | None = None
    """Largest number of images per call; None uses :data:`MAX_BATCH_SIZE`, or the largest of a plan's profile."""
    max_delay_ms: float = 1.0
    """Longest time in milliseconds that a request waits for others to join its batch."""

    def check(self, model: Settings) -> None:
        """Raise at once, before anything is loaded, if Triton could not serve such a model.

        Raises:
            UsageError: Triton could not serve the model; the message says what to choose instead.
            MissingExtraError: Triton's protobuf classes are not installed.
        """
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"bad model name {self.name!r}: use letters, digits, '.', '_' and '-', first a letter or a digit"
            )
        if self.max_delay_ms < 0 or (self.max_batch_size is not None and self.max_batch_size < 1):
            raise UsageError("a batch holds at least 1 image, and its delay is at least 0")
        choose("format of a Triton model", model.format, FORMATS)
        if self.max_batch_size is not None and model.format == "trt":
            raise UsageError("a plan's largest batch is its profile's: give --axis batch=1:8:64 instead")
        if model.axes.get(BATCH, (1,))[0] > 1:
            raise UsageError("Triton also sends single images: let the axis batch start at 1")
        if self.bank_inputs:
            self._check_bank_inputs(model)
        if importlib.util.find_spec("tritonclient") is None:
            raise MissingExtraError("tritonclient", "serve", "or export with --format onnx")

    def _check_bank_inputs(self, model: Settings) -> None:
        if model.baked:
            raise UsageError("the tasks are either baked into the model or its inputs: leave out one of the two")
        if self.max_batch_size is not None:
            raise UsageError("requests that carry their own tasks are not batched: leave out the largest batch size")
        if model.format == "onnx" and model.bank_precision == "bf16":
            raise UsageError("Triton passes no bf16 tensors to ONNX Runtime: choose the bank precision fp16 or fp32")
