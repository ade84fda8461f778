"""Export of an engine, and of tasks into an engine: fold, check, prove, then put in place."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Unpack

import onnx
import onnxruntime
import timm
import torch

from prompttune.backbones import load_backbone
from prompttune.checkpoints import read_config
from prompttune.errors import EngineError, UsageError
from prompttune.export.folder import (
    MANIFEST,
    TASKS,
    EngineFolder,
    EngineTask,
    FileRecord,
    Manifest,
    digest_of,
    save_task,
    task_names,
    write_manifest,
)
from prompttune.export.formats import FORMATS, BuildRequest, ExportSettings
from prompttune.export.options import OnStage, Thresholds
from prompttune.export.parity.gate import Gate, engine_gate, loosest
from prompttune.export.parity.proof import MIXED_WITH, fold_proven, open_runner, prove, require_passed
from prompttune.export.parity.samples import Data, Samples
from prompttune.export.runtimes import RuntimeOptions
from prompttune.export.tasks import (
    Checkpoints,
    Fit,
    Folded,
    check_fit,
    engine_backbone,
    fold_checkpoint,
    name_checkpoints,
)
from prompttune.export.versions import carry_over
from prompttune.files import locked, replacing_folder, visible

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Bytes of a weight by precision."""


def export_engine(
    checkpoints: Checkpoints,
    output: str | Path,
    *,
    format: str | ExportSettings = "onnx",  # noqa: A002
    data: Data = None,
    parity: bool = True,
    weights: str | Path | None = None,
    overwrite: bool = False,
    on_stage: OnStage = lambda _: None,
    **thresholds: Unpack[Thresholds],
) -> EngineFolder:
    """Export the backbone and method that some checkpoints share once, with every task as an input.

    Args:
        checkpoints: folders, or folders by task name; by default a task has the name of its folder.
        output: the engine folder to create. It appears only when everything is done and proven.
        format: name of a format, or settings with its name, precision and so on.
        data: images for the parity proof, for all tasks or by task name; None uses seeded noise.
        parity: whether to compare the engine with PyTorch and refuse it if they differ.
        weights: source of the backbone's weights, if it differs from that of the training.
        overwrite: whether to replace an existing engine.
        on_stage: called with each stage.
        thresholds: amounts and thresholds of :class:`~prompttune.export.options.GateOptions`; None and by default those
            of the precision, see :meth:`Gate.for_precision`.

    Returns:
        The engine folder; its manifest holds the parity report.

    Raises:
        UsageError: a name, format or setting is invalid, or the output exists.
        CheckpointError: a checkpoint is missing or damaged.
        EngineError: the checkpoints cannot share an engine, or the graph cannot be exported.
        ParityError: the engine's answers differ from PyTorch's.
    """
    settings = (format if isinstance(format, ExportSettings) else ExportSettings(format)).resolved()
    kind = FORMATS[settings.format]()
    kind.check(settings)
    if parity:
        kind.check_proof(settings)
    gate = Gate.for_precision(loosest(settings.precision, str(settings.bank_precision)), **thresholds)
    target = Path(output)
    named = name_checkpoints(checkpoints)
    check_output(target, overwrite)
    fit = check_fit(named)
    proven = fit.task_type.formats
    if proven is not None and settings.format not in proven:
        raise UsageError(f"{fit.task_type.name}: the format {settings.format} is not proven; use {' or '.join(proven)}")
    gate = gate.suiting(fit.task_type)
    samples = Samples(data, fit.task_type)
    with locked(target):
        check_output(target, overwrite)
        on_stage("loading the backbone")
        config = read_config(next(iter(named.values())))["backbone"]
        backbone = load_backbone(config["name"], config["image_size"], weights or config["weights"])
        on_stage(f"folding {len(named)} task{'s' if len(named) > 1 else ''}")
        folded = {name: fold_checkpoint(path, backbone) for name, path in named.items()}
        _check_space(target, folded, settings)
        with replacing_folder(target, MANIFEST) as temporary:
            manifest = _write_engine(folded, settings, samples, gate if parity else None, temporary, on_stage)
            known = {*folded, *task_names(target / TASKS)}
            digests = {name: digest_of(target, name) for name in known}
            now = {name: folded[name].task.version if name in folded else digests[name] for name in known}
            carry_over(target, temporary, {name: (digests[name], now[name]) for name in known if now[name]})
            write_manifest(temporary, manifest)
    return EngineFolder(target, verify=False)


def check_output(
    target: Path, overwrite: bool, mark: str = MANIFEST, what: str = "an engine", name: str = "output"
) -> None:
    """Raise :class:`UsageError` unless ``target`` is free, or is ``what`` (it has the file ``mark``) to replace."""
    if not target.exists() or (target.is_dir() and not any(visible(target))):
        return
    if not (target / mark).is_file():
        raise UsageError(f"{target} exists and is not {what}: choose another {name}")
    if not overwrite:
        raise UsageError(f"{target} exists: choose another {name} or give --overwrite")


def _check_space(target: Path, folded: Mapping[str, Folded], settings: ExportSettings) -> None:
    """Raise :class:`EngineError` if the disk does not have room for the weights alone."""
    backbone = next(iter(folded.values())).model.backbone
    weights = sum(one.numel() for one in backbone.parameters()) * _BYTES[settings.precision]
    needed = weights + sum(value.nbytes for one in folded.values() for value in one.task.state.values())
    free = shutil.disk_usage(target if target.is_dir() else target.parent).free
    if needed > free:
        raise EngineError(f"{target} needs at least {needed / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free there")


