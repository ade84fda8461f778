"""Click options made from settings dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from prompttune.errors import UsageError
from prompttune.settings import Setting, all_settings, settings_of

NOTHING = "none"
"""Value that unsets an optional setting."""
GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


class SettingType(click.ParamType[Any]):
    """Converter from command line text to a setting's value; the text ``unset`` gives None."""

    def __init__(self, known: Setting, unset: str | None = None) -> None:
        self.known = known
        self.unset = unset
        self.name = {int: "integer", float: "number", str: "text", Path: "path"}[known.type]

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002
        """Placeholder of the value in the help."""
        return f"{self.name},…".upper() if self.known.is_tuple else self.name.upper()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the text to the setting's type; raises click's error if that fails."""
        if value == self.unset:
            return None
        try:
            return self.known.coerce(value)
        except UsageError as problem:
            self.fail(str(problem), param, ctx)


class SettingOption(click.Option):
    """An option for one setting; its value is None if it is not given.

    Other metadata of the field: ``short``, a name of one letter; ``metavar``; ``envvar``; ``repeat``, for a tuple whose
    items are given one by one; ``path``, ``file`` or ``folder``; ``shown``, the default as text; ``bare``, the value of
    the option without a value.

    Args:
        known: the setting.
        section: section of the help.
        text: help text.
        over_file: whether the option overrides a settings file, so that flags can be switched off and values unset.
    """

    def __init__(self, known: Setting, section: str, text: str, over_file: bool = False) -> None:
        self.section = section
        self.known = known
        told = known.metadata
        self.unset = NOTHING if over_file and known.optional else None
        one = dataclasses.replace(known, is_tuple=False) if told.get("repeat") else known
        name, kind = known.option, _type(one, self.unset)
        if known.type is bool:
            name += f"/--no-{name.removeprefix('--')}" * (over_file or bool(known.default))
        flag: dict[str, Any] = {"is_flag": True} if known.type is bool else {}
        if "bare" in told:
            flag = {"is_flag": False, "flag_value": told["bare"]}
        super().__init__(
            [name, *filter(None, [told.get("short")]), known.key],
            type=kind,
            default=None,
            help=text,
            show_default=False,
            metavar=told.get("metavar"),
            envvar=told.get("envvar"),
            show_envvar=True,
            multiple=bool(told.get("repeat")),
            **flag,
        )

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Process the value like click; the word ``none`` becomes None."""
        made = super().process_value(ctx, value)
        return None if made is not None and made == self.unset else made


def _type(known: Setting, unset: str | None) -> click.ParamType[Any] | None:
    """Converter for the text of an option; None for a flag."""
    if known.type is bool:
        return None
    if known.choices is not None and not known.is_tuple:
        return click.Choice([*known.choices, *filter(None, [unset])])
    if (kind := known.metadata.get("path")) is not None:
        return click.Path(file_okay=kind != "folder", dir_okay=kind != "file", path_type=Path)
    return SettingType(known, unset)


def options_of(*kinds: type[Any], only: Collection[str] = ()) -> list[click.Parameter]:
    """One option for each setting of dataclasses, in the sections that their fields name; ``only`` some of them."""
    return [
        SettingOption(known, known.section or "Options", f"{known.help}{_told(known)}")
        for kind in kinds
        for key, known in all_settings(kind).items()
        if not only or key in only
    ]


def over_file(settings: Iterable[Setting], section: str) -> list[click.Parameter]:
    """One option for each setting; it overrides the settings file."""
    return [
        SettingOption(known, known.section or section, f"{known.help}{_told(known, True)}", True) for known in settings
    ]


def method_options() -> list[click.Parameter]:
    """One option for each setting of any method; the help names the methods that have it."""
    from prompttune.methods.registry import method_fields

    options: list[click.Parameter] = []
    for owners in method_fields().values():
        first = next(iter(owners.values()))
        helps = list(dict.fromkeys(known.help for known in owners.values()))
        defaults = {method: known.default for method, known in owners.items()}
        if len(set(map(repr, defaults.values()))) == 1:
            default = _default(first.default)
        else:
            default = f"  [default: {', '.join(f'{_spelled(value)} ({name})' for name, value in defaults.items())}]"
        text = f"{'; '.join(helps)}{default}  [{', '.join(owners)}]"
        options.append(SettingOption(_shared(list(owners.values())), "Method settings", text, True))
    return options


def _shared(owners: list[Setting]) -> Setting:
    """One option for settings with the same name: it accepts any method's values; each method refuses others."""
    choices = [tuple(known.choices or ()) for known in owners]
    every = tuple(dict.fromkeys(value for values in choices for value in values)) if all(choices) else None
    optional = any(known.optional for known in owners)
    return dataclasses.replace(owners[0], choices=every, optional=optional, metadata={})


def training_options() -> list[click.Parameter]:
    """One option for each setting of a training run."""
    from prompttune.training.config import TrainConfig, augment_fields

    own = over_file(settings_of(TrainConfig).values(), "Training")
    augmentation = [SettingOption(known, "Augmentation", known.help, True) for known in augment_fields().values()]
    return [*own, *augmentation, *method_options()]


def _told(known: Setting, flags: bool = False) -> str:
    """Default and bounds in brackets; the default of a flag that is off only with ``flags``."""
    nothing = known.default in (None, (), "") or (known.default is False and not flags)
    default = known.metadata.get("shown", "" if nothing else _spelled(known.default))
    return "".join(f"  [{words}]" for words in (f"default: {default}" * bool(default), known.bounds) if words)


def _default(value: Any) -> str:
    return "" if value is None else f"  [default: {_spelled(value)}]"


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ",".join(str(item) for item in value)
    return NOTHING if value is None else str(value)


def given_settings(ctx: click.Context) -> dict[str, Any]:
    """Settings from the command line or the environment, by :attr:`Setting.key`."""
    return {
        option.known.key: ctx.params[option.known.key]
        for option in ctx.command.get_params(ctx)
        if isinstance(option, SettingOption) and ctx.get_parameter_source(option.known.key) in GIVEN
    }
