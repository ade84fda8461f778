"""The tensors of a foreign checkpoint: read without running code, with every name accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prompttune.errors import CheckpointError, shortened
from prompttune.foreign import read_state_dict

WRAPPERS = ("model", "state_dict", "model_state", "module")
"""Keys under which training code stores a state dict; other keys (optimiser, epoch, arguments) are skipped."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that data parallelism and torch.compile add to every name."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST_AXIS = 2**17
"""Largest number of prompts, ranks or classes that a task may have."""


def read_file(path: Path) -> dict[str, Tensor]:
    """The state dict in ``path``, unwrapped and without prefixes that all names share.

    Raises:
        CheckpointError: the file is missing, damaged or empty, or cannot be read without running code.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file at {path}")
    tensors = read_state_dict(path, WRAPPERS, CheckpointError, arrays=True)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


class FileTensors:
    """Tensors that are taken one by one; missing, misshapen and remaining ones are reported at the end.

    Args:
        tensors: the tensors, by the file's own names.
        where: name of the file in messages.
        config: settings that lie next to the tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> None:
        self.where, self.config = where, config or {}
        self.ignored: list[str] = []
        self._left = dict(tensors)
        self._missing: list[str] = []
        self._wrong: list[str] = []
        self._infinite: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self, start: str = "") -> list[str]:
        """Names of the remaining tensors."""
        return [name for name in self._left if name.startswith(start)]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a remaining tensor; None if it does not exist."""
        found = self._left.get(name)
        return None if found is None else tuple(found.shape)

    def size(self, name: str, axis: int, ndim: int) -> int:
        """Size of one axis of a tensor, from which other sizes are derived.

        Raises:
            CheckpointError: the tensor is missing, empty, has another number of axes, or the axis exceeds
                :data:`LARGEST_AXIS`.
        """
        shape = self.shape(name)
        if shape is None:
            raise CheckpointError(f"{self.where} lacks {name}; it has {shortened(sorted(self._left))}")
        if len(shape) != ndim or 0 in shape:
            raise CheckpointError(f"{self.where}: {name} is {shape}, expected {ndim} axes")
        if shape[axis] > LARGEST_AXIS:
            raise CheckpointError(f"{self.where}: {name} is {shape}, more than the {LARGEST_AXIS} that a task may have")
        return shape[axis]

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor in float32; zeros and a later report if it is not as expected."""
        found = self._left.pop(name, None)
        if found is None:
            self._missing.append(name)
        elif tuple(found.shape) != tuple(shape):
            self._wrong.append(f"{name} is {tuple(found.shape)}, expected {tuple(shape)}")
        elif found.dtype in FLOATS:
            taken = found.float().contiguous()
            if not taken.isfinite().all():
                self._infinite.append(name)
            return taken
        else:
            self._wrong.append(
                f"{name} holds {str(found.dtype).removeprefix('torch.')}, not floats of 16, 32 or 64 bits"
            )
        return torch.zeros(()).expand(tuple(shape))  # sizes in a file may be huge, so no memory is allocated

    def ignore(self, names: Iterable[str]) -> None:
        """Skip tensors, for a reason that the layout's documentation gives."""
        for name in names:
            del self._left[name]
            self.ignored.append(name)

    def fork(self) -> FileTensors:
        """A copy from which tensors can be taken without taking them from here."""
        return FileTensors(self._left, self.where)

    def check(self, fits: str, *, all_taken: bool = True) -> None:
        """Report everything that was not as expected.

        Args:
            fits: name of what the file was compared with.
            all_taken: whether remaining tensors are an error.
        """
        parts = [
            f"{kind}: {shortened(names)}"
            for kind, names in (
                ("missing", self._missing),
                ("unexpected", sorted(self._left) if all_taken else []),
                ("wrong shape", self._wrong),
                ("not finite", self._infinite),
            )
            if names
        ]
        if parts:
            raise CheckpointError(f"{self.where} does not fit {fits}: {'; '.join(parts)}")
