"""Optional libraries, imported where they are used; each caller names an alternative for the error message."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from prompttune.errors import MissingExtraError


def library(module: str, extra: str, instead: str) -> Any:
    """The package of a module that an extra installs, with this module loaded.

    Raises:
        MissingExtraError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(package, extra, instead) from None
    return sys.modules[package]
