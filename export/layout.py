"""Shapes of task states and of a model's inputs: checking, and sizes that a model was built for.

A layout maps each state key to the shape of its tensor without the leading dimension. Integer entries are the same
for every task of an engine. Named entries (``"rank"``, ``"classes"``, ``"clusters"``) differ between tasks. Rows of a
bank (:mod:`prompttune.export.banks`) are padded to the largest resident task: with zeros, and with -inf for terms of
the score of a class or cluster, so that padding never wins (:data:`prompttune.axes.CHOICES`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from prompttune.axes import CLASSES as CLASSES
from prompttune.axes import CLUSTERS, RANK
from prompttune.errors import EngineError, UsageError, choose

Layout = Mapping[str, tuple[int | str, ...]]
Array = NDArray[np.float32]
State = Mapping[str, Array]

BATCH, TASKS, ASKED = "batch", "tasks", "asked"
CHOSEN, WIDTH = "chosen", "width"
"""Axes of a call: K tasks asked about each image, class rows that it needs, classes of its widest task."""
IMAGE, TASK_INDEX, LOGITS = "image", "task_index", "logits"
CLASS_ROWS, CLASS_INDEX = "class_rows", "class_index"
HEAD, _BANK, STATE = "head.", "bank.", "state."
"""Prefixes: keys of a head; model inputs of a bank; model inputs and outputs of an image state."""

DTYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
"""numpy dtype by bank precision; NumPy itself does not have bfloat16."""
FLOAT32 = np.dtype(np.float32)


def bank_dtype(precision: str) -> np.dtype[Any]:
    """numpy dtype of a bank precision; its name is the dtype of the model's inputs."""
    dtype: np.dtype[Any] = np.dtype(DTYPES[precision])
    return dtype


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of an input or output of an engine; a string in the shape names a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorSpec:
        """The inverse of :meth:`to_dict`."""
        return cls(str(values["name"]), str(values["dtype"]), tuple(values["shape"]))


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

    def fitting(self, axis: str, needed: int, what: str, least: int = 1) -> int:
        """The power of two to allocate for ``needed``, or ``least``, within the range of the axis; see
        :meth:`holding`."""
        rounded = self.most(axis, max(least, 1 << (needed - 1).bit_length()))
        return self.holding({axis: max(rounded, needed)}, what)[axis]


def bank_input(key: str) -> str:
    """Name of the model input for the bank of one state key."""
    return f"{_BANK}{key}"


def is_by_class(shape: tuple[int | str, ...]) -> bool:
    """Whether a state tensor of this shape has a row for each class."""
    return shape[:1] == (CLASSES,)


def is_bank_input(name: str) -> bool:
    """Whether a model input is the bank of a state key."""
    return name.startswith(_BANK)


def declare_inputs(layout: Layout, image_size: int, bank_precision: str = "fp32") -> list[TensorSpec]:
    """Every input of a multi-task graph, in order: image, task_index, the classes, then the bank in the layout's order.

    A baked graph has an empty layout here.
    """
    dtype = bank_dtype(bank_precision).name
    inputs = [
        TensorSpec(IMAGE, "float32", (BATCH, 3, image_size, image_size)),
        TensorSpec(TASK_INDEX, "int64", (BATCH, ASKED)),
    ]
    if layout:
        inputs += [
            TensorSpec(CLASS_ROWS, "int64", (CHOSEN,)),
            TensorSpec(CLASS_INDEX, "int64", (BATCH, ASKED, WIDTH)),
        ]
    for key, shape in layout.items():
        inputs.append(TensorSpec(bank_input(key), dtype, shape if is_by_class(shape) else (TASKS, *shape)))
    return inputs


def declare_outputs(classes: int | str = WIDTH, size: tuple[int, ...] = ()) -> list[TensorSpec]:
    """Every output of a graph. A baked graph has a fixed number of classes, maps have the ``size``."""
    return [TensorSpec(LOGITS, "float32", (BATCH, ASKED, classes, *size))]


