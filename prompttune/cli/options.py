"""Click options out of settings dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import click
from click.core import ParameterSource

from prompttune.errors import UsageError
from prompttune.settings import Setting, settings_of
from prompttune.training.config import TrainConfig, augment_fields, method_fields

NOTHING = "none"
"""How an option is told to have no value."""
DATA_SETTINGS = ("data", "data_root", "val_fraction", "reduce_zero_label", "limit", "max_corrupt", "workers")
EVALUATION_TRANSFORM = ("crop_pct", "crop_mode", "interpolation", "normalisation")
DEVICE_SETTINGS = ("precision", "device", "devices", "compile", "tensorboard")


class SettingType(click.ParamType[Any]):
    """Text of the command line to a setting's value."""

    def __init__(self, known: Setting) -> None:
        self.known = known
        self.name = {int: "integer", float: "number", str: "text"}[known.type]

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002
        """What stands for the value in the help."""
        return f"{self.name},…".upper() if self.known.is_tuple else self.name.upper()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Bring the text to the setting's type, or fail as click does."""
        if self.known.optional and value == NOTHING:
            return None
        try:
            return self.known.coerce(value)
        except UsageError as problem:
            self.fail(str(problem), param, ctx)


class SettingOption(click.Option):
    """An option that carries one setting; ``section`` is its place in the help."""

    def __init__(self, known: Setting, section: str, text: str) -> None:
        self.section = section
        name = known.option
        kind: click.ParamType[Any] | None = None
        if known.type is bool:
            name = f"{name}/--no-{name.removeprefix('--')}"
        elif known.choices is not None and not known.is_tuple:
            kind = click.Choice([*known.choices, *([NOTHING] if known.optional else [])])
        else:
            kind = SettingType(known)
        super().__init__([name, known.name], type=kind, default=None, help=text, show_default=False)
        self.known = known

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """As click does; the word for nothing becomes None."""
        made = super().process_value(ctx, value)
        return None if self.known.optional and made == NOTHING else made


def setting_options(settings: Iterable[Setting], section: str) -> list[click.Parameter]:
    """One option for each setting."""
    return [SettingOption(known, section, f"{known.help}{_default(known.default)}") for known in settings]


def method_options() -> list[click.Parameter]:
    """One option for each setting of any method; the help names the methods that have it."""
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
        options.append(SettingOption(_shared(list(owners.values())), "Method settings", text))
    return options


def _shared(owners: list[Setting]) -> Setting:
    """One option for the settings of one name: it takes what any of the methods takes, each refuses the rest itself."""
    choices = [tuple(known.choices or ()) for known in owners]
    every = tuple(dict.fromkeys(value for values in choices for value in values)) if all(choices) else None
    return dataclasses.replace(owners[0], choices=every, optional=any(known.optional for known in owners))


def training_options() -> list[click.Parameter]:
    """Every setting of a training run as an option."""
    own = settings_of(TrainConfig)
    sections: dict[str, list[Setting]] = {"Training": [], "Data": [], "Evaluation transform": [], "Devices": []}
    for name, known in own.items():
        section = (
            "Data" if name in DATA_SETTINGS
            else "Evaluation transform" if name in EVALUATION_TRANSFORM
            else "Devices" if name in DEVICE_SETTINGS
            else "Training"
        )  # fmt: skip
        sections[section].append(known)
    options = [option for section, found in sections.items() for option in setting_options(found, section)]
    augmentation = [SettingOption(known, "Augmentation", known.help) for known in augment_fields().values()]
    return [*options, *augmentation, *method_options()]


def _default(value: Any) -> str:
    return "" if value is None else f"  [default: {_spelled(value)}]"


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ",".join(str(item) for item in value)
    return NOTHING if value is None else str(value)


def given_settings(ctx: click.Context) -> dict[str, Any]:
    """The settings that stand on the command line, by name."""
    return {
        option.known.name: ctx.params[option.known.name]
        for option in ctx.command.get_params(ctx)
        if isinstance(option, SettingOption)
        and ctx.get_parameter_source(option.known.name) is ParameterSource.COMMANDLINE
    }
