"""How an engine is opened and what is asked of it: settings that every command on engines shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from prompttune.errors import UsageError
from prompttune.settings import setting

OnStage = Callable[[str], None]
"""Function that is called with a description of each stage."""
PROVIDERS = ("tensorrt",)
RUNTIMES = ("auto", "onnxruntime", "openvino")


@dataclass(frozen=True)
class RuntimeOptions:
    """Options for opening an engine; a runtime raises :class:`UsageError` for options that it does not support."""

    device: str = setting("cpu", "Device: cpu, cuda or cuda:INDEX.")
    threads: int | None = setting(None, "CPU threads of the model.", low=1, shown="one per core")
    """Threads of one operator; None for one per core."""
    cuda_graph: bool = setting(False, "Capture one CUDA graph for each batch size and replay it.")
    provider: str | None = setting(
        None, "Run an ONNX engine in ONNX Runtime's TensorRT provider.", PROVIDERS, shown="the device's own"
    )
    cache: Path | None = setting(
        None, "Folder for the compiled engines of TensorRT and OpenVINO, kept between runs.", option="provider_cache",
        path="folder", shown="none for TensorRT; .cache in the engine's folder for OpenVINO",
    )  # fmt: skip
    spin: bool = True
    """Whether CPU threads that wait for the next operator spin: faster alone, wasteful next to other work."""
    runtime: str = setting(
        "auto", "Runtime of an ONNX engine. auto: the quickest that bench has found here, else that of the export.",
        RUNTIMES,
    )  # fmt: skip
    image_cache: int = setting(
        0, "MiB for the frozen work on images: another question about an image then costs the tasks' part alone. For "
        "engines exported with --split.", low=0, shown="none",
    )  # fmt: skip
    skip_unchanged: float = setting(
        0.0, "Reuse that work for a frame like one of the last eight: no 16 x 16 pixels differ by more on average, in "
        "standard deviations, such as 0.05.", low=0, shown="none",
    )  # fmt: skip

    @property
    def cuda_index(self) -> int | None:
        """Index of the CUDA device, None on a CPU.

        Raises:
            UsageError: the device is neither ``cpu`` nor ``cuda`` nor ``cuda:INDEX``.
        """
        kind, _, index = self.device.partition(":")
        if kind == "cpu" and not index:
            return None
        if kind != "cuda" or (index and not index.isdigit()):
            raise UsageError(f"unknown device {self.device!r}; known: cpu, cuda, cuda:INDEX")
        return int(index or 0)

    def or_threads(self, threads: int) -> RuntimeOptions:
        """The same with a default number of threads, which runtimes of a GPU refuse: there only a given one stays."""
        return self if self.threads is not None or self.cuda_index is not None else replace(self, threads=threads)


BATCH_SIZES = (1, 2, 8)
IMAGES = 16
"""Default number of images that each task is compared on."""


def read_sizes(value: str | Sequence[int]) -> tuple[int, ...]:
    """Read a list of batch sizes such as ``1,2,8``.

    Raises:
        UsageError: it is none.
    """
    parts = value.split(",") if isinstance(value, str) else value
    try:
        found = tuple(int(one) for one in parts)
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"{value!r} is not a list of batch sizes such as 1,2,8")
    return found


@dataclass(frozen=True)
class GateOptions:
    """How an engine is compared with PyTorch, and what passes; None follows its precision."""

    atol: float | None = setting(
        None, "Largest allowed difference of a logit.", low=0, shown="0.0001 for fp32, none for fp16, bf16 and int8"
    )
    min_agreement: float | None = setting(
        None, "Smallest allowed share of images with the same top class; below fp32, ties within the precision's "
        "rounding are left out.", low=0, high=1, shown="1 for fp32, 0.99 for fp16, bf16 and int8",
    )  # fmt: skip
    max_accuracy_loss: float | None = setting(
        None, "Largest allowed loss of top-1 on labelled --data; one image may always be lost unless this is 0.", low=0,
        high=1, shown="none for fp32, 0.01 for fp16, bf16 and int8",
    )  # fmt: skip
    batch_sizes: tuple[int, ...] = setting(
        BATCH_SIZES, "Batch sizes of the comparison.", kind=str, read=read_sizes, metavar="N,N,..."
    )
    images: int = setting(IMAGES, "Number of images per task and batch size in the comparison.", low=1)


class Thresholds(TypedDict, total=False):
    """The fields of :class:`GateOptions`, each optional."""

    atol: float | None
    min_agreement: float | None
    max_accuracy_loss: float | None
    batch_sizes: Sequence[int] | None
    images: int | None
