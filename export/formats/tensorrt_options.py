"""The options of a TensorRT build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompttune.errors import UsageError, choose
from prompttune.export.runtimes.tensorrt_library import TENSORRT, Library
from prompttune.settings import setting, settings_of, settle

COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT for RTX builds for. It also knows 7.5, without products in fp32."""


@dataclass(frozen=True)
class TensorRTOptions:
    """Options for building a plan.

    Raises:
        UsageError: a value is of the wrong type or out of range, or two options exclude each other.
    """

    workspace: int | None = setting(None, "TensorRT: largest workspace of a layer, in bytes.", low=1)
    optimization_level: int = setting(3, "TensorRT: from 0 (fast build) to 5 (longest search).", low=0, high=5)
    timing_cache: Path | None = setting(
        None, "TensorRT: file with the timings of earlier builds, read and rewritten.", path="file"
    )
    version_compatible: bool = setting(False, "TensorRT: let later versions open the plan too.")
    """The plan then carries code that later versions run."""
    hardware_compatibility: str = setting(
        "none", "TensorRT: other GPUs that can run the plan.", ("none", "ampere_plus", "same_compute_capability")
    )
    """GPUs that can run the plan: those of its own compute capability (``none``, tuned for this very model, and
    ``same_compute_capability``), or all since Ampere (``ampere_plus``, slower)."""
    compute_capability: tuple[str, ...] = setting(
        (), "TensorRT for RTX: compute capability of the GPUs that the plan is for, such as 8.9. May be repeated.",
        COMPUTE_CAPABILITIES, repeat=True, metavar="X.Y", shown="every RTX GPU since Ampere",
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        if self.timing_cache is not None and self.optimization_level == 0:
            raise UsageError("optimization_level 0 ignores the timing cache: leave one of them out")

    @classmethod
    def parse(cls, options: Mapping[str, Any], library: Library = TENSORRT) -> TensorRTOptions:
        """The options in :attr:`ExportSettings.options`.

        Raises:
            UsageError: a name is unknown, ``library`` lacks the option, or a value is refused.
        """
        for name in options:
            if choose("TensorRT option", name, settings_of(cls)) in library.lacks:
                raise UsageError(f"{library.title} has no {name}: {library.lacks[name]}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The options that a runtime needs, for JSON."""
        names = ("version_compatible", "hardware_compatibility", "optimization_level")
        return {name: getattr(self, name) for name in names}
