"""Descriptions of the methods and their settings: text in a terminal, a table in a notebook."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prompttune.backbones.base import Backbone
from prompttune.errors import PrompttuneError
from prompttune.methods.registry import METHODS
from prompttune.settings import Setting, settings_of


@dataclass(frozen=True)
class SettingDescription:
    """One setting of a method."""

    name: str
    type: str
    default: Any
    bounds: str
    """Allowed values as text; empty if any value of the type is allowed."""
    help: str

    @classmethod
    def of(cls, known: Setting) -> SettingDescription:
        """Describe a field of a method's config."""
        words = f"tuple[{known.type.__name__}, ...]" if known.is_tuple else known.type.__name__
        words += " | None" * known.optional
        bounds = " or ".join(map(str, known.choices)) if known.choices else known.bounds
        return cls(known.name, words, known.default, bounds, known.help)


class _Shown:
    """Base of descriptions: prints as a title and a table, and as HTML in a notebook."""

    def _title(self) -> str:
        raise NotImplementedError

    def _rows(self) -> list[Sequence[object]]:
        """Headings, followed by the rows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        rows = [[str(cell) for cell in row] for row in self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([self._title(), *(line.rstrip() for line in lines)]).strip()

    def _repr_html_(self) -> str:
        head, *rows = ([html.escape(str(cell)) for cell in row] for row in self._rows())
        table = "".join([_row("th", head), *(_row("td", row) for row in rows)])
        return f"<p>{html.escape(self._title())}</p><table>{table}</table>"


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


@dataclass(frozen=True, repr=False)
class MethodDescription(_Shown):
    """A method and its settings."""

    name: str
    summary: str
    paper: str
    """Address of the paper; empty without one."""
    settings: tuple[SettingDescription, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def _title(self) -> str:
        return " ".join(part for part in (f"{self.name}: {self.summary}".rstrip(": "), self.paper) if part)

    def _rows(self) -> list[Sequence[object]]:
        fields = [field.name for field in dataclasses.fields(SettingDescription)]
        rows: list[Sequence[object]] = [[getattr(one, field) for field in fields] for one in self.settings]
        return [fields, *rows] if rows else [["no settings"]]


class MethodList(_Shown, dict[str, str]):
    """Summary of each method, by name."""

    __repr__ = _Shown.__repr__

    def _title(self) -> str:
        return ""

    def _rows(self) -> list[Sequence[object]]:
        return [("method", "what it does"), *self.items()]


def methods() -> MethodList:
    """Every method, including those of other packages, with a one-line summary; :func:`describe` gives details."""
    return MethodList({name: config.summary for name, config in METHODS.items()})


def methods_on(backbone: Backbone) -> list[str]:
    """The methods that run on a backbone at their default settings; its weights need no memory."""
    found = []
    for name, config in METHODS.items():
        try:
            with torch.device(next(backbone.parameters()).device):
                config().build(backbone)
        except PrompttuneError:
            continue
        except RuntimeError:  # timm's forward reads values, which a tensor without memory does not have
            pass
        found.append(name)
    return found


def describe(method: str) -> MethodDescription:
    """A method's summary, its paper, and its settings with their defaults, bounds and help.

    Raises:
        UsageError: the method is unknown.
    """
    config = METHODS[method]
    settings = tuple(SettingDescription.of(known) for known in settings_of(config).values())
    return MethodDescription(method, config.summary, config.paper, settings)
