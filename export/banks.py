"""Banks: the states of many tasks as tensors of one model, and the inputs that choose among them.

A tensor of a state has a row for each task, ``bank.<key>`` [T, ...], except those of the head that have a row for each
class: the classes of all tasks lie one after the other, ``bank.head.weight`` [classes, D], so that a task pays for its
own classes, however wide another is. Row 0 of them is padding, which never wins. A call names the rows of the classes
that it needs once each, ``class_rows`` [R], and the place of each class of each row in them, ``class_index`` [B, K, C].

Engines of format version 2 and earlier have a row for each task in every tensor and answer one task for an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompttune.axes import CHOICES, CLASSES
from prompttune.export.layout import (
    CHOSEN,
    CLASS_INDEX,
    CLASS_ROWS,
    FLOAT32,
    TASK_INDEX,
    TASKS,
    WIDTH,
    Layout,
    Sizes,
    State,
    bind_axes,
    is_by_class,
    largest_axes,
)

_CHOSEN, _WIDTH = 256, 16
"""Least class rows and classes of a call, so that most calls differ in neither: a product with so few rows takes a
thousandth of the time of a backbone."""
Rows = dict[str, NDArray[Any]]
Index = dict[str, NDArray[np.int64]]
"""Inputs of a call beside the images: ``task_index`` [B, K], and where heads lie by class ``class_rows`` and
``class_index``."""


@dataclass(frozen=True)
class Place:
    """Where a task lies in a bank."""

    row: int
    first: int = 0
    """First of its rows among the classes of all tasks."""
    classes: int = 0
    """Number of its classes; 0 where heads do not lie by class."""


@dataclass(frozen=True)
class BankForm:
    """How the states of a layout lie in a bank; without ``by_class`` every tensor has a row for each task."""

    layout: Layout
    by_class: bool = True

    def lies_by_class(self, key: str) -> bool:
        """Whether a tensor has a row for each class instead of each task."""
        return self.by_class and is_by_class(self.layout[key])

    def needed(self, axes: Iterable[Mapping[str, int]]) -> dict[str, int]:
        """Sizes of the bank's axes that hold tasks of these sizes."""
        every = list(axes)
        needed = {TASKS: len(every), **largest_axes(every)}
        if self.by_class and CLASSES in needed:
            needed[CLASSES] = 1 + sum(one[CLASSES] for one in every)
        return needed

    def needed_for_all(self, axes: Iterable[Mapping[str, int]]) -> dict[str, int]:
        """The :meth:`needed` sizes, and those of a call that asks for all of these tasks."""
        every = list(axes)
        needed = self.needed(every)
        if not self.by_class or CLASSES not in needed:
            return needed
        return needed | {CHOSEN: needed[CLASSES], WIDTH: max(one[CLASSES] for one in every)}

    def how_many(self, sizes: Sizes, axes: Iterable[Mapping[str, int]]) -> int:
        """Number of the first tasks of these sizes that fit together into a model that was built for ``sizes``."""
        every = list(axes)
        for count in range(len(every), 1, -1):
            needed = self.needed_for_all(every[:count])
            if all(size <= sizes.most(axis, size) for axis, size in needed.items()):
                return count
        return min(1, len(every))

    def checked(self, shapes: Mapping[str, tuple[int, ...]], sizes: Sizes, what: str) -> dict[str, int]:
        """Sizes of the named axes of one task's state, which fit a model that was built for ``sizes``.

        Raises:
            EngineError: the state does not fit; ``what`` names the task.
        """
        axes = bind_axes(self.layout, shapes, what)
        if not self.by_class or CLASSES not in axes:
            return sizes.holding(axes, what)
        own = axes.pop(CLASSES)
        held = sizes.holding(axes, what)
        sizes.holding({CLASSES: own + 1, WIDTH: own}, what)
        return {**held, CLASSES: own}

    def empty(self, sizes: Mapping[str, int], dtype: np.dtype[Any] = FLOAT32) -> Rows:
        """A bank of padding, with the :meth:`needed` sizes.

        The operating system provides zeros as pages that take no memory until they are written, so unused rows are
        free.
        """
        bank: Rows = {}
        for key, shape in self.layout.items():
            axes = shape if self.lies_by_class(key) else (TASKS, *shape)
            bank[key] = np.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in axes], dtype=dtype)
            if padding := _padding(shape):
                bank[key].fill(padding)
        return bank

    def write(self, bank: Mapping[str, NDArray[Any]], place: Place, state: State) -> State:
        """Write one task's state, tensors [1, ...] by key; the rest of its row becomes padding.

        Returns:
            The state as views of the bank.
        """
        views: dict[str, NDArray[Any]] = {}
        for key, value in state.items():
            if self.lies_by_class(key):
                views[key] = bank[key][None, place.first : place.first + place.classes]
            else:
                row = bank[key][place.row : place.row + 1]
                row[...] = _padding(self.layout[key])
                views[key] = row[(slice(None), *(slice(size) for size in value.shape[1:]))]
            views[key][...] = value
        return views

    def slice_of(self, key: str, place: Place) -> slice:
        """Rows of a bank tensor that a place holds."""
        first, count = (place.first, place.classes) if self.lies_by_class(key) else (place.row, 1)
        return slice(first, first + count)

    def index(self, places: Sequence[Sequence[Place]], sizes: Sizes | None = None) -> Index:
        """Inputs of a call that asks K tasks about each image.

        Numbers of classes are rounded up to powers of two, so that calls have few different shapes.

        Args:
            places: K places for each of B images.
            sizes: sizes that the model was built for.
        """
        task_index = np.array([[place.row for place in row] for row in places], dtype=np.int64)
        if not self.by_class:
            return {TASK_INDEX: task_index}
        each = {place.row: place for row in places for place in row}
        sizes = sizes or Sizes()
        width = sizes.fitting(WIDTH, max(place.classes for place in each.values()), "a call", _WIDTH)
        count = 1 + sum(place.classes for place in each.values())
        chosen = np.zeros(sizes.fitting(CHOSEN, count, "a call", _CHOSEN), dtype=np.int64)
        table = np.zeros((len(each), width), dtype=np.int64)
        start = 1  # row 0 of the chosen ones is padding
        for number, place in enumerate(each.values()):
            chosen[start : start + place.classes] = np.arange(place.first, place.first + place.classes)
            table[number, : place.classes] = np.arange(start, start + place.classes)
            start += place.classes
        numbers = {row: number for number, row in enumerate(each)}
        rows = table[[[numbers[place.row] for place in row] for row in places]]  # [B, K, C]
        return {TASK_INDEX: task_index, CLASS_ROWS: chosen, CLASS_INDEX: rows}


