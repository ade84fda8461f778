"""Sizes that an engine supports on its dynamic axes, for everything that sizes a bank or a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prompttune.errors import EngineError

Range = tuple[int, int, int]
"""Smallest, likeliest and largest size of an axis."""


@dataclass(frozen=True)
class Sizes:
    """Built range of each axis; an axis without a range supports every size."""

    ranges: Mapping[str, Range] = field(default_factory=dict)

    def most(self, axis: str, wanted: int) -> int:
        """``wanted``, or the largest size of the axis if that is smaller."""
        return min(wanted, self.ranges[axis][2]) if axis in self.ranges else wanted

    def holding(self, needed: Mapping[str, int], what: str) -> dict[str, int]:
        """The sizes to allocate so that ``needed`` ones fit: the same, or the smallest that the engine supports.

        Raises:
            EngineError: a size exceeds that of the engine; ``what`` needs it.
        """
        for axis, size in needed.items():
            if size > self.most(axis, size):
                low, likely, high = self.ranges[axis]
                raise EngineError(
                    f"{what}: the axis {axis} would be {size}, the engine was built for {high} at most; "
                    f"export it again with a larger range, such as --axis {axis}={low}:{likely}:{size}"
                )
        return {axis: max(size, self.ranges.get(axis, (size,))[0]) for axis, size in needed.items()}
