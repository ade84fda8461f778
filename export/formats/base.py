"""The interface of every export format: settings, a build request, and the result of a build."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prompttune.errors import UsageError, choose
from prompttune.export.graph import Traced, trace
from prompttune.export.layout import State, TensorSpec
from prompttune.export.runtimes.base import Array, RuntimeOptions
from prompttune.model import PromptModel

OnStage = Callable[[str], None]
"""Function that is called with a description of each stage."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
BANK_PRECISIONS = ("fp32", "fp16", "bf16")
ATTENTIONS = ("explicit", "fused")
QUANTIZATIONS = ("dynamic", "static")

FORMATS = {
    "onnx": ("prompttune.export.formats.onnx", "OnnxFormat"),
    "aoti": ("prompttune.export.formats.aoti", "AotiFormat"),
    "trt": ("prompttune.export.formats.tensorrt", "TensorRTFormat"),
    "trt-rtx": ("prompttune.export.formats.tensorrt", "TensorRTRTXFormat"),
    "torch-trt": ("prompttune.export.formats.torch_tensorrt", "TorchTensorRTFormat"),
}
"""Module and class of each format."""


@dataclass(frozen=True)
class Settings:
    """Settings for building a model file.

    A format's :meth:`Format.check` refuses settings that it does not use; they are never ignored.
    """

    format: str = "onnx"
    precision: str = "fp32"
    """Precision of weights and activations, one of :data:`PRECISIONS`. Norms, softmax and logits stay in fp32."""
    bank_precision: str | None = None
    """Precision of the resident task tensors; None follows ``precision`` (fp32 for int8)."""
    attention: str | None = None
    """``explicit`` products and softmax, or ``fused``: the format's own attention. None uses the format's default."""
    baked: bool = False
    """Whether the tasks are constants of the model, whose only inputs are then ``image`` and ``task_index``."""
    device: str | None = None
    """Device of the model: formats that compile do so for this device, and the comparison with PyTorch runs there. None
    uses the format's default."""
    quantization: str | None = None
    """Source of int8's scales: ``dynamic`` at run time, ``static`` from calibration images."""
    calibration_images: int = 256
    """Number of images for int8 calibration, spread over the tasks."""
    axes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """Smallest, likeliest and largest size of dynamic axes (batch, tasks, rank, classes), if a format needs them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The format's own options by name."""

    @property
    def target(self) -> str:
        """The resolved device."""
        return self.device or "cpu"

    def resolved(self) -> Settings:
        """The settings, checked and with defaults filled in.

        Raises:
            UsageError: a name is unknown, or settings contradict each other.
        """
        kind = find_format(self.format)
        choose("precision", self.precision, PRECISIONS)
        if self.precision not in kind.precisions:
            raise UsageError(f"the format {self.format} has no {self.precision}: choose {', '.join(kind.precisions)}")
        bank = self.bank_precision or ("fp32" if self.precision == "int8" else self.precision)
        choose("bank precision", bank, BANK_PRECISIONS)
        attention = choose("attention", self.attention or kind.default_attention, ATTENTIONS)
        quantization = self.quantization
        if self.precision == "int8":
            quantization = choose("quantization", quantization or kind.default_quantization, QUANTIZATIONS)
        elif quantization is not None:
            raise UsageError("quantization needs the precision int8")
        if self.calibration_images < 1:
            raise UsageError(f"calibration needs at least 1 image, not {self.calibration_images}")
        for axis, sizes in self.axes.items():
            if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise UsageError(f"sizes of the axis {axis} must rise from 1: smallest, likeliest, largest")
        device = self.device or kind.default_device
        RuntimeOptions(device).cuda_index  # noqa: B018  # raises if there is no such device
        return dataclasses.replace(
            self, bank_precision=bank, attention=attention, quantization=quantization, device=device
        )


Feeds = dict[str, np.ndarray[Any, Any]]
"""Arrays of one call, by model input."""


@dataclass(frozen=True)
class BuildRequest:
    """Everything that a format builds from."""

    model: PromptModel
    """The model in fp32 and evaluation mode. The file answers for every task that fits it, not only for this one."""
    settings: Settings
    """Resolved settings."""
    states: Mapping[str, State]
    """Folded tasks of the export by name, for baking, for calibration and for likely sizes."""
    images: Callable[[str, int], Array]
    """Function that returns up to N normalised images [N, 3, S, S] of a task, for calibration."""
    on_stage: OnStage = lambda _: None

    def trace(self, probes: bool = False, device: str = "cpu") -> Traced:
        """The graph for these settings, with its constants on ``device``.

        For int8 it is in fp32 and quantised afterwards.
        """
        settings = self.settings
        assert settings.bank_precision is not None
        assert settings.attention is not None
        return trace(
            self.model,
            precision="fp32" if settings.precision == "int8" else settings.precision,
            bank_precision=settings.bank_precision,
            attention=settings.attention,
            baked=self.states if settings.baked else None,
            probes=probes,
            device=device,
        )


@dataclass(frozen=True)
class Built:
    """Result of a format's build."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    files: list[str]
    """Names of the files in the folder, with the model file first."""
    opset: int | None = None
    """ONNX operator set; None for other formats."""
    details: dict[str, Any] = field(default_factory=dict)
    """Details that the runtime needs to open or refuse the file, for the manifest."""


class Format(ABC):
    """One format of model files."""

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    default_attention: ClassVar[str] = "explicit"
    default_quantization: ClassVar[str] = "dynamic"
    default_device: ClassVar[str] = "cpu"

    def check(self, settings: Settings) -> None:
        """Raise an error at once, before anything is loaded, if this format cannot be built here.

        Most formats accept every size and have no options; others check their own.

        Raises:
            MissingExtraError: a library is missing; the message names the extra and an alternative.
            UsageError: the format does not support a setting.
        """
        if settings.axes or settings.options:
            raise UsageError(f"the format {self.name} needs no sizes of axes and has no options of its own")

    def check_proof(self, settings: Settings) -> None:  # noqa: B027  # most formats have nothing to refuse
        """Raise an error at once if the result could not be compared with PyTorch on ``settings.device``.

        Raises:
            UsageError: the comparison is not possible; the message says what to do instead.
        """

    @abstractmethod
    def build(self, request: BuildRequest, folder: Path) -> Built:
        """Write the model into ``folder``.

        Raises:
            EngineError: the model cannot be built.
        """


def find_format(name: str) -> Format:
    """The format called ``name``, whose module is imported now.

    Raises:
        UsageError: the format is unknown.
    """
    module, kind = FORMATS[choose("format", name, FORMATS)]
    found: Format = getattr(importlib.import_module(module), kind)()
    return found