@dataclass(frozen=True)
class StackedBank:
    """A bank of fixed tasks."""

    form: BankForm
    rows: Rows
    places: tuple[Place, ...]
    """Place of each task, in the order that they were given."""

    def table(self) -> NDArray[np.int64]:
        """The class rows of each task, [T, C]; C is the widest task's number of classes, 0 is padding."""
        table = np.zeros((len(self.places), max(place.classes for place in self.places)), dtype=np.int64)
        for row, place in zip(table, self.places, strict=True):
            row[: place.classes] = np.arange(place.first, place.first + place.classes)
        return table

    def index(self, tasks: Sequence[Sequence[int]], sizes: Sizes | None = None) -> Index:
        """See :meth:`BankForm.index`, for the numbers of the tasks."""
        return self.form.index([[self.places[task] for task in row] for row in tasks], sizes)


def stack_states(
    form: BankForm, states: Iterable[State], dtype: np.dtype[Any] = FLOAT32, sizes: Sizes | None = None
) -> StackedBank:
    """One bank that holds the given states, row i the i-th, within ``sizes``."""
    held = list(states)
    axes = [bind_axes(form.layout, {key: value.shape for key, value in state.items()}, "a state") for state in held]
    bank = form.empty((sizes or Sizes()).holding(form.needed(axes), "the bank"), dtype)
    places, first = [], 1
    for row, (state, sized) in enumerate(zip(held, axes, strict=True)):
        classes = sized.get(CLASSES, 0) if form.by_class else 0
        places.append(Place(row, first if classes else 0, classes))
        first += classes
        form.write(bank, places[-1], state)
    return StackedBank(form, bank, tuple(places))


def needed_sizes(layout: Layout, states: Mapping[str, State]) -> dict[str, int]:
    """The sizes of the bank's axes that hold all of the given tasks, and of a call that asks for all of them."""
    bound = [bind_axes(layout, {key: v.shape for key, v in state.items()}, name) for name, state in states.items()]
    return BankForm(layout).needed_for_all(bound)


def _padding(shape: tuple[int | str, ...]) -> float:
    return -np.inf if len(shape) == 1 and shape[0] in CHOICES else 0.0
