"""The seam that every export format stands behind: settings, a request to build, what was built."""

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
"""Called with what is being done now, in words."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
BANK_PRECISIONS = ("fp32", "fp16", "bf16")
ATTENTIONS = ("explicit", "fused")
QUANTIZATIONS = ("dynamic", "static")

FORMATS = {
    "onnx": ("prompttune.export.formats.onnx", "OnnxFormat"),
    "aoti": ("prompttune.export.formats.aoti", "AotiFormat"),
    "trt": ("prompttune.export.formats.tensorrt", "TensorRTFormat"),
    "torch-trt": ("prompttune.export.formats.torch_tensorrt", "TorchTensorRTFormat"),
}
"""Name of a format → module and class."""


@dataclass(frozen=True)
class Settings:
    """How a model file is made.

    Settings that a format has no use for are refused by its :meth:`Format.check`, never ignored.
    """

    format: str = "onnx"
    precision: str = "fp32"
    """Of weights and activations, one of :data:`PRECISIONS`. Norms, softmax and logits stay in fp32."""
    bank_precision: str | None = None
    """Of the resident task tensors; None follows ``precision`` (fp32 for int8)."""
    attention: str | None = None
    """``explicit`` products and softmax, or ``fused``: the format's own attention. None takes the format's default."""
    baked: bool = False
    """Put the tasks into the model as constants; inputs are ``image`` and ``task_index`` alone."""
    device: str | None = None
    """Where the model will run: formats that compile do it for this device, and the comparison with PyTorch runs there.
    None takes the format's default."""
    quantization: str | None = None
    """How int8 finds its scales: ``dynamic`` at run time, ``static`` from calibration images."""
    calibration_images: int = 256
    """Images that int8 is calibrated on, spread over the tasks."""
    axes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """Dynamic axis (batch, tasks, rank, classes) → smallest, likeliest and largest size, where a format needs them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The format's own options by name."""

    @property
    def target(self) -> str:
        """The device, once resolved."""
        return self.device or "cpu"

    def resolved(self) -> Settings:
        """Checked, with what was left open filled in.

        Raises:
            UsageError: an unknown name, or a combination that makes no sense.
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
            raise UsageError("quantization goes with the precision int8")
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
"""Model input name → array, one call."""


@dataclass(frozen=True)
class BuildRequest:
    """What a format builds from."""

    model: PromptModel
    """In fp32 and evaluation mode. The file answers for every task that fits it, not for this one alone."""
    settings: Settings
    """Resolved."""
    states: Mapping[str, State]
    """The folded tasks of the export by name: to bake in, to calibrate on, to take likely sizes from."""
    images: Callable[[str, int], Array]
    """Up to so many normalised images [N, 3, S, S] of a task, for calibration."""
    on_stage: OnStage = lambda _: None

    def trace(self, probes: bool = False, device: str = "cpu") -> Traced:
        """The graph that these settings ask for, its constants on ``device``.

        For int8 it is in fp32, to be quantised afterwards.
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
    """What a format has written."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    files: list[str]
    """Names of the files in the folder, the model file first."""
    opset: int | None = None
    """ONNX operator set, where there is one."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the runtime must know to open the file or to refuse it; goes into the manifest."""


class Format(ABC):
    """One format of model files."""

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    default_attention: ClassVar[str] = "explicit"
    default_quantization: ClassVar[str] = "dynamic"
    default_device: ClassVar[str] = "cpu"

    def check(self, settings: Settings) -> None:
        """Raise at once, before anything is loaded, if this format cannot be built here.

        Most formats take every size and have no options; one that does otherwise checks its own.

        Raises:
            MissingExtraError: a library is missing; names the extra and what would run instead.
            UsageError: a setting that this format does not know.
        """
        if settings.axes or settings.options:
            raise UsageError(f"the format {self.name} needs no sizes of axes and has no options of its own")

    def check_proof(self, settings: Settings) -> None:  # noqa: B027  # most formats have nothing to refuse
        """Raise at once if what would be built could not be compared with PyTorch on ``settings.device``.

        Raises:
            UsageError: says what to do instead.
        """

    @abstractmethod
    def build(self, request: BuildRequest, folder: Path) -> Built:
        """Write the model into ``folder``.

        Raises:
            EngineError: it cannot be built.
        """


def find_format(name: str) -> Format:
    """The format called ``name``; its module is imported now.

    Raises:
        UsageError: there is none.
    """
    module, kind = FORMATS[choose("format", name, FORMATS)]
    found: Format = getattr(importlib.import_module(module), kind)()
    return found
