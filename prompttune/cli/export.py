"""``prompttune export``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from prompttune.cli.engine_options import (
    data_option,
    named_checkpoints,
    named_data,
    no_parity_option,
    parity_tables,
    weights_option,
    wide_console,
)
from prompttune.cli.options import SettingOption, given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.errors import UsageError
from prompttune.export.options import GateOptions
from prompttune.settings import all_settings, make

if TYPE_CHECKING:
    from prompttune.export import EngineFolder

REPOSITORIES = {"triton": "onnx", "triton-trt": "trt"}
"""Format of the engine in each kind of Triton repository."""


def _format_settings() -> list[type[Any]]:
    """Settings dataclasses of the formats' own options, each once."""
    from prompttune.export import FORMATS

    return list(dict.fromkeys(kind.options for kind in FORMATS.values() if kind.options is not None))


def _options() -> list[click.Parameter]:
    from prompttune.export import FORMATS, ExportSettings
    from prompttune.export.triton import TritonSettings

    known = all_settings(ExportSettings)["format"]
    titles = {name: kind.title for name, kind in FORMATS.items()}
    text = "; ".join(f"{name}: {title}" for name, title in titles.items())
    text += f"; {', '.join(REPOSITORIES)}: a Triton model repository with ONNX or a TensorRT plan.  [default: onnx]"
    choice = SettingOption(dataclasses.replace(known, choices=[*FORMATS, *REPOSITORIES]), "Options", text)
    _, *others = options_of(ExportSettings)
    of_formats = {option.name: option for option in options_of(*_format_settings())}
    return [choice, *others, *of_formats.values(), *options_of(TritonSettings, GateOptions)]


@click.command(cls=SectionedCommand, settings=_options)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    help="Engine folder to create; for Triton, the repository.",
)
@data_option
@no_parity_option
@weights_option
@click.option("--overwrite", is_flag=True, help="Replace an existing engine or model of a repository.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the parity report as JSON.")
@click.pass_context
def export(
    ctx: click.Context,
    /,
    runs: tuple[str, ...],
    output: Path,
    data: tuple[str, ...],
    no_parity: bool,
    weights: str | None,
    overwrite: bool,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Export the backbone and method that RUNs share once, with each RUN as a task.

    Every export is compared with PyTorch, each task alone and all of them mixed, and is put in place only if the
    answers agree. A task has the name of its checkpoint folder; NAME=PATH gives it another name.

    \b
    prompttune export runs/digits --output engine
    prompttune export digits=runs/a shapes=runs/b --output engine --data demo/digits
    prompttune export runs/* --output engine-int8 --precision int8 --data digits=demo/digits
    prompttune export runs/* --output engine-trt --format trt --precision fp16 --axis batch=1:8:64
    prompttune export runs/* --output models --format triton --model-name vision
    """
    from prompttune.export import ExportSettings, export_engine
    from prompttune.export.triton import TritonSettings, export_triton

    given = given_settings(ctx)
    write: Callable[..., EngineFolder] = export_engine
    if given.get("format") in REPOSITORIES:
        given["format"] = REPOSITORIES[given["format"]]
        write = partial(export_triton, triton=make(TritonSettings, given))
    elif foreign := [known.option for key, known in all_settings(TritonSettings).items() if key in given]:
        raise UsageError(f"{foreign[0]} belongs to a Triton repository: give --format triton")
    own = [key for kind in _format_settings() for key in all_settings(kind) if key in given]
    settings = make(ExportSettings, {**given, "options": {key: given[key] for key in own}})
    console = Console(stderr=True)
    checkpoints = named_checkpoints(runs)
    with console.status("starting") as status:
        folder = write(
            checkpoints,
            output,
            format=settings,
            data=named_data(data, checkpoints),
            parity=not no_parity,
            **dataclasses.asdict(make(GateOptions, given)),
            weights=weights,
            overwrite=overwrite,
            on_stage=status.update,
        )
    manifest = folder.manifest
    if as_json:
        click.echo(json.dumps({"engine": str(folder.path), "tasks": folder.tasks(), **manifest.to_dict()}, indent=2))
        return
    if manifest.parity is not None:
        parity_tables(wide_console(), manifest.parity)
    if in_float := manifest.details.get("in_float"):
        click.echo(f"not in int8: {', '.join(in_float)}")
    size = sum(file.size for file in manifest.files.values()) / 1e6
    click.echo(
        f"{folder.path}: {manifest.method['name']} over {manifest.backbone['name']} at {manifest.image_size} pixels, "
        f"{len(folder.tasks())} tasks, {manifest.format} {manifest.precision}, {size:.1f} MB"
    )
