"""``prompttune import-checkpoint``: import of released SA²VP, VPT, GaPT and PEFT LoRA checkpoints."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from prompttune.checkpoints.importing import LAYOUTS, Imported
from prompttune.checkpoints.importing import import_checkpoint as run
from prompttune.checkpoints.importing.source import listed
from prompttune.cli.options import SettingOption, given_settings
from prompttune.cli.sections import SectionedCommand, SectionOption
from prompttune.errors import UsageError
from prompttune.images.preprocess import CROP_MODES, INTERPOLATIONS, NORMALISATIONS
from prompttune.methods.registry import method_fields

Command = TypeVar("Command", bound=Callable[..., Any])

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


def _option(section: str, *names: str, **attrs: Any) -> Callable[[Command], Command]:
    return click.option(*names, cls=SectionOption, section=section, **attrs)


@click.command(cls=SectionedCommand, examples=EXAMPLES, notes=NOTES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--from", "layout", type=click.Choice(list(LAYOUTS)), required=True, help="Code that wrote FILE.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to write.")
@click.option("--labels", help="Class names in the order of the logits: a,b,c or a text file with one per line.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the result of the import as JSON.")
@_option("Backbone", "--backbone", help="timm name of the backbone that the task was trained over.")
@_option("Backbone", "--image-size", type=int, help="Image side, pixels.  [default: from FILE, else the backbone's]")
@_option("Backbone", "--weights", default="auto", show_default=True,
         help="auto, random, random:SEED or a file; equal to a backbone in FILE.")  # fmt: skip
@_option("Backbone", "--save-backbone", type=click.Path(path_type=Path), metavar="PATH",
         help="File (.safetensors) to write the backbone in FILE to; it then serves as --weights.")  # fmt: skip
@_option("Evaluation transform", "--normalisation", type=click.Choice(list(NORMALISATIONS)),
         help="Mean and standard deviation: ImageNet's, Inception's (0.5) or the backbone's own.  [default: "
         + ", ".join(f"{one.normalisation} ({name})" for name, one in LAYOUTS.items()) + "]")  # fmt: skip
@_option("Evaluation transform", "--crop-mode", type=click.Choice(CROP_MODES), default="squash", show_default=True,
         help="Way to make an image square.")  # fmt: skip
@_option("Evaluation transform", "--crop-pct", type=float, default=1.0, show_default=True,
         help="Share of the resized image to keep.")  # fmt: skip
@_option("Evaluation transform", "--interpolation", type=click.Choice(INTERPOLATIONS),
         help="Resizing filter.  [default: bilinear, the backbone's own (lora)]")  # fmt: skip
@click.pass_context
def import_checkpoint(
    ctx: click.Context, /, file: Path, layout: str, labels: str | None, as_json: bool, **given: Any
) -> None:
    """Turn FILE, a checkpoint of released code, into a checkpoint folder that evaluates, exports and serves.

    sa2vp: github.com/tommy-xq/SA2VP, ViT and Swin. vpt: github.com/KMnP/vpt, ViT, shallow and deep. gapt:
    github.com/ryongithub/GatedPromptTuning. lora: a folder of Hugging Face PEFT that adapts a timm ViT's qkv. No code
    in FILE is ever run.
    """
    settings = given_settings(ctx)
    others = {name: value for name, value in given.items() if name not in _SETTINGS}
    made = run(layout, file, labels=_labels(labels), settings=settings, **others)
    if as_json:
        click.echo(json.dumps(made.to_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo(_summary(made))


import_checkpoint.params.extend(_own_settings())
_SETTINGS = {option.known.name for option in import_checkpoint.params if isinstance(option, SettingOption)}


def _labels(text: str | None) -> list[str] | None:
    """Class names from the command line or from a file."""
    if text is None:
        return None
    file = Path(text)
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as problem:
        if not isinstance(problem, OSError) or problem.errno != errno.ENAMETOOLONG:
            raise UsageError(f"cannot read the labels {file}: {problem}") from None
        lines = text.split(",")
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
        lines.append(f"ignored {len(made.ignored)} tensors: {listed(made.ignored)}")
    return "\n".join([*lines, f"checkpoint: {made.path}"])
