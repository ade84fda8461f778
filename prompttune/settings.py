"""Settings: dataclass fields with help, choices and bounds, from which options, file readers and checks are made."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prompttune.errors import UsageError, choose

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass."""

    name: str
    type: type
    """A key of :data:`KINDS`, or the type of a tuple's items."""
    default: Any
    help: str = ""
    choices: Collection[Any] | None = None
    """Allowed values; a collection may grow in the meantime."""
    optional: bool = False
    """Whether None is a value."""
    is_tuple: bool = False
    length: int | None = None
    """Number of items of a tuple; None for any number."""
    required: bool = False
    must_match_on_resume: bool = True
    """Whether a resumed run needs the same value."""
    grows: bool = False
    """Whether a resumed run may have a larger value."""
    section: str = ""
    """Section of the help for its option."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The bounds, and other arguments of :func:`setting`."""

    @property
    def key(self) -> str:
        """Name among the settings of a command: that of its option, with underscores."""
        return str(self.metadata.get("option", self.name))

    @property
    def option(self) -> str:
        """Name on the command line."""
        return "--" + self.key.replace("_", "-")

    @property
    def bounds(self) -> str:
        """The bounds as text, such as ``at least 1 and below 5``; empty without bounds."""
        told = ((words, self.metadata.get(key)) for key, (words, _) in _BOUNDS.items())
        return " and ".join(f"{words} {limit}" for words, limit in told if limit is not None)

    def coerce(self, value: Any, strict: bool = False) -> Any:
        """Convert a value to the field's type and check it against its choices and bounds.

        Args:
            value: value from Python, YAML or the command line.
            strict: whether to refuse text for a number, which YAML 1.1 needs for 5e-3, and a single value for a tuple.

        Raises:
            UsageError: the conversion would lose information, or the value is not allowed; one line that names the
                setting.
        """
        if read := self.metadata.get("read"):
            return read(value)
        if value is None:
            if not self.optional:
                raise UsageError(f"{self.name} needs {KINDS[self.type]}, not nothing")
            return None
        if not self.is_tuple:
            return self._scalar(value, strict)
        if not isinstance(value, list | tuple):
            if strict:
                raise UsageError(f"{self.name} must be a list, each item {KINDS[self.type]}, not {value!r}")
            value = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
        if self.length is not None and len(value) != self.length:
            raise UsageError(f"{self.name} needs {self.length} values, not {len(value)}")
        return tuple(self._scalar(item, strict) for item in value)

    def _scalar(self, value: Any, strict: bool) -> Any:
        refused = UsageError(f"{self.name} must be {KINDS[self.type]}, not {value!r}")
        if self.type is bool and isinstance(value, str) and not strict:
            value = {"true": True, "false": False}.get(value.lower(), value)
        if self.type is bool or isinstance(value, bool):
            if self.type is not bool or not isinstance(value, bool):
                raise refused
            return value
        if strict and isinstance(value, str) is not (self.type is str):
            raise refused
        try:
            plain = self.type is not str or isinstance(value, str | int | float | os.PathLike)
            made = self.type(value) if plain else None
        except (TypeError, ValueError, OverflowError):
            raise refused from None
        if made is None or (self.type is int and isinstance(value, float) and made != value):
            raise refused
        if self.choices is not None:
            choose(self.name.replace("_", " "), made, self.choices)
        if isinstance(made, int | float) and not self._is_within(made):
            raise UsageError(f"{self.name} must be {self.bounds or 'finite'}, not {made}")
        return made

    def _is_within(self, number: float) -> bool:
        limits = {key: limit for key in _BOUNDS if (limit := self.metadata.get(key)) is not None}
        return math.isfinite(number) and all(_BOUNDS[key][1](number, limit) for key, limit in limits.items())


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",  # noqa: A002
    choices: Collection[Any] | None = None,
    **metadata: Any,
) -> Any:
    """A dataclass field with help text.

    Args:
        default: the default value; a setting without it is required.
        help: text for the command line and errors.
        choices: allowed values.
        metadata: ``low``, ``above``, ``high``, ``below``: bounds of a number. ``must_match_on_resume=False``: a
            resumed run may have another value; ``grows=True``: it may have a larger one. ``kind``: the type on the
            command line where the field takes more in Python, and ``read``, which brings any of them to a value and
            leaves a value as it is. ``section``: headline of the help. ``option``: name of the option where it is not
            the field's. The others are about the option alone, see :class:`prompttune.cli.options.SettingOption`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, **metadata})


def part(kind: Callable[[], Any], **metadata: Any) -> Any:
    """A field that holds another settings dataclass, whose settings are among those of the outer one."""
    return dataclasses.field(default_factory=kind, metadata={"part": True, **metadata})


def settle(instance: Any, strict: bool = False) -> None:
    """Convert every setting of a frozen dataclass to its type, see :meth:`Setting.coerce`; for ``__post_init__``."""
    for name, known in settings_of(type(instance)).items():
        object.__setattr__(instance, name, known.coerce(getattr(instance, name), strict))


def settings_of(cls: type[Any]) -> dict[str, Setting]:
    """The fields of a settings dataclass with plain values, by name, in their order.

    Fields of any other type (a mapping, another dataclass) are left out.
    """
    key: Any = cls  # mypy does not treat type[Any] as hashable
    return dict(_read_fields(key))


@functools.cache
def _read_fields(cls: Any) -> dict[str, Setting]:
    """See :func:`settings_of`; cached for each class, since a benchmark makes thousands of configs."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Setting] = {}
    for field in dataclasses.fields(cls):
        told = dict(field.metadata)
        if (kind := _read_type(told.pop("kind", hints[field.name]))) is None or not field.init:
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
            help=told.pop("help", ""),
            choices=told.pop("choices", None),
            optional=optional,
            is_tuple=is_tuple,
            length=length,
            required=required,
            must_match_on_resume=told.pop("must_match_on_resume", True),
            grows=told.pop("grows", False),
            section=told.pop("section", ""),
            metadata=told,
        )
    return found


