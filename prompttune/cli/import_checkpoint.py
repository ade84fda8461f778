"""``prompttune import-checkpoint``: import of released SA²VP, VPT, GaPT and PEFT LoRA checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from prompttune.checkpoints.importing import LAYOUTS, Imported, ImportSettings
from prompttune.checkpoints.importing import import_checkpoint as run
from prompttune.cli.options import SettingOption, given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.data.text import text_lines
from prompttune.errors import UsageError, shortened
from prompttune.methods.registry import method_fields
from prompttune.settings import all_settings

EXAMPLES = """
prompttune import-checkpoint --from sa2vp cub.pth --output runs/cub --gamma 0.1 \\
    --backbone vit_base_patch16_224.orig_in21k --labels cub-classes.txt
prompttune import-checkpoint --from vpt last_model.pth --output runs/cars --backbone vit_base_patch16_224 \\
    --save-backbone vit-in-file.safetensors
prompttune import-checkpoint --from lora adapter/ --output runs/flowers --backbone vit_small_patch14_dinov2 --json
"""
NOTES = {"Method settings": "Only for settings that the file does not hold; others are refused."}


def _own_settings() -> list[click.Parameter]:
    """One option for each setting that the files of some layout do not hold."""
    takers: dict[str, list[str]] = {}
    for name, layout in LAYOUTS.items():
        for setting in layout.settings:
            takers.setdefault(setting, []).append(name)
    options: list[click.Parameter] = []
    for setting, layouts in takers.items():
        known = next(iter(method_fields()[setting].values()))
        options.append(SettingOption(known, "Method settings", f"{known.help}  [{', '.join(layouts)}]", True))
    return options


def _options() -> list[click.Parameter]:
    return [*options_of(ImportSettings), *_own_settings()]


@click.command(cls=SectionedCommand, examples=EXAMPLES, notes=NOTES, settings=_options)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--from", "layout", type=click.Choice(list(LAYOUTS)), required=True, help="Code that wrote FILE.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to write.")
@click.option("--backbone", help="Backbone that the task was trained over, as for train.")
@click.option(
    "--backbone-arg", multiple=True, metavar="NAME=VALUE", help="Argument of the timm model; may be repeated."
)
@click.option("--labels", help="Class names in the order of the logits: a,b,c or a text file with one per line.")
@click.option("--json", "as_json", is_flag=True, help="Print the result of the import as JSON.")
@click.pass_context
def import_checkpoint(
    ctx: click.Context,
    /,
    file: Path,
    layout: str,
    output: Path,
    backbone: str | None,
    backbone_arg: tuple[str, ...],
    labels: str | None,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Turn FILE, a checkpoint of released code, into a checkpoint folder that evaluates, exports and serves.

    sa2vp: github.com/tommy-xq/SA2VP, ViT and Swin. vpt: github.com/KMnP/vpt, ViT, shallow and deep. gapt:
    github.com/ryongithub/GatedPromptTuning. lora: a folder of Hugging Face PEFT that adapts a timm ViT's qkv. No code
    in FILE is ever run.
    """
    from prompttune.backbones.names import join_args

    given = given_settings(ctx)
    options = {name: given.pop(name) for name in all_settings(ImportSettings) if name in given}
    backbone = backbone and join_args(backbone, backbone_arg)
    made = run(layout, file, output, backbone=backbone, labels=_labels(labels), settings=given, **options)
    if as_json:
        click.echo(json.dumps(made.to_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo(_summary(made))


def _labels(text: str | None) -> list[str] | None:
    """Class names from the command line or from a file."""
    if text is None:
        return None
    lines = text.split(",")
    if len(lines) == 1 or os.path.isfile(text):  # noqa: PTH113  # Path.is_file raises for a list longer than a path
        try:
            lines = list(text_lines(Path(text), "the labels"))
        except FileNotFoundError:
            missing = f"cannot read the labels {text}: the file does not exist"
            raise UsageError(f"{missing}; give a text file or names as in a,b") from None
    return [line.strip() for line in lines if line.strip()]


def _summary(made: Imported) -> str:
    config, backbone = made.model.config, made.model.backbone
    lines = [f"{config.method} over {backbone.name} at {backbone.image_size} pixels, {made.parameters:,} parameters"]
    lines.append("settings: " + ", ".join(f"{name} {value}" for name, value in config.to_dict().items()))
    if made.assumed:
        taken = ", ".join(f"{name} {value}" for name, value in made.assumed.items())
        lines.append(f"not in the file, the released code's value taken: {taken}")
    lines.append(f"backbone: {made.backbone}")
    lines.append(f"head: {len(made.model.labels)} classes" + ("" if made.has_head else ", not in the file: zeros"))
    preprocess = made.model.preprocess
    lines.append(f"normalisation: mean {preprocess.mean}, std {preprocess.std}")
    lines += made.notes
    if made.ignored:
        lines.append(f"ignored {len(made.ignored)} tensors: {shortened(made.ignored)}")
    return "\n".join([*lines, f"checkpoint: {made.path}"])
