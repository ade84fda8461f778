"""``prompttune export``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.errors import UsageError
from prompttune.export.options import GateOptions
from prompttune.settings import all_settings, make

if TYPE_CHECKING:
    from prompttune.export import EngineFolder, ExportSettings
    from prompttune.export.triton import TritonSettings


Command = TypeVar("Command", bound=Callable[..., Any])
FORMATS = ("onnx", "trt", "trt-rtx", "torch-trt", "aoti")
REPOSITORIES = {"triton": "onnx", "triton-trt": "trt"}
"""Format of the engine in each kind of Triton repository."""
AXES = ("batch", "tasks", "rank", "classes", "clusters")


def _axes(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[int, int, int]]:
    """``AXIS=SMALLEST:LIKELIEST:LARGEST`` to axis → sizes."""
    axes: dict[str, tuple[int, int, int]] = {}
    for value in values:
        axis, _, sizes = value.partition("=")
        numbers = [int(one) for one in sizes.split(":") if one.isdigit()]
        if axis not in AXES or len(numbers) != 3 or sizes.count(":") != 2:
            raise click.BadParameter(f"{value!r} is not like batch=1:8:64; axes: {', '.join(AXES)}")
        axes[axis] = (numbers[0], numbers[1], numbers[2])
    return axes


def model_options(command: Command) -> Command:
    """Add the options of the model file: format, precision and related ones."""
    options = [
        click.option(
            "--format",
            "format_",
            type=click.Choice([*FORMATS, *REPOSITORIES]),
            default="onnx",
            show_default=True,
            help="onnx: ONNX Runtime; trt: TensorRT plan; trt-rtx: plan of TensorRT for RTX, built without a GPU; "
            "torch-trt: Torch-TensorRT; aoti: AOTInductor, only needs PyTorch; triton, triton-trt: a Triton model "
            "repository with ONNX or a TensorRT plan.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
            default="fp32",
            show_default=True,
            help="Precision of weights and activations; norms, softmax and logits stay in fp32.",
        ),
        click.option(
            "--bank-precision",
            type=click.Choice(["fp32", "fp16", "bf16"]),
            help="Precision of the resident task tensors.  [default: as --precision; fp32 for int8]",
        ),
        click.option(
            "--attention",
            type=click.Choice(["explicit", "fused"]),
            help="explicit: products and a softmax; fused: the format's own attention, which was wrong in several "
            "TensorRT releases.  [default: explicit for onnx, trt and trt-rtx, fused for torch-trt and aoti]",
        ),
        click.option(
            "--quantization",
            type=click.Choice(["dynamic", "static"]),
            help="Scales of int8 activations: from each call, or from calibration images.  "
            "[default: dynamic for onnx, static for trt and trt-rtx]",
        ),
        click.option(
            "--calibration-images",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Number of --data images for int8 calibration, spread over the tasks; noise without --data.",
        ),
        click.option(
            "--baked",
            is_flag=True,
            help="Make the tasks constants of the model, whose only inputs are then image and task_index.",
        ),
        click.option(
            "--device",
            help="Device of the model: cpu, cuda or cuda:INDEX.  [default: cuda for trt, trt-rtx and torch-trt]",
        ),
        click.option(
            "--axis",
            "axes",
            multiple=True,
            callback=_axes,
            metavar="AXIS=MIN:LIKELY:MAX",
            help=f"Range of sizes for a TensorRT engine, for {', '.join(AXES)}. May be repeated.",
        ),
        click.option("--workspace", type=click.IntRange(1), help="TensorRT: largest workspace of a layer, in bytes."),
        click.option(
            "--optimization-level", type=click.IntRange(0, 5), help="TensorRT: from 0 (fast build) to 5.  [default: 3]"
        ),
        click.option(
            "--timing-cache",
            type=click.Path(dir_okay=False, path_type=Path),
            help="TensorRT: file with the timings of earlier builds, read and rewritten.",
        ),
        click.option("--version-compatible", is_flag=True, help="TensorRT: let later versions open the plan too."),
        click.option(
            "--hardware-compatibility",
            type=click.Choice(["none", "ampere_plus", "same_compute_capability"]),
            help="TensorRT: other GPUs that can run the plan.  [default: none]",
        ),
        click.option(
            "--compute-capability",
            multiple=True,
            metavar="X.Y",
            help="TensorRT for RTX: compute capability of the GPUs that the plan is for, such as 8.9. May be "
            "repeated.  [default: every RTX GPU since Ampere]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def triton_options(command: Command) -> Command:
    """Add the options of the model in Triton, named as in ``TritonSettings``."""
    options = [
        click.option("--model-name", "name", metavar="NAME", help="Triton: name of the model.  [default: prompttune]"),
        click.option(
            "--bank-inputs",
            is_flag=True,
            default=None,
            help="Triton: each request carries its tasks, and requests are not batched.  "
            "[default: the tasks are baked into the model]",
        ),
        click.option(
            "--max-batch-size",
            type=click.IntRange(1),
            help="Triton: largest number of images per call.  [default: 64; for a plan, the largest of its axis batch]",
        ),
        click.option(
            "--max-delay-ms",
            type=click.FloatRange(0),
            help="Triton: longest wait of a request for others to join its batch.  [default: 1]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _triton(given: dict[str, Any]) -> TritonSettings | None:
    """The settings of :func:`triton_options`, removed from ``given``; None for an engine by itself.

    Raises:
        UsageError: such a setting is given for a format without Triton.
    """
    names = ("name", "bank_inputs", "max_batch_size", "max_delay_ms")
    own = {name: value for name in names if (value := given.pop(name)) is not None}
    if given["format_"] in REPOSITORIES:
        from prompttune.export.triton import TritonSettings

        given["format_"] = REPOSITORIES[given["format_"]]
        return TritonSettings(**own)
    if own:
        options = "--model-name, --bank-inputs, --max-batch-size and --max-delay-ms"
        raise UsageError(f"{options} belong to a Triton repository: give --format triton")
    return None


def _settings(given: dict[str, Any]) -> ExportSettings:
    """The export settings of :func:`model_options`; a format's own options only if they were given."""
    from prompttune.export import ExportSettings

    kept = ("workspace", "optimization_level", "timing_cache", "version_compatible", "hardware_compatibility")
    own = (*kept, "compute_capability")
    shared = {name: value for name, value in given.items() if name not in own}
    options = {name: given[name] for name in own if given[name] not in (None, False, ())}
    return ExportSettings(format=shared.pop("format_"), options=options, **shared)


@click.command(cls=SectionedCommand, settings=lambda: options_of(GateOptions))
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    help="Engine folder to create; for Triton, the repository.",
)
@model_options
@triton_options
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
    **model: Any,
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
    from prompttune.export import export_engine

    gate = make(GateOptions, given_settings(ctx))
    model = {name: value for name, value in model.items() if name not in all_settings(GateOptions)}
    triton = _triton(model)
    write: Callable[..., EngineFolder] = export_engine
    if triton is not None:
        from prompttune.export.triton import export_triton

        write = partial(export_triton, triton=triton)
    console = Console(stderr=True)
    checkpoints = named_checkpoints(runs)
    with console.status("starting") as status:
        folder = write(
            checkpoints,
            output,
            format=_settings(model),
            data=named_data(data, checkpoints),
            parity=not no_parity,
            **asdict(gate),
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
    size = sum(file.size for file in manifest.files.values()) / 1e6
    click.echo(
        f"{folder.path}: {manifest.method['name']} over {manifest.backbone['name']} at {manifest.image_size} pixels, "
        f"{len(folder.tasks())} tasks, {manifest.format} {manifest.precision}, {size:.1f} MB"
    )
