"""The methods by name. A method is one config dataclass and one module behind ``methods/base.py``."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Mapping
from typing import Any

from prompttune.errors import UsageError
from prompttune.methods.adapter import AdapterConfig
from prompttune.methods.adaptformer import AdaptFormerConfig
from prompttune.methods.base import Features, Layout, Method, MethodConfig, State
from prompttune.methods.damvp import DAMVPConfig
from prompttune.methods.describing import MethodList, methods
from prompttune.methods.e2vpt import E2VPTConfig
from prompttune.methods.expres import EXPRESConfig
from prompttune.methods.full import FullConfig
from prompttune.methods.gapt import GaPTConfig
from prompttune.methods.linear import LinearConfig
from prompttune.methods.lora import LoRAConfig
from prompttune.methods.lspt import LSPTConfig
from prompttune.methods.over_modules import BitFitConfig
from prompttune.methods.reader import ReaderConfig
from prompttune.methods.registry import METHODS, register
from prompttune.methods.sa2vp import SA2VPConfig
from prompttune.methods.side import SideConfig
from prompttune.methods.ssf import SSFConfig
from prompttune.methods.vpt import VPTDeepConfig, VPTShallowConfig
from prompttune.methods.vqt import VQTConfig

for _config in (
    SA2VPConfig,
    LSPTConfig,
    GaPTConfig,
    VPTShallowConfig,
    VPTDeepConfig,
    E2VPTConfig,
    EXPRESConfig,
    VQTConfig,
    AdaptFormerConfig,
    AdapterConfig,
    LoRAConfig,
    SSFConfig,
    BitFitConfig,
    ReaderConfig,
    SideConfig,
    LinearConfig,
    FullConfig,
    DAMVPConfig,
):
    register(_config)


def config_from_dict(method: str, settings: Mapping[str, Any]) -> MethodConfig:
    """The config of ``method`` with ``settings`` replacing its defaults.

    Raises:
        UsageError: the method, a setting or a value is unknown.
    """
    config = METHODS[method]
    known = [field.name for field in dataclasses.fields(config)]
    for name in settings:
        if name not in known:
            own = ", ".join(known) or "none"
            raise UsageError(f"method {method} has no setting {name!r}; its settings: {own}")
    return config(**settings)


class _Callable(types.ModuleType):
    """Makes ``prompttune.methods`` both this package and a function that lists the methods."""

    def __call__(self) -> MethodList:
        """See :func:`prompttune.methods.describing.methods`."""
        return methods()


sys.modules[__name__].__class__ = _Callable


__all__ = [
    "METHODS",
    "AdaptFormerConfig",
    "AdapterConfig",
    "BitFitConfig",
    "DAMVPConfig",
    "E2VPTConfig",
    "EXPRESConfig",
    "Features",
    "FullConfig",
    "GaPTConfig",
    "LSPTConfig",
    "Layout",
    "LinearConfig",
    "LoRAConfig",
    "Method",
    "MethodConfig",
    "ReaderConfig",
    "SA2VPConfig",
    "SSFConfig",
    "SideConfig",
    "State",
    "VPTDeepConfig",
    "VPTShallowConfig",
    "VQTConfig",
    "config_from_dict",
    "register",
]
