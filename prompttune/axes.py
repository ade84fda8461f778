"""Task states and their named axes, whose sizes differ by task and are padded to the largest of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

RANK, CLASSES, CLUSTERS = "rank", "classes", "clusters"
CHOICES = (CLASSES, CLUSTERS)
"""Axes along which a forward chooses one entry. A state tensor of the shape ``(axis,)`` is added to the scores and
padded with -inf instead of zeros, so that padding is never chosen."""

State: TypeAlias = "dict[str, Tensor]"
"""Tensors of a task by key, with leading dimension 1 (one task) or B (one task per row)."""
Layout = dict[str, tuple[int | str, ...]]
"""Shape of each state tensor without its leading dimension; a name stands for an axis whose size differs by task."""
