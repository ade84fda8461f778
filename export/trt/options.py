"""The options of a TensorRT build."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompttune.errors import UsageError, choose

HARDWARE_COMPATIBILITIES = ("none", "ampere_plus", "same_compute_capability")


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

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> TensorRTOptions:
        """The options in :attr:`Settings.options`.

        Raises:
            UsageError: a name is unknown, or a value is refused.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        given = {choose("TensorRT option", name, known): value for name, value in options.items()}
        if isinstance(given.get("timing_cache"), str):
            given["timing_cache"] = Path(given["timing_cache"])
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
