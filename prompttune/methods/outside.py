"""What a method from outside the package must keep to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from prompttune.errors import UsageError
from prompttune.methods.base import MethodConfig
from prompttune.settings import settings_of

OPTIONS = ("config", "help", "json", "overwrite", "quiet", "resume", "tasks")
"""Options of ``prompttune train`` beside the settings."""


def check_config(config: Any) -> None:
    """Check the class of a method's settings before it is registered.

    Raises:
        UsageError: it is not one, or a setting has no default, a type that no option has, or a name that stands for
            something else.
    """
    # The settings of all methods share one namespace with those of training, which is built on this package.
    from prompttune.methods import METHODS
    from prompttune.training.config import augment_fields, method_fields

    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise UsageError(f"a method is registered by its config, a subclass of MethodConfig, not by {config!r}")
    where = f"{config.__module__}.{config.__qualname__}"
    if not isinstance(getattr(config, "method", None), str) or not config.method:
        raise UsageError(f"{where} has no name: give it method = '...'")
    if "__dataclass_params__" not in vars(config):
        raise UsageError(f"{where} is not a dataclass: put @dataclass(frozen=True) in front of it")
    known = settings_of(config)
    fields = [field.name for field in dataclasses.fields(config)]
    if plain := [name for name in fields if name not in known or known[name].type is Path]:
        raise UsageError(f"{where}: {plain[0]} must be an int, float, bool, str or a tuple of them")
    others = method_fields(METHODS.registered())
    for name, setting in known.items():
        if setting.required:
            raise UsageError(f"{where}: {name} needs a default")
        if name in OPTIONS or name in _training_names() or name in augment_fields():
            raise UsageError(f"{where}: {name} is an option of training: give the setting another name")
        for method, other in others.get(name, {}).items():
            if method != config.method and (other.type, other.is_tuple) != (setting.type, setting.is_tuple):
                raise UsageError(
                    f"{where}: {name} is of another type in the method {method}: give the setting another name"
                )


def _training_names() -> list[str]:
    from prompttune.training.config import TrainConfig

    return [field.name for field in dataclasses.fields(TrainConfig)]
