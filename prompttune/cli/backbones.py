"""``prompttune backbones``: the families, the models of a pattern, or all about one model."""

from __future__ import annotations

import json
from dataclasses import asdict
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from prompttune.cli.engine_options import wide_console

if TYPE_CHECKING:
    from prompttune.backbones.base import Backbone
    from prompttune.backbones.catalogue import BackboneDescription, Pretrained


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backbones(name: str | None, as_json: bool) -> None:
    """List the families of timm models, the models whose names match a pattern, or describe the model NAME.

    A model runs in blocks, so that prompts reach every block, or as a whole under the methods that need its
    features, maps or modules.

    \b
    prompttune backbones
    prompttune backbones 'vit_small*'
    prompttune backbones vit_small_patch14_dinov2
    """
    from prompttune.errors import BackboneError, UsageError

    if name is None:
        _families(as_json)
    elif "*" not in name:
        found = _read(name)
        click.echo(json.dumps(_plain(*found), indent=2) if as_json else _described(*found))
    else:
        import timm

        names = [one for one in timm.list_models() if fnmatch(one, name)]
        if not names:
            raise UsageError(f"timm has no model that matches {name!r}: prompttune backbones lists the families")
        rows = []
        for one in track(names, "reading models", console=Console(stderr=True), transient=True):
            try:
                rows.append(_read(one))
            except BackboneError as problem:
                click.echo(f"left out: {problem}", err=True)
        if as_json:
            click.echo(json.dumps([_plain(*one) for one in rows], indent=2))
        else:
            _print(
                ("model", "methods", "width", "tokens", "parameters", "licence", "transform", "weights at hand"),
                [_row(*one) for one in rows],
            )


def _families(as_json: bool) -> None:
    from prompttune.backbones.catalogue import families
    from prompttune.backbones.loading import BACKBONES

    rows: list[tuple[Any, ...]] = [
        (one.name, len(one.models), len(_methods(one.kind)), one.models[0]) for one in families()
    ]
    rows += [("registered", 1, "", name) for name in BACKBONES]
    if as_json:
        keys = ("family", "models", "methods", "example")
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
        return
    _print(("family", "models", "methods", "example"), rows)


def _methods(kind: type[Backbone]) -> list[str]:
    """The methods that run on a class of backbones."""
    from prompttune.methods import METHODS

    return [
        name
        for name, config in METHODS.items()
        if any(issubclass(kind, known) for module in config.modules for known in module.backbones)
    ]


def _read(name: str) -> tuple[BackboneDescription, list[str]]:
    """A model's description, and the methods that run on it."""
    from prompttune.backbones.catalogue import hollow_backbone
    from prompttune.methods.describing import methods_on

    found, backbone = hollow_backbone(name)
    return found, methods_on(backbone)


def _plain(found: BackboneDescription, methods: list[str]) -> dict[str, Any]:
    return {**asdict(found), "kind": found.kind.__name__, "methods": methods}


def _transform(weights: Pretrained) -> str:
    return f"{weights.image_size} px, {weights.interpolation}, {weights.crop_mode} {weights.crop_pct:g}"


def _row(found: BackboneDescription, methods: list[str]) -> tuple[object, ...]:
    first, hands = found.pretrained[:1], {one.at_hand for one in found.pretrained} - {""}
    return (
        found.name,
        len(methods),
        found.width,
        found.tokens or "",
        f"{found.parameters / 1e6:.1f} M",
        "".join(one.licence or "unknown" for one in first),
        "".join(map(_transform, first)),
        ", ".join(sorted(hands)) or "no",
    )


def _described(found: BackboneDescription, methods: list[str]) -> str:
    lines = [
        f"{found.name}: {found.limits or 'runs in blocks'}",
        f"  width {found.width}" + (f", {found.tokens} tokens" if found.tokens else "") + f" at {found.image_size} px",
        f"  parameters {found.parameters / 1e6:.1f} M",
        f"  methods {', '.join(methods)}",
        "  weights" if found.pretrained else "  no published weights of timm",
    ]
    for one in found.pretrained:
        mean = "/".join(f"{value:.3g}" for value in one.mean)
        hand = one.at_hand and f"at hand: {one.at_hand}"
        parts = filter(None, (one.licence or "licence unknown", f"{_transform(one)}, mean {mean}", hand))
        lines.append(f"    {one.tag or 'default'}: {'; '.join(parts)}")
    return "\n".join(lines)


def _print(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    table = Table(*heads, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*map(str, row))
    wide_console().print(table)
