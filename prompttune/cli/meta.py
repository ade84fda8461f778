"""``prompttune meta``: a common initial prompt for dam-vp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.settings import make

SHARED = ("backbone", "backbone_arg", "image_size", "weights", "device")
"""Settings of ``train`` that mean the same here."""


def _options() -> list[click.Parameter]:
    from prompttune.methods.damvp.config import DAMVPConfig
    from prompttune.training.config import TrainConfig
    from prompttune.training.meta_learning import MetaSettings

    own = [*options_of(DAMVPConfig, only=("prompt_size",)), *options_of(MetaSettings)]
    return [*options_of(TrainConfig, only=SHARED), *own]


@click.command(cls=SectionedCommand, settings=_options)
@click.option("--data", required=True, multiple=True, help="Data set, as for train; repeat the option for each one.")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="File to write, .safetensors.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_context
def meta(
    ctx: click.Context,
    /,
    data: tuple[str, ...],
    output: Path,
    quiet: bool,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Meta-learn dam-vp's initial prompt over several data sets.

    \b
    prompttune meta --data demo/digits --data demo/location --output meta.safetensors
    prompttune train --method dam-vp --meta-init meta.safetensors --data photos/ --output runs/photos
    """
    from prompttune.backbones import load_backbone
    from prompttune.backbones.names import join_args
    from prompttune.methods.damvp.config import DAMVPConfig
    from prompttune.training.config import TrainConfig
    from prompttune.training.meta_learning import MetaSettings, learn_prompt
    from prompttune.training.scoring import resolve_device

    given = given_settings(ctx)
    name, arguments, *source, device = (given.get(key, getattr(TrainConfig, key)) for key in SHARED)
    chosen, place = make(MetaSettings, given), resolve_device(device)
    with Progress(console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        task = bar.add_task("steps", total=chosen.steps)
        losses = learn_prompt(
            load_backbone(join_args(name, arguments), *source),
            data,
            output,
            config=make(DAMVPConfig, given),
            settings=chosen,
            device=place,
            on_step=lambda done, _loss: bar.update(task, completed=done),
        )
    if as_json:
        click.echo(json.dumps({"path": str(output), "data": list(data), "losses": losses}, indent=2))
    else:
        click.echo(
            f"{output}: {chosen.steps} steps over {len(data)} data sets, loss {losses[0]:.3f} to {losses[-1]:.3f}"
        )
