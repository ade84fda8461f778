"""Names of a package that are imported at their first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose public names are defined in other modules.

    Args:
        package: its ``__name__``.
        names: module of each public name, followed by ``:other`` if the name differs there, or by ``:`` if it is the
            module itself.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, colon, other = names[name].partition(":")
        value = importlib.import_module(module)
        if other or not colon:
            value = getattr(value, other or name)
        setattr(sys.modules[package], name, value)
        return value

    return find