def bind_axes(layout: Layout, shapes: Mapping[str, tuple[int, ...]], what: str) -> dict[str, int]:
    """Check the shapes of one task's state (leading dimension 1) and return the sizes of the named axes.

    Raises:
        EngineError: a key is missing or unknown, or a size differs from the layout; ``what`` names the task.
    """
    if shapes.keys() != layout.keys():
        differing = ", ".join(sorted(shapes.keys() ^ layout.keys()))
        raise EngineError(f"{what} does not fit the engine: only one side has these state tensors: {differing}")
    axes: dict[str, int] = {}
    for key, declared in layout.items():
        shape = shapes[key]
        bound = tuple(axes.get(axis, axis) if isinstance(axis, str) else axis for axis in declared)
        fits = len(shape) == len(bound) + 1 and shape[0] == 1
        for size, axis in zip(shape[1:], bound, strict=False):
            if isinstance(axis, str):
                axes[axis] = size
            fits = fits and (isinstance(axis, str) or size == axis)
        if not fits:
            expected = list(bound)
            raise EngineError(f"{what} does not fit the engine: {key} is {list(shape[1:])}, the engine has {expected}")
    return axes


def largest_axes(every: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sizes of the named axes that are large enough for all of the given tasks."""
    largest: dict[str, int] = {}
    for axes in every:
        for axis, size in axes.items():
            largest[axis] = max(size, largest.get(axis, 0))
    return largest


Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]
"""Smallest, likeliest and largest shape of an input."""

_CALL: dict[str, Range] = {BATCH: (1, 8, 32), ASKED: (1, 1, 4)}
MANY: Range = (1, 1, 32)
"""Tasks for an image where they only read its state; where each is a row of its own, a model has room for fewer."""
_ROOM = 2
"""An axis without a range gets this many times what the exported tasks need, so that larger tasks fit later ..."""
_LEAST = {TASKS: 64, RANK: 32, CLASSES: 4096, WIDTH: 256, CLUSTERS: 16}
"""... and at least room for this."""


def dynamic_axes(inputs: Sequence[TensorSpec]) -> list[str]:
    """Names of the dynamic axes of some inputs, each once, in order."""
    return list(dict.fromkeys(axis for spec in inputs for axis in spec.shape if isinstance(axis, str)))


def axis_ranges(
    inputs: Sequence[TensorSpec], needed: Mapping[str, int], asked: Mapping[str, Range]
) -> dict[str, Range]:
    """The range of every dynamic axis of a model.

    Args:
        inputs: the model's inputs.
        needed: axis → size that the tasks of the export need.
        asked: ranges that the user gave; they go before the defaults.

    Raises:
        UsageError: a range for an axis that the model does not have, or one that an exported task does not fit.
    """
    axes = dynamic_axes(inputs)
    for axis in asked:
        choose("dynamic axis", axis, axes)
    ranges = {axis: asked.get(axis) or _default(axis, needed) for axis in axes}
    if CHOSEN in ranges and CHOSEN not in asked:  # a call may ask for every task
        low, likely, _ = ranges[CHOSEN]
        ranges[CHOSEN] = low, likely, ranges[CLASSES][2]
    for axis, (low, _, high) in ranges.items():
        size = needed.get(axis, low)
        if size > high:
            raise UsageError(f"the axis {axis} may grow to {high}, but the tasks of this export need {size}")
    return ranges


def _default(axis: str, needed: Mapping[str, int]) -> Range:
    if axis in _CALL:
        return _CALL[axis]
    size = needed[axis]
    return 1, size, max(_ROOM * size, _LEAST.get(axis, 0))


def input_shapes(spec: TensorSpec, ranges: Mapping[str, Range]) -> Shapes:
    """Smallest, likeliest and largest shape of an input; fixed axes are the same in all three."""
    low, likely, high = (
        tuple(ranges[axis][which] if isinstance(axis, str) else axis for axis in spec.shape) for which in range(3)
    )
    return low, likely, high
