"""The plain backbone, built and run like an engine's model, but without tasks.

It is timm's own forward to pooled features, written by the engine's format in the engine's precision and run by the
engine's runtime, so that the cost of a method can be told from the cost of the backbone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timm.layers import Attention
from torch import Tensor, nn

from prompttune.backbones import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.export.folder import FileRecord, Manifest
from prompttune.export.formats import FORMATS, BuildRequest, ExportSettings
from prompttune.export.formats.tensorrt_options import TensorRTOptions
from prompttune.export.graph import Traced, capture
from prompttune.export.layout import ASKED, BATCH, IMAGE, LOGITS, TASK_INDEX, State, TensorSpec, declare_inputs
from prompttune.export.precision.casting import typed_model
from prompttune.export.runtimes import Array
from prompttune.export.tasks import engine_model

_CALIBRATION_IMAGES = 16


class _PlainGraph(nn.Module):
    """timm's model with the inputs that every runtime feeds; the second one is ignored."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor, task_index: Tensor) -> Tensor:  # noqa: ARG002
        if not isinstance(self.backbone, VitBackbone):
            plain: Tensor = self.backbone(image).float()
            return plain.unsqueeze(1)
        model, tokens = self.backbone.model, self.backbone.embed(image)
        for block in self.backbone.blocks:
            tokens = block.run_timm(tokens)
        tokens = model.norm(tokens)
        features: Tensor = model.forward_head(tokens, pre_logits=True).float()  # [B, D]
        return features.unsqueeze(1)


class _PlainRequest(BuildRequest):
    """A request whose graph is the plain backbone; everything else of a format is unchanged."""

    def trace(self, probes: bool = False, device: str = "cpu") -> Traced:  # noqa: ARG002
        """See :meth:`BuildRequest.trace`; the output holds features [B, 1, D] under the name that runtimes read."""
        precision = "fp32" if self.settings.precision == "int8" else self.settings.precision
        typed = typed_model(copy.deepcopy(self.model), precision).backbone
        for module in typed.modules():
            if isinstance(module, Attention):
                module.fused_attn = self.settings.attention == "fused"
        size = typed.image_size
        # Three rows, because sizes of one and two occur elsewhere in a model.
        sample = [torch.zeros(3, 3, size, size), torch.zeros(3, 5, dtype=torch.int64)]
        dynamic = {IMAGE: {0: BATCH}, TASK_INDEX: {0: BATCH, 1: ASKED}}
        program = capture(_PlainGraph(typed), sample, dynamic, "fused", device, typed.name)
        outputs = [TensorSpec(LOGITS, "float32", (BATCH, 1, typed.width))]
        return Traced(program, declare_inputs({}, size), outputs, dynamic, [])


def plain_settings(manifest: Manifest, device: str = "cpu") -> ExportSettings:
    """The settings of an engine, for its plain backbone on ``device``: precision, quantisation, the range of the batch
    and the options of a build as they are.
    """
    made, default = manifest.details, TensorRTOptions().to_dict()
    options = {name: made[name] for name, usual in default.items() if made.get(name, usual) != usual}
    if manifest.format == "trt-rtx":
        named = str(made["compute_capability"])
        options = {"compute_capability": named.split(", ")} if named else {}
    if "runtime" in made:
        options["runtime"] = made["runtime"]
    return ExportSettings(
        format=manifest.format,
        precision=manifest.precision,
        attention=manifest.attention,
        device=device,
        quantization=manifest.quantization,
        calibration_images=_CALIBRATION_IMAGES,
        axes={axis: (low, usual, high) for axis, (low, usual, high) in manifest.sizes.ranges.items() if axis == BATCH},
        options=options,
    )


def export_plain(manifest: Manifest, backbone: Backbone, settings: ExportSettings, folder: Path) -> Manifest:
    """Write an engine's plain backbone into an existing folder.

    Args:
        manifest: manifest of the engine.
        backbone: backbone of the engine.
        settings: format, precision and the rest, see :func:`plain_settings`.
        folder: output folder.

    Returns:
        A manifest for opening the folder with :func:`open_runtime`; its logits are features [B, D].

    Raises:
        EngineError: the backbone cannot be built.
    """
    resolved, model = settings.resolved(), engine_model(manifest, backbone)
    states: dict[str, State] = {}
    if resolved.quantization == "static":  # calibrated under a task that is drawn
        with torch.no_grad():
            states = {"": {key: value.numpy() for key, value in model.task_state().items()}}
    # Baked, as there is no bank to feed.
    request = _PlainRequest(model, dataclasses.replace(resolved, baked=True), states, _noise(model.backbone.image_size))
    built = FORMATS[resolved.format]().build(request, folder)
    return dataclasses.replace(
        manifest,
        layout={},
        inputs=tuple(built.inputs),
        outputs=tuple(built.outputs),
        files={name: FileRecord.of(folder / name) for name in built.files},
        format=resolved.format,
        precision=resolved.precision,
        attention=str(resolved.attention),
        quantization=resolved.quantization,
        baked=(),
        opset=built.opset,
        details=built.details,
        parity=None,
    )


def _noise(size: int) -> Callable[[str, int], Array]:
    """Seeded noise to calibrate on: scales that a real image would give change no speed."""
    draw = np.random.default_rng(0).standard_normal
    return lambda _task, count: draw((count, 3, size, size), dtype=np.float32)
