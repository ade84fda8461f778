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


def _options() -> list[click.Parameter]:
    from prompttune.training.meta_learning import MetaSettings

    return options_of(MetaSettings)


@click.command(cls=SectionedCommand, settings=_options)
@click.option("--data", required=True, multiple=True, help="Data set, as for train; repeat the option for each one.")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="File to write, .safetensors.")
@click.option("--backbone", default="vit_small_patch14_dinov2", show_default=True, help="timm name of the backbone.")
@click.option(
    "--image-size", type=click.IntRange(1), help="Side of the input in pixels.  [default: the backbone's own]"
)
@click.option("--weights", default="auto", show_default=True, help="Source of the weights, as for train.")
@click.option(
    "--prompt-size", type=click.IntRange(1), help="Width of the border in pixels, as for train --method dam-vp."
)
@click.option("--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or cuda:INDEX.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_context
def meta(
    ctx: click.Context,
    /,
    data: tuple[str, ...],
    output: Path,
    backbone: str,
    image_size: int | None,
    weights: str,
    prompt_size: int | None,
    device: str,
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
    from prompttune.methods.damvp.config import DAMVPConfig
    from prompttune.training.meta_learning import MetaSettings, learn_prompt
    from prompttune.training.scoring import resolve_device

    chosen, place = MetaSettings(**given_settings(ctx)), resolve_device(device)
    with Progress(console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        task = bar.add_task("steps", total=chosen.steps)
        losses = learn_prompt(
            load_backbone(backbone, image_size, weights),
            data,
            output,
            config=DAMVPConfig(prompt_size=prompt_size),
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
