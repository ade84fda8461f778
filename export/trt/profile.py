"""Sizes that a plan is built for: smallest, likeliest and largest size of each dynamic axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prompttune.errors import EngineError, UsageError, choose
from prompttune.export.layout import BATCH, TASKS, Layout, State, TensorSpec, bind_axes, largest_axes
from prompttune.export.sizes import Range as Range

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]
"""Smallest, likeliest and largest shape of an input."""

_BATCH: Range = (1, 8, 32)
_ROOM = 2
"""An axis without a range gets this many times what the exported tasks need, so that larger tasks fit later ..."""
_LEAST = {TASKS: 64, "rank": 32, "classes": 256, "clusters": 16}
"""... and at least room for this."""


def dynamic_axes(inputs: Sequence[TensorSpec]) -> list[str]:
    """Names of the dynamic axes of some inputs, each once, in order."""
    return list(dict.fromkeys(axis for spec in inputs for axis in spec.shape if isinstance(axis, str)))


def needed_sizes(layout: Layout, states: Mapping[str, State]) -> dict[str, int]:
    """The sizes of the axis tasks and of the layout's named axes that hold all of the given tasks."""
    bound = [bind_axes(layout, {key: v.shape for key, v in state.items()}, name) for name, state in states.items()]
    return {TASKS: len(states), **largest_axes(bound)}


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
    for axis, (low, _, high) in ranges.items():
        size = needed.get(axis, low)
        if size > high:
            raise UsageError(f"the axis {axis} may grow to {high}, but the tasks of this export need {size}")
    return ranges


def _default(axis: str, needed: Mapping[str, int]) -> Range:
    if axis == BATCH:
        return _BATCH
    size = needed[axis]
    return 1, size, max(_ROOM * size, _LEAST.get(axis, 0))


def input_shapes(spec: TensorSpec, ranges: Mapping[str, Range]) -> Shapes:
    """Smallest, likeliest and largest shape of an input; fixed axes are the same in all three."""
    low, likely, high = (
        tuple(ranges[axis][which] if isinstance(axis, str) else axis for axis in spec.shape) for which in range(3)
    )
    return low, likely, high


def check_call(inputs: Sequence[TensorSpec], ranges: Mapping[str, Range], shapes: Mapping[str, Shape]) -> None:
    """Refuse a call that a plan was not built for.

    Args:
        inputs: the declared inputs.
        ranges: what the plan was built for.
        shapes: input → its shape in this call.

    Raises:
        EngineError: an input is missing or unknown, an axis is outside its range, or a fixed size differs.
    """
    declared = {spec.name: spec.shape for spec in inputs}
    if declared.keys() != shapes.keys():
        differing = ", ".join(sorted(declared.keys() ^ shapes.keys()))
        raise EngineError(f"these inputs are on one side only, of the engine or of the call: {differing}")
    for name, wanted in declared.items():
        shape = shapes[name]
        if len(shape) != len(wanted) or any(
            isinstance(axis, int) and size != axis for size, axis in zip(shape, wanted, strict=True)
        ):
            raise EngineError(f"the input {name} is {list(shape)}, the engine takes {list(wanted)}")
        for size, axis in zip(shape, wanted, strict=True):
            if isinstance(axis, str) and not ranges[axis][0] <= size <= ranges[axis][2]:
                low, _, high = ranges[axis]
                raise EngineError(
                    f"the axis {axis} is {size} in this call, the engine was built for {low} to {high}: "
                    f"export it again with a range of {axis} that holds {size}"
                )
