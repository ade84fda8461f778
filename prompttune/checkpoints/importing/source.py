"""The tensors of somebody else's checkpoint: read without running code, and every name accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prompttune.errors import CheckpointError
from prompttune.foreign import PickledArray, plain_dict, plain_tensors, read_foreign

WRAPPERS = ("model", "state_dict", "model_state", "module")
"""Keys under which training code stores a state dict; those beside it (optimiser, epoch, arguments) are left out."""
PREFIXES = ("module.", "_orig_mod.")
"""What data parallelism and torch.compile put in front of every name."""
SHOWN_NAMES = 4
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST_AXIS = 2**17
"""More prompts, ranks or classes than any task has."""


def read_file(path: Path) -> dict[str, Tensor]:
    """The state dict in ``path``, out of its wrapping and without prefixes that every name has.

    Raises:
        CheckpointError: the file is missing, damaged, holds no tensors, or needs code to be read.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file at {path}")
    loaded = read_foreign(path, CheckpointError)
    state = plain_dict(loaded)
    if state is None:
        raise CheckpointError(f"{path} holds no state dict but a {type(loaded).__name__}")
    for wrapper in WRAPPERS:
        inner = plain_dict(state.get(wrapper))
        if inner is not None:
            state = inner
            break
    found = {name: value for name, value in state.items() if isinstance(value, Tensor | PickledArray)}
    if not found:
        raise CheckpointError(f"{path} holds no tensors")
    return _without_prefixes(plain_tensors(found, path, CheckpointError))


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


class Source:
    """Tensors that are taken one by one; what is missing, of another shape or left over is told at the end.

    Args:
        tensors: by the file's own names.
        where: what the messages call it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.where = where
        self.ignored: list[str] = []
        self._left = dict(tensors)
        self._missing: list[str] = []
        self._wrong: list[str] = []
        self._infinite: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self, start: str = "") -> list[str]:
        """Names that nobody took yet."""
        return [name for name in self._left if name.startswith(start)]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor that nobody took yet, or None."""
        found = self._left.get(name)
        return None if found is None else tuple(found.shape)

    def size(self, name: str, axis: int, ndim: int) -> int:
        """One axis of a tensor that everything else is measured by.

        Raises:
            CheckpointError: it is not there, has another number of axes, is empty, or the axis longer than
                :data:`LARGEST_AXIS`.
        """
        shape = self.shape(name)
        if shape is None:
            raise CheckpointError(f"{self.where} lacks {name}; it has {listed(sorted(self._left))}")
        if len(shape) != ndim or 0 in shape:
            raise CheckpointError(f"{self.where}: {name} is {shape}, expected {ndim} axes")
        if shape[axis] > LARGEST_AXIS:
            raise CheckpointError(f"{self.where}: {name} is {shape}, more than the {LARGEST_AXIS} that a task may have")
        return shape[axis]

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor in float32; zeros in its place, and a word at the end, if it is not as expected."""
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
        return torch.zeros(()).expand(tuple(shape))  # a file's sizes may be enormous: no memory for them

    def ignore(self, names: Iterable[str]) -> None:
        """Leave tensors out, for a reason that the layout's documentation gives."""
        for name in names:
            del self._left[name]
            self.ignored.append(name)

    def fork(self) -> Source:
        """The same tensors, to be looked at without being taken from here."""
        return Source(self._left, self.where)

    def check(self, fits: str, *, all_taken: bool = True) -> None:
        """Say all that was not as expected.

        Args:
            fits: what the file was compared with.
            all_taken: whether tensors that nobody took are unexpected.

        Raises:
            CheckpointError: something was.
        """
        parts = [
            f"{kind}: {listed(names)}"
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


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
