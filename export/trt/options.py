"""The options of a TensorRT build."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompttune.errors import UsageError, choose
from prompttune.export.trt.library import TENSORRT, Library

HARDWARE_COMPATIBILITIES = ("none", "ampere_plus", "same_compute_capability")
COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT for RTX builds for. It also knows 7.5, without products in fp32."""


@dataclass(frozen=True)
class TensorRTOptions:
    """Options for building a plan.

    Raises:
        UsageError: a value is of the wrong type or out of range, or two options exclude each other.
    """

    workspace: int | None = None
    """Largest workspace of a layer in device memory, in bytes; None for TensorRT's default, all of it."""
    optimization_level: int = 3
    """Optimisation level from 0, fastest to build, to 5, longest search."""
    timing_cache: Path | None = None
    """File with the timings of earlier builds: read if it exists, rewritten after the build."""
    version_compatible: bool = False
    """Whether later TensorRT versions may open the plan too. The plan then carries code that they run."""
    hardware_compatibility: str = "none"
    """GPUs that can run the plan: those of its own compute capability (``none``, tuned for this very model, and
    ``same_compute_capability``), or all since Ampere (``ampere_plus``, slower)."""
    compute_capability: tuple[str, ...] = ()
    """Compute capabilities such as 8.9 that TensorRT for RTX builds for; none means every RTX GPU since Ampere."""

    def __post_init__(self) -> None:
        if self.workspace is not None:
            _integer("workspace", self.workspace, 1, None)
        _integer("optimization_level", self.optimization_level, 0, 5)
        if self.timing_cache is not None and not isinstance(self.timing_cache, Path):
            raise UsageError(f"timing_cache must be a path, not {self.timing_cache!r}")
        if self.timing_cache is not None and self.optimization_level == 0:
            raise UsageError("optimization_level 0 ignores the timing cache: leave one of them out")
        if not isinstance(self.version_compatible, bool):
            raise UsageError(f"version_compatible must be true or false, not {self.version_compatible!r}")
        choose("hardware_compatibility", self.hardware_compatibility, HARDWARE_COMPATIBILITIES)
        for one in set(self.compute_capability) - set(COMPUTE_CAPABILITIES):
            known = ", ".join(COMPUTE_CAPABILITIES)
            raise UsageError(f"TensorRT for RTX does not build for compute_capability {one}: choose of {known}")

    @classmethod
    def parse(cls, options: Mapping[str, Any], library: Library = TENSORRT) -> TensorRTOptions:
        """The options in :attr:`Settings.options`; ``compute_capability`` may be one or several.

        Raises:
            UsageError: a name is unknown, ``library`` lacks the option, or a value is refused.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        given = {choose("TensorRT option", name, known): value for name, value in options.items()}
        for name, instead in library.lacks.items():
            if name in given:
                raise UsageError(f"{library.title} has no {name}: {instead}")
        if isinstance(given.get("timing_cache"), str):
            given["timing_cache"] = Path(given["timing_cache"])
        named = given.get("compute_capability", ())
        given["compute_capability"] = (named,) if isinstance(named, str) else tuple(named)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The options that a runtime needs, for JSON."""
        return {
            "version_compatible": self.version_compatible,
            "hardware_compatibility": self.hardware_compatibility,
            "optimization_level": self.optimization_level,
        }


def _integer(name: str, value: object, low: int, high: int | None) -> None:
    """Refuse anything but whole numbers in range; True does not count as a number here."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high):
        return
    span = f"at least {low}" if high is None else f"from {low} to {high}"
    raise UsageError(f"{name} must be a whole number {span}, not {value!r}")
