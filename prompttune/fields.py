"""Dataclass fields as settings: their help and choices, and values from YAML or Python brought to their types.

A settings dataclass keeps, in each field's metadata, ``help`` and optionally ``choices``; the command line and the
YAML reader are generated from that.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from prompttune.errors import UsageError, choose

SCALARS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass."""

    name: str
    type: type
    """``int``, ``float``, ``bool``, ``str``, or the type of a tuple's items."""
    default: Any
    help: str = ""
    choices: Collection[Any] | None = None
    """Values to choose from; a collection may grow meanwhile."""
    optional: bool = False
    """Whether None is a value."""
    is_tuple: bool = False
    length: int | None = None
    """Number of items of a tuple, None for any number."""
    required: bool = False
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def option(self) -> str:
        """Name on the command line."""
        return "--" + self.name.replace("_", "-")

    def coerce(self, value: Any) -> Any:
        """Bring a value to the field's type; raise :class:`UsageError` if that loses anything."""
        if read := self.metadata.get("read"):
            return read(value)
        if value is None:
            if not self.optional:
                raise UsageError(f"{self.name} needs {SCALARS[self.type]}, not nothing")
            return None
        if not self.is_tuple:
            return self._scalar(value)
        if not isinstance(value, list | tuple):
            value = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
        if self.length is not None and len(value) != self.length:
            raise UsageError(f"{self.name} needs {self.length} values, not {len(value)}")
        return tuple(self._scalar(item) for item in value)

    def _scalar(self, value: Any) -> Any:
        refused = UsageError(f"{self.name} must be {SCALARS[self.type]}, not {value!r}")
        if self.type is bool or isinstance(value, bool):
            if self.type is not bool or not isinstance(value, bool):
                raise refused
            return value
        try:
            # YAML 1.1 reads 5e-3 as text, so text that spells a number is taken as that number
            plain = self.type is not str or isinstance(value, str | int | float | os.PathLike)
            made = self.type(value) if plain else None
        except (TypeError, ValueError, OverflowError):
            raise refused from None
        if made is None or (self.type is int and isinstance(value, float) and made != value):
            raise refused
        if self.choices is not None:
            choose(self.name.replace("_", " "), made, self.choices)
        return made


def setting(default: Any = dataclasses.MISSING, *, help: str, **metadata: Any) -> Any:  # noqa: A002
    """A dataclass field with help text; ``choices`` and other metadata as keywords.

    ``kind`` is the type on the command line where the field takes more in Python, and ``read`` brings that to a value.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def settings_of(cls: type[Any]) -> dict[str, Setting]:
    """The fields of a settings dataclass that hold plain values, by name, in their order.

    Fields of any other type (a mapping, another dataclass) are left out.
    """
    key: Any = cls  # mypy takes no type[Any] for hashable
    return dict(_read_fields(key))


@functools.cache
def _read_fields(cls: Any) -> dict[str, Setting]:
    """See :func:`settings_of`; once for each class, since a benchmark makes thousands of configs."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Setting] = {}
    for field in dataclasses.fields(cls):
        if (kind := _read_type(field.metadata.get("kind", hints[field.name]))) is None or not field.init:
            continue
        made, optional, is_tuple, length = kind
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = None if required else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Setting(
            name=field.name,
            type=made,
            default=default,
            help=str(field.metadata.get("help", "")),
            choices=field.metadata.get("choices"),
            optional=optional,
            is_tuple=is_tuple,
            length=length,
            required=required,
            metadata=field.metadata,
        )
    return found


def _read_type(hint: Any) -> tuple[type, bool, bool, int | None] | None:
    """Item type, whether None is allowed, whether it is a tuple and how long; None for other types."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not types.NoneType]
        optional = len(arms) < len(typing.get_args(hint))
        if len(arms) != 1:
            return None
        hint = arms[0]
    if typing.get_origin(hint) is typing.Literal:
        hint = type(typing.get_args(hint)[0])
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        length = None if len(items) == 2 and items[1] is Ellipsis else len(items)
        return (items[0], optional, True, length) if items[0] in SCALARS else None
    return (hint, optional, False, None) if hint in SCALARS else None


def coerce_all(values: Mapping[str, Any], settings: Mapping[str, Setting], kind: str) -> dict[str, Any]:
    """Bring named values to their fields' types.

    Raises:
        UsageError: a name is not one of ``settings`` (``kind`` says of what), or a value does not fit.
    """
    return {name: settings[choose(kind, name, settings)].coerce(value) for name, value in values.items()}
