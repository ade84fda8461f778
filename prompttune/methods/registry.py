"""The methods by name, those of other packages included, and what every method must keep to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from prompttune.errors import UsageError
from prompttune.methods.base import MethodConfig
from prompttune.registry import Registry
from prompttune.settings import Setting, settings_of

Config = TypeVar("Config", bound=type[MethodConfig])

_OPTIONS = """
augment augment_settings auto_augment backbone backbone_arg batch_size cache cache_disk cache_memory class_weights
color_jitter compile config crop_mode crop_pct data data_root device devices epochs eval_every grad_clip head
head_channels help hflip image_size init_from interpolation json label_smoothing limit lr max_corrupt method
method_settings min_lr momentum normalisation optimizer output overwrite patience precision quiet random_crop
random_erase ratio_max ratio_min reduce_zero_label resume scale_max scale_min schedule seed solve task_type tasks
tensorboard val_fraction vflip warmup_epochs weight_decay weights workers
"""
RESERVED = frozenset(_OPTIONS.split())
"""Names that ``prompttune train`` takes: the settings of all methods share one namespace with them."""


def register(config: Config) -> Config:
    """Add a method; also a class decorator. A class that a notebook defines anew replaces the old one.

    An entry point of the group ``prompttune.methods`` whose value is the config's class does the same.

    Raises:
        UsageError: the name is taken, or the settings cannot become options beside those of the others.
    """
    METHODS.add(getattr(config, "method", ""), config)
    return config


def method_fields(methods: Mapping[str, type[MethodConfig]] | None = None) -> dict[str, dict[str, Setting]]:
    """The settings of every method: setting name → method name → setting."""
    found: dict[str, dict[str, Setting]] = {}
    for method, cls in (METHODS if methods is None else methods).items():
        for name, known in settings_of(cls).items():
            found.setdefault(name, {})[method] = known
    return found


def _check(name: str, config: Any) -> None:
    """Raise :class:`UsageError` for a config without a name, or with a setting that cannot become an option."""
    where = f"{config.__module__}.{config.__qualname__}"
    if not isinstance(getattr(config, "method", None), str) or not config.method:
        raise UsageError(f"{where} has no name: give it method = '...'")
    if config.method != name:
        raise UsageError(f"{where} is the method {config.method}, not {name}: register it under its own name")
    if "__dataclass_params__" not in vars(config):
        raise UsageError(f"{where} is not a dataclass: put @dataclass(frozen=True) in front of it")
    known = settings_of(config)
    fields = [field.name for field in dataclasses.fields(config)]
    if plain := [name for name in fields if name not in known or known[name].type is Path]:
        raise UsageError(f"{where}: {plain[0]} must be an int, float, bool, str or a tuple of them")
    others = method_fields(METHODS.registered())
    for field, setting in known.items():
        if setting.required:
            raise UsageError(f"{where}: {field} needs a default")
        if field in RESERVED:
            raise UsageError(f"{where}: {field} is an option of training: give the setting another name")
        for method, other in others.get(field, {}).items():
            if method != name and (other.type, other.is_tuple) != (setting.type, setting.is_tuple):
                raise UsageError(
                    f"{where}: {field} is of another type in the method {method}: give the setting another name"
                )


METHODS: Registry[type[MethodConfig]] = Registry("method", "prompttune.methods", _check, MethodConfig)
