"""The interface of every export format: settings, a build request, and the result of a build."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prompttune.axes import CLASSES, CLUSTERS, RANK
from prompttune.errors import UsageError, choose
from prompttune.export.graph import Traced, trace
from prompttune.export.layout import ASKED, BATCH, CHOSEN, DTYPES, MANY, TASKS, WIDTH, Array, Range, State, TensorSpec
from prompttune.export.options import GateOptions, OnStage, RuntimeOptions
from prompttune.model import PromptModel
from prompttune.registry import Registry
from prompttune.settings import all_settings, coerce_all, setting, settings_of, settle

BANK_PRECISIONS = tuple(DTYPES)
PRECISIONS = (*BANK_PRECISIONS, "int8")
ATTENTIONS = ("explicit", "fused")
QUANTIZATIONS = ("dynamic", "static")
AXES = (BATCH, ASKED, TASKS, RANK, CLASSES, CHOSEN, WIDTH, CLUSTERS)


class Format(ABC):
    """One format of model files."""

    name: ClassVar[str]
    """Name in :data:`FORMATS`."""
    title: ClassVar[str]
    """Description in the help of the command line."""
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    default_attention: ClassVar[str] = "explicit"
    default_quantization: ClassVar[str] = "dynamic"
    default_device: ClassVar[str] = "cpu"
    splits: ClassVar[bool] = False
    """Whether the image's part and the tasks' part can be written as two graphs."""
    options: ClassVar[type[Any] | None] = None
    """Settings dataclass of the format's own options, which become options of the command line."""

    def check(self, settings: ExportSettings) -> None:
        """Raise an error at once, before anything is loaded, if this format cannot be built here.

        Most formats accept every size; those that need sizes check them, and their options, themselves.

        Raises:
            MissingExtraError: a library is missing; the message names the extra and an alternative.
            UsageError: the format does not support a setting.
        """
        if settings.axes:
            raise UsageError(f"the format {self.name} needs no sizes of axes")
        if self.options is None and settings.options:
            first = next(iter(settings.options))
            raise UsageError(f"the format {self.name} has no options of its own: leave out {first}")
        if self.options is not None:
            known = settings_of(self.options)
            self.options(**coerce_all(settings.options, known, f"option of the format {self.name}"))

    def check_proof(self, settings: ExportSettings) -> None:  # noqa: B027  # most formats have nothing to refuse
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


_OPTIONS = """
bank_inputs data help json max_batch_size max_delay_ms model_name no_parity output overwrite weights
"""
"""Options of ``prompttune export`` beside the settings of the model and of the comparison."""


def _check(name: str, kind: type[Format]) -> None:
    """Raise :class:`UsageError` for an option that ``prompttune export`` or another format has with another meaning."""
    if kind.options is None or kind.__module__.startswith("prompttune."):
        return
    taken = {*_OPTIONS.split(), *all_settings(ExportSettings), *all_settings(GateOptions)}
    for key, known in all_settings(kind.options).items():
        others = (other for other in FORMATS if other != name and (options := FORMATS[other].options) is not None
                  and all_settings(options).get(key, known) != known)  # fmt: skip
        if where := "prompttune export" if key in taken else next(others, None):
            raise UsageError(
                f"the format {name!r}: {known.option} has another meaning in {where}: give it another name"
            )


FORMATS: Registry[type[Format]] = Registry("format", "prompttune.formats", _check, Format)
"""Class of each format; the runtime of the same name opens its files."""
FORMATS.add("onnx", "prompttune.export.formats.onnx:OnnxFormat")
FORMATS.add("aoti", "prompttune.export.formats.aoti:AotiFormat")
FORMATS.add("trt", "prompttune.export.formats.tensorrt:TensorRTFormat")
FORMATS.add("trt-rtx", "prompttune.export.formats.tensorrt:TensorRTRTXFormat")
FORMATS.add("torch-trt", "prompttune.export.formats.torch_tensorrt:TorchTensorRTFormat")


def read_axes(value: str | Mapping[str, Any] | Iterable[Any]) -> dict[str, Range]:
    """Ranges of axes, from a mapping, from text such as ``batch=1:8:64``, or from several of these.

    Raises:
        UsageError: an axis is unknown, or its sizes are not three whole numbers that rise from 1.
    """
    if isinstance(value, str):
        axis, _, text = value.partition("=")
        parts = text.split(":")
        if axis not in AXES or len(parts) != 3 or not all(map(str.isdecimal, parts)):
            raise UsageError(f"{value!r} is not like batch=1:8:64; axes: {', '.join(AXES)}")
        value = {axis: [int(part) for part in parts]}
    if not isinstance(value, Mapping):
        if not isinstance(value, Iterable):
            raise UsageError(f"axes must be sizes by axis, such as batch=1:8:64, not {value!r}")
        return {axis: sizes for one in value for axis, sizes in read_axes(one).items()}
    for axis, sizes in value.items():
        choose("axis", axis, AXES)
        if not isinstance(sizes, list | tuple) or not all(type(size) is int for size in sizes):
            raise UsageError(f"sizes of the axis {axis} must be a list such as 1, 8, 64, not {sizes!r}")
        if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(f"sizes of the axis {axis} must rise from 1: smallest, likeliest, largest, as in 1:8:64")
    return {axis: (low, likely, high) for axis, (low, likely, high) in value.items()}


