"""The server on a Ray cluster: engines as replicas that scale, behind an ingress that knows which holds which task."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from prompttune.errors import MissingExtraError

if importlib.util.find_spec("ray") is None:
    raise MissingExtraError("ray", "ray", "without it prompttune serve runs on one machine")

if TYPE_CHECKING:
    from prompttune.serve.ray_serve.deployments import Scaling, application, build

__all__ = ["Scaling", "application", "build"]


def __getattr__(name: str) -> Any:
    """Import at the first use: Ray's proxies load this package and do not need an engine."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("prompttune.serve.ray_serve.deployments"), name)
