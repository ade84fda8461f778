"""A help page in sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click


class SectionOption(click.Option):
    """An option with a place in the help.

    Args:
        section: headline that it stands under.
    """

    def __init__(self, *args: Any, section: str = "Options", **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help groups the settings; options of its own come first.

    Args:
        examples: for the end of the help.
        notes: texts by section.
        sections: those that come first, in order.
        settings: makes further options, anew for each call: a method may have been registered meanwhile.
    """

    def __init__(
        self,
        *args: Any,
        examples: str = "",
        notes: Mapping[str, str] | None = None,
        sections: Sequence[str] = (),
        settings: Callable[[], list[click.Parameter]] = list,
        **attrs: Any,
    ) -> None:
        super().__init__(*args, **attrs)
        self.examples = examples
        self.notes = notes or {}
        self.sections = ("Options", *sections)
        self.settings = settings

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own options, its settings, then ``--help``."""
        own = super().get_params(ctx)
        return [*own[: len(self.params)], *self.settings(), *own[len(self.params) :]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in self.sections}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue  # the line of usage and the text name them
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                if section in self.notes:
                    formatter.write_text(self.notes[section])
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the examples as they stand."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}".rstrip() + "\n")
