"""Data sets by the first part of their name, ``demo`` in ``demo/digits``; those of other packages included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prompttune.data.base import Parts
from prompttune.errors import UsageError
from prompttune.registry import Registry

ReadParts = Callable[[str, str | None], Parts]
"""Reads the splits of a data set, from the rest of its name and ``--data-root``.

It raises :class:`~prompttune.errors.DataError` for data that it cannot read.
"""


def _check(name: str, read: Any) -> None:
    if name != name.lower() or not callable(read):  # a prefix is looked up in lower case
        raise UsageError(f"a data set is registered by a name in lower case and a function, not by {name!r}, {read!r}")


DATA_SETS: Registry[ReadParts] = Registry("data set", "prompttune.data_sets", _check)
DATA_SETS.add("demo", "prompttune.data.builtin:load_builtin")
DATA_SETS.add("torch", "prompttune.data.timm_factory:load_torch")
DATA_SETS.add("hfds", "prompttune.data.timm_factory:load_hfds")
DATA_SETS.add("wds", "prompttune.data.shards:load_wds")
for _kind in ("vtab", "fgvc", "tv"):
    DATA_SETS.add(_kind, f"prompttune.data.benchmarks:load_{_kind}")
