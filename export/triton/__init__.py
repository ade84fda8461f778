"""A model repository of NVIDIA's Triton Inference Server around an engine.

::

    models/
      prompttune/
        config.pbtxt       written through Triton's own protobuf class
        labels.txt         class names, where all tasks share them
        README.md          how to start the server and how a client asks for a task
        1/                 the engine folder: Triton finds its model.onnx or model.plan under the names it expects

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_repository.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prompttune.errors import UsageError
from prompttune.export.build import export_engine
from prompttune.export.folder import MANIFEST, EngineFolder
from prompttune.export.formats import Settings
from prompttune.export.runtimes import RuntimeOptions
from prompttune.export.tasks import Checkpoints, check_fit, name_checkpoints
from prompttune.export.triton.settings import CONFIG_FILE, LABELS_FILE, README_FILE, VERSION
from prompttune.export.triton.settings import TritonSettings as TritonSettings
from prompttune.files import locked, replacing_folder, visible, write_text


def export_triton(
    checkpoints: Checkpoints,
    repository: str | Path,
    triton: TritonSettings | None = None,
    *,
    format: str | Settings = "onnx",  # noqa: A002
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> EngineFolder:
    """Export some checkpoints as a model of a Triton repository; other models of the repository are not changed.

    The tasks are baked into the model unless ``triton`` says otherwise. The model appears only when it is complete and
    proven.

    Args:
        checkpoints: see :func:`export_engine`.
        repository: Triton's model folder; created if it is missing.
        triton: settings of the model in Triton.
        format: ``onnx`` or ``trt``, or settings with one of them.
        overwrite: whether to replace a model of that name.
        on_stage: called with each stage.
        **options: other arguments of :func:`export_engine`.

    Returns:
        The engine folder within the repository.

    Raises:
        MissingExtraError: Triton's protobuf classes are not installed.
        UsageError: Triton cannot serve such a model, or a model of that name exists.
        PrompttuneError: everything that :func:`export_engine` raises.
    """
    triton = triton or TritonSettings()
    given = format if isinstance(format, Settings) else Settings(format)
    settings = given.resolved()
    triton.check(settings)
    settings = dataclasses.replace(settings, baked=not triton.bank_inputs)
    folder = Path(repository) / triton.name
    named = name_checkpoints(checkpoints)
    _check_output(folder, overwrite)
    if check_fit(named).segmentation is not None:
        raise UsageError("segmentation: a Triton repository answers classifications; export an engine instead")
    with locked(folder):
        _check_output(folder, overwrite)
        with replacing_folder(folder, CONFIG_FILE) as temporary:
            engine = export_engine(named, temporary / VERSION, format=settings, on_stage=on_stage, **options)
            on_stage("writing Triton's configuration")
            _describe(engine, settings, triton, temporary)
    return EngineFolder(folder / VERSION, verify=False)


def _check_output(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(visible(folder))):
        return
    if not (folder / VERSION / MANIFEST).is_file():
        raise UsageError(f"{folder} exists and is not a model of prompttune: choose another model name")
    if not overwrite:
        raise UsageError(f"{folder} exists: choose another model name or give --overwrite")


def _describe(engine: EngineFolder, settings: Settings, triton: TritonSettings, folder: Path) -> None:
    """Write the files next to the engine."""
    # Imports the protobuf classes, which are known to be installed.
    from prompttune.export.triton.config import as_text, make_config, shared_labels
    from prompttune.export.triton.readme import make_readme

    tasks = {name: engine.read_task(name) for name in engine.manifest.baked or engine.tasks()}
    gpu = RuntimeOptions(settings.target).cuda_index is not None
    labels = shared_labels(tasks)
    config = make_config(engine.manifest, tasks, triton, gpu, None if labels is None else LABELS_FILE)
    write_text(folder / CONFIG_FILE, as_text(config))
    if labels is not None:
        write_text(folder / LABELS_FILE, "\n".join(labels) + "\n")
    write_text(folder / README_FILE, make_readme(engine.manifest, tasks, triton, gpu))
