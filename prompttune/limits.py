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
    return f"{name} must be {bounds_of(limits) or 'finite'}, not {value}"


def bounds_of(limits: Mapping[str, Any]) -> str:
    """The bounds in words, such as ``at least 1 and below 5``; empty without any."""
    return " and ".join(f"{words} {limits[key]}" for key, (words, _) in _TESTS.items() if key in limits)
