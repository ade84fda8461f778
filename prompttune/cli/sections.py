"""Help pages with sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click


class SectionOption(click.Option):
    """An option with a section of the help.

    Args:
        section: headline of the section.
    """

    def __init__(self, *args: Any, section: str = "Options", **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help groups the settings in sections; the command's own options come first.

    Args:
        examples: examples at the end of the help.
        notes: texts by section.
        sections: first sections, in order.
        settings: makes more options at each call, since methods may have been registered in the meantime.
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
                continue  # the usage line and the text name them
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                if section in self.notes:
                    formatter.write_text(self.notes[section])
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the examples unchanged."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}".rstrip() + "\n")
