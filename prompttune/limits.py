"""Bounds of settings, told in the metadata of dataclass fields: ``low``, ``above``, ``high``, ``below``."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

_TESTS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}

LIMITS = _TESTS.keys()


def out_of_bounds(name: str, value: float, limits: Mapping[str, Any]) -> str | None:
    """One line on a number that is not finite or not within ``limits``; other keys of them are ignored."""
    told = {key: limits[key] for key in _TESTS if key in limits}
    if math.isfinite(value) and all(_TESTS[key][1](value, limit) for key, limit in told.items()):
        return None
    wanted = " and ".join(f"{_TESTS[key][0]} {limit}" for key, limit in told.items())
    return f"{name} must be {wanted or 'finite'}, not {value}"