def _write_engine(
    folded: Mapping[str, Folded],
    settings: ExportSettings,
    samples: Samples,
    gate: Gate | None,
    folder: Path,
    on_stage: OnStage,
) -> Manifest:
    """Write an engine without its manifest into a folder, and prove it if there is a gate."""
    on_stage("tracing and writing the graph")
    manifest = _write_model(folded, settings, samples, folder, on_stage)
    if gate is not None:
        on_stage("comparing with PyTorch")
        tasks = {name: one.task for name, one in folded.items()}
        runtime = settings.options.get("runtime", "auto")
        runner = open_runner(folder, manifest, tasks, RuntimeOptions(settings.target, runtime=runtime))
        report = prove(runner, folded, {}, manifest, samples, gate)
        require_passed(report, "the engine was not put in place")
        manifest = dataclasses.replace(manifest, parity=report.to_dict())
    for name, one in folded.items():
        (folder / TASKS / name).mkdir(parents=True)
        save_task(one.task, folder / TASKS / name)
    return manifest


def _write_model(
    folded: Mapping[str, Folded], settings: ExportSettings, samples: Samples, folder: Path, on_stage: OnStage
) -> Manifest:
    model = next(iter(folded.values())).model
    backbone = model.backbone
    states = {name: one.task.state for name, one in folded.items()}
    request = BuildRequest(
        model, settings, states, lambda name, count: samples.draw(name, folded[name].task, count)[0], on_stage
    )
    built = FORMATS[settings.format]().build(request, folder)
    return Manifest(
        backbone={
            "name": backbone.name,
            "image_size": backbone.image_size,
            "weights": backbone.weights,
            "weights_source": backbone.weights_source,
            "fingerprint": backbone.fingerprint,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "interpolation": backbone.interpolation,
        },
        method={
            "name": model.config.method,
            "settings": model.config.to_dict(),
            "graph_settings": model.config.graph_settings(),
            "only_reads": model.only_reads,
        },
        layout=model.state_layout(),
        inputs=tuple(built.inputs),
        outputs=tuple(built.outputs),
        files={name: FileRecord.of(folder / name) for name in built.files},
        format=settings.format,
        precision=settings.precision,
        tools=tool_versions(),
        bank_precision=str(settings.bank_precision),
        attention=str(settings.attention),
        quantization=settings.quantization,
        baked=tuple(folded) if settings.baked else None,
        opset=built.opset,
        details=built.details,
        type_config=model.task_type.to_config(),
    )


def tool_versions() -> dict[str, str]:
    """Versions of the tools that affect an engine."""
    return {
        "prompttune": metadata.version("prompttune"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": str(timm.__version__),
        "onnx": str(onnx.__version__),
        "onnxruntime": str(onnxruntime.__version__),
        "onnxscript": metadata.version("onnxscript"),
    }


def add_task(
    engine: str | Path,
    name: str,
    checkpoint: str | Path,
    *,
    replace: bool = False,
    data: str | None = None,
    parity: bool = True,
    weights: str | Path | None = None,
    on_stage: OnStage = lambda _: None,
    **thresholds: Unpack[Thresholds],
) -> EngineTask:
    """Fold a checkpoint into an engine folder. The graph is not changed.

    Args:
        engine: the engine folder.
        name: name of the task.
        checkpoint: the checkpoint folder.
        replace: whether to replace a task of that name.
        data: images for the parity proof; None uses seeded noise.
        parity: whether to compare the task with PyTorch and refuse it if they differ.
        weights: source of the backbone's weights, if it differs from that of the export.
        on_stage: called with each stage.
        thresholds: as for :func:`export_engine`.

    Raises:
        UsageError: the name is taken or invalid.
        CheckpointError: the checkpoint is missing or damaged.
        EngineError: the engine is damaged, or the checkpoint does not fit it.
        ParityError: the task's answers differ from PyTorch's; it was not added.
    """
    folder = EngineFolder(engine, verify=False)
    folder.check_free(name, replace)
    check_fit({name: Path(checkpoint)}, Fit.of_manifest(folder.manifest))
    with folder.locked():
        folder = EngineFolder(engine, verify=parity)
        folder.check_free(name, replace)
        on_stage("loading the backbone")
        backbone = engine_backbone(folder.manifest, weights)
        on_stage(f"folding {name}" + (" and comparing it with PyTorch" if parity else ""))
        task = fold_proven(
            folder.manifest,
            name,
            checkpoint,
            backbone,
            folder.read_some(MIXED_WITH, besides=name) if parity else {},
            lambda tasks: open_runner(folder.path, folder.manifest, tasks, RuntimeOptions(own_device(folder.manifest))),
            Samples(None if data is None else {name: data}, folder.manifest.task_type),
            engine_gate(folder.manifest, **thresholds) if parity else None,
        )
        folder.write_task(name, task, replace)
    return task


def own_device(manifest: Manifest) -> str:
    """The device that an engine was compiled for, or the default device of its format."""
    return str(manifest.details.get("device", FORMATS[manifest.format]().default_device))