@dataclass(frozen=True)
class ExportSettings:
    """Settings for building a model file.

    A format's :meth:`Format.check` refuses settings that it does not use; they are never ignored.
    """

    format: str = setting("onnx", "Format of the model file.", FORMATS)
    precision: str = setting(
        "fp32", "Precision of weights and activations; norms, softmax and logits stay in fp32.", PRECISIONS
    )
    bank_precision: str | None = setting(
        None, "Precision of the resident task tensors.", BANK_PRECISIONS, shown="as --precision; fp32 for int8"
    )
    attention: str | None = setting(
        None, "explicit: products and a softmax; fused: the format's own attention, which was wrong in several "
        "TensorRT releases.", ATTENTIONS, shown="fused for torch-trt and aoti, else explicit",
    )  # fmt: skip
    baked: bool = setting(
        False, "Make the tasks constants of the model, whose only inputs are then image and task_index."
    )
    split: bool = setting(
        False, "Write the image's part and the tasks' part as two graphs, so that a server can keep the work on images "
        "(serve --image-cache); for onnx on the CPU.",
    )  # fmt: skip
    device: str | None = setting(
        None, "Device of the model: cpu, cuda or cuda:INDEX.", shown="cuda for trt, trt-rtx and torch-trt, else cpu"
    )
    """Formats that compile do so for this device, and the comparison with PyTorch runs there."""
    quantization: str | None = setting(
        None, "Scales of int8 activations: from each call, or from calibration images.", QUANTIZATIONS,
        shown="static for trt and trt-rtx, else dynamic",
    )  # fmt: skip
    calibration_images: int = setting(
        256, "Number of --data images for int8 calibration, spread over the tasks; noise without --data.", low=1
    )
    axes: Mapping[str, Range] = setting(
        (), f"Range of sizes for a TensorRT engine, for {', '.join(AXES)}. May be repeated.", kind=str, read=read_axes,
        repeat=True, option="axis", metavar="AXIS=MIN:LIKELY:MAX",
    )  # fmt: skip
    """Smallest, likeliest and largest size of dynamic axes, if a format needs them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The format's own options by name, see :attr:`Format.options`."""

    @property
    def target(self) -> str:
        """The resolved device."""
        return self.device or "cpu"

    def resolved(self) -> ExportSettings:
        """The settings, checked and with defaults filled in.

        Raises:
            UsageError: a name is unknown, or settings contradict each other.
        """
        made = dataclasses.replace(self)
        settle(made)
        kind, int8 = FORMATS[made.format], made.precision == "int8"
        if made.precision not in kind.precisions:
            raise UsageError(f"the format {made.format} has no {made.precision}: choose {', '.join(kind.precisions)}")
        if made.quantization is not None and not int8:
            raise UsageError("quantization needs the precision int8")
        device = made.device or kind.default_device
        if made.split:
            alone = not (made.baked or made.quantization == "static") and device == "cpu"
            if not (kind.splits and alone):
                raise UsageError("split is for the format onnx on the cpu, not baked and without static int8")
        RuntimeOptions(device).cuda_index  # noqa: B018  # raises if there is no such device
        return dataclasses.replace(
            made,
            bank_precision=made.bank_precision or ("fp32" if int8 else made.precision),
            attention=made.attention or kind.default_attention,
            quantization=(made.quantization or kind.default_quantization) if int8 else None,
            device=device,
        )


Feeds = dict[str, np.ndarray[Any, Any]]
"""Arrays of one call, by model input."""


@dataclass(frozen=True)
class BuildRequest:
    """Everything that a format builds from."""

    model: PromptModel
    """The model in fp32 and evaluation mode. The file answers for every task that fits it, not only for this one."""
    settings: ExportSettings
    """Resolved settings."""
    states: Mapping[str, State]
    """Folded tasks of the export by name, for baking, for calibration and for likely sizes."""
    images: Callable[[str, int], Array]
    """Function that returns up to N normalised images [N, 3, S, S] of a task, for calibration."""
    on_stage: OnStage = lambda _: None

    @property
    def axes(self) -> dict[str, Range]:
        """Ranges that were asked for, and that of the tasks for an image, see :data:`MANY`."""
        return {**({ASKED: MANY} if self.model.only_reads else {}), **self.settings.axes}

    @property
    def attention(self) -> str:
        """The form of attention to trace, see :func:`prompttune.export.graph.trace`."""
        made = self.settings
        on_cpu = made.format == "onnx" and made.target == "cpu" and made.attention == "explicit"
        return "cpu" if on_cpu else str(made.attention)

    def trace(self, probes: bool = False, device: str = "cpu") -> Traced:
        """The graph for these settings, with its constants on ``device``.

        For int8 it is in fp32 and quantised afterwards.
        """
        settings = self.settings
        return trace(
            self.model,
            precision="fp32" if settings.precision == "int8" else settings.precision,
            bank_precision=str(settings.bank_precision),
            attention=self.attention,
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