def _read_type(hint: Any) -> tuple[type, bool, bool, int | None] | None:
    """Item type, whether None is allowed, whether it is a tuple, and its length; None for other types."""
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
        return (items[0], optional, True, length) if items[0] in KINDS else None
    return (hint, optional, False, None) if hint in KINDS else None


def _parts(cls: type[Any]) -> dict[str, tuple[type[Any], dataclasses.Field[Any]]]:
    hints = typing.get_type_hints(cls)
    return {field.name: (hints[field.name], field) for field in dataclasses.fields(cls) if field.metadata.get("part")}


def all_settings(cls: type[Any]) -> dict[str, Setting]:
    """The settings with help, by :attr:`Setting.key`, including those of the parts."""
    found = {known.key: known for known in settings_of(cls).values() if known.help}
    for kind, _ in _parts(cls).values():
        found |= all_settings(kind)
    return found


Made = TypeVar("Made")


def make(cls: type[Made], values: Mapping[str, Any]) -> Made:
    """Create an instance from values by :attr:`Setting.key`, including parts; values of other classes are ignored."""
    return cls(**_fields(cls, values))


def _fields(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    known, parts = settings_of(cls), _parts(cls)
    found = {}
    for field in dataclasses.fields(cls):
        key = known[field.name].key if field.name in known else field.name
        if field.name in parts:
            default: Any = field.default_factory() if callable(field.default_factory) else None
            found[field.name] = dataclasses.replace(default, **_fields(parts[field.name][0], values))
        elif key in values:
            found[field.name] = values[key]
    return found


def resume_values(instance: Any) -> dict[str, Any]:
    """Values that a resumed run must share, by option without hyphens, as plain values; None for a flag that is off."""
    found = {}
    for name, known in settings_of(type(instance)).items():
        if known.must_match_on_resume:
            found[known.option.removeprefix("--")] = _plain(getattr(instance, name))
    for name, (_, field) in _parts(type(instance)).items():
        if field.metadata.get("must_match_on_resume", True):
            found |= resume_values(getattr(instance, name))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if value is False else value if isinstance(value, int | float | str | None) else str(value)


def coerce_all(values: Mapping[str, Any], settings: Mapping[str, Setting], kind: str) -> dict[str, Any]:
    """Convert named values to their fields' types.

    Raises:
        UsageError: a name is not in ``settings`` (``kind`` describes these), or a value does not fit.
    """
    return {name: settings[choose(kind, name, settings)].coerce(value) for name, value in values.items()}
