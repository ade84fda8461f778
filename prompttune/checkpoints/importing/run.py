"""``import_checkpoint``: from a released file to a checkpoint folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from prompttune.backbones import Backbone, load_backbone
from prompttune.checkpoints.format import CONFIG_FILE
from prompttune.checkpoints.importing.gapt import GaPTLayout
from prompttune.checkpoints.importing.layout import Foreign, Layout, Names, take_backbone
from prompttune.checkpoints.importing.peft import PeftLayout
from prompttune.checkpoints.importing.sa2vp import SA2VPLayout
from prompttune.checkpoints.importing.source import Source
from prompttune.checkpoints.importing.vpt import VPTLayout
from prompttune.errors import CheckpointError, UsageError, choose
from prompttune.files import locked, replacing, replacing_folder, visible
from prompttune.images.preprocess import NORMALISATIONS, Preprocess
from prompttune.methods import config_from_dict
from prompttune.model import PromptModel
from prompttune.registry import Registry

LAYOUTS: Registry[Layout] = Registry("layout", "prompttune.layouts")
for _layout in (SA2VPLayout(), VPTLayout(), GaPTLayout(), PeftLayout()):
    LAYOUTS.add(_layout.name, _layout)
"""Layouts by the name for ``--from``."""


@dataclass
class Imported:
    """Result of an import."""

    model: PromptModel
    path: Path
    """The checkpoint folder."""
    layout: str
    assumed: dict[str, Any]
    """Settings that neither the file nor the user gave: the released code's values."""
    ignored: list[str]
    """Tensors of the file that were skipped."""
    backbone: str
    """What was done with the backbone's weights in the file."""
    has_head: bool
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Number of values in the task's tensors, without the head."""
        return sum(parameter.numel() for parameter in self.model.method.parameters())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        model = self.model
        return {
            "path": str(self.path),
            "from": self.layout,
            "method": model.config.method,
            "settings": model.config.to_dict(),
            "assumed": self.assumed,
            "parameters": self.parameters,
            "classes": len(model.labels),
            "has_head": self.has_head,
            "backbone": {
                "name": model.backbone.name,
                "image_size": model.backbone.image_size,
                "fingerprint": model.backbone.fingerprint,
                "in_file": self.backbone,
            },
            "preprocess": model.preprocess.to_dict(),
            "ignored": self.ignored,
            "notes": self.notes,
        }


def import_checkpoint(
    layout: str,
    file: str | Path,
    output: str | Path,
    *,
    backbone: str | Backbone | None = None,
    image_size: int | None = None,
    weights: str | Path = "auto",
    save_backbone: str | Path | None = None,
    labels: Sequence[str] | None = None,
    normalisation: str | None = None,
    crop_pct: float = 1.0,
    crop_mode: str = "squash",
    interpolation: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Imported:
    """Write the task in a released checkpoint as a checkpoint folder.

    Args:
        layout: the code that wrote ``file``, one of :data:`LAYOUTS`.
        file: ``.pth`` or ``.safetensors``; the adapter's folder for ``lora``.
        output: the checkpoint folder to write.
        backbone: timm's name of the backbone that the task was trained over, or a loaded backbone.
        image_size: side of the images in pixels; by default from the file, else the backbone's own.
        weights: source of the backbone's weights, see :func:`load_backbone`. Weights in the file must be equal to
            these.
        save_backbone: a ``.safetensors`` file to write the checkpoint's own backbone to, which then serves as
            ``weights``. It is written after the checkpoint.
        labels: class names in the order of the logits; by default ``"0" .. "C-1"``. A file without a head needs them.
        normalisation: one of :data:`NORMALISATIONS`; by default that of the released code.
        crop_pct, crop_mode, interpolation: settings of the evaluation transform, see :class:`Preprocess`.
        settings: settings of the method that the file does not hold; others must agree with the file.
        overwrite: whether to replace a checkpoint in ``output``.

    Raises:
        UsageError: a layout or setting is unknown, a setting that the file lacks is not given, or ``output`` would
            replace a folder that holds another of these files.
        CheckpointError: the file cannot be read or does not fit the backbone or the method.
        BackboneError: the backbone's weights cannot be found.
    """
    kind = LAYOUTS[layout]
    choose("normalisation", normalisation or kind.normalisation, NORMALISATIONS)
    folder, given = Path(output), dict(settings or {})
    for name in given:
        if name not in kind.settings:
            raise UsageError(
                f"{layout} does not have a setting {name!r}; settings that its files lack: {', '.join(kind.settings)}"
            )
    _check_output(folder, overwrite)
    target = None if save_backbone is None else Path(save_backbone).expanduser()
    used = _weights_file(backbone.weights if isinstance(backbone, Backbone) else weights)
    _check_inside(folder, {"checkpoint": Path(file), "backbone": target, "weights": used})
    if backbone is None:
        raise UsageError(
            f"give the backbone that the task was trained over; the released code takes {kind.usual_backbone}"
        )
    if target is not None:
        _check_target(target, folder, Path(file), backbone, weights, overwrite)
    source = kind.open(Path(file))
    with locked(folder), _backbone(kind, source, backbone, image_size, weights, target) as frozen:
        _check_output(folder, overwrite)
        found = kind.convert(source, frozen, given)
        preprocess = frozen.default_preprocess()
        preprocess = preprocess.normalised(normalisation or kind.normalisation)
        chosen = interpolation or kind.interpolation or preprocess.interpolation
        preprocess = replace(preprocess, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=chosen)
        model = _model(found, frozen, given, list(labels) if labels is not None else None, preprocess, source.where)
        model.metrics = {"imported": {"from": layout, "code": kind.code, "file": Path(file).name}}
        with replacing_folder(folder, CONFIG_FILE) as temporary:
            model.save(temporary)
    assumed = {name: value for name, value in found.assumed.items() if name not in given}
    return Imported(model, folder, layout, assumed, source.ignored, found.backbone, found.head is not None, found.notes)


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output {folder} is a file, not a folder")
    if not folder.exists() or not any(visible(folder)):
        return
    if not overwrite:
        raise UsageError(f"the output {folder} is not empty; give --overwrite, or another folder")
    if not (folder / CONFIG_FILE).exists():
        raise UsageError(f"{folder} holds files but no checkpoint that could be overwritten; give another folder")


def _weights_file(weights: str | Path) -> Path | None:
    """The file that ``weights`` names; None if it is not a path."""
    path = Path(weights).expanduser()
    return path if path.is_file() else None


def _check_inside(folder: Path, files: Mapping[str, Path | None]) -> None:
    """Refuse an output folder that contains one of the files: the folder is replaced as a whole."""
    output = folder.resolve()
    for what, path in files.items():
        if path is not None and path.resolve().is_relative_to(output):
            raise UsageError(
                f"the {what} {path} is inside the output {folder}, which is replaced as a whole; give another folder"
            )


def _check_target(
    target: Path, folder: Path, file: Path, backbone: str | Backbone, weights: str | Path, overwrite: bool
) -> None:
    """Check the target file for the backbone."""
    if isinstance(backbone, Backbone):
        raise UsageError("save_backbone needs the backbone's name, not a loaded backbone")
    if str(weights) != "auto":
        raise UsageError(
            f"--save-backbone takes the checkpoint's own backbone, --weights {weights} another one: give one of the two"
        )
    if target.suffix != ".safetensors":
        raise UsageError(f"the backbone is saved as .safetensors, not as {target.name}")
    if target.is_dir() or target.resolve() in (file.resolve(), *folder.resolve().parents):
        raise UsageError(f"the backbone cannot be saved over {target}; give another file")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; give --overwrite, or another file")


@contextlib.contextmanager
def _backbone(
    kind: Layout,
    source: Source,
    backbone: str | Backbone,
    image_size: int | None,
    weights: str | Path,
    target: Path | None,
) -> Iterator[Backbone]:
    """The backbone of the task; ``target`` holds it when the block ends without an error."""
    if isinstance(backbone, Backbone):
        yield backbone
        return
    size = image_size or kind.image_size(source)
    if target is None:
        yield load_backbone(backbone, size, weights)
        return
    names = kind.backbone_names(source)
    if names is None:
        raise UsageError(f"{source.where} holds no backbone to save")
    tensors = _own_backbone(source, names, backbone, size)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        draft = Path(folder) / target.name  # under its own name, which weights_source reports
        save_file(tensors, draft, metadata={"format": "pt"})
        del tensors  # as large as the backbone
        frozen = load_backbone(backbone, size, draft)
        frozen.weights = str(target.absolute())
        yield frozen
        with replacing(target) as temporary:
            draft.replace(temporary)


def _own_backbone(source: Source, names: Names, backbone: str, size: int | None) -> dict[str, Tensor]:
    """The backbone in the file, by timm's names; its tensors stay in ``source``."""
    look = source.fork()
    skeleton = load_backbone(backbone, size, "random")
    tensors = take_backbone(look, names, skeleton)
    look.check(f"{backbone} at {skeleton.image_size} pixels", all_taken=False)
    return tensors


def _model(
    found: Foreign,
    backbone: Backbone,
    given: Mapping[str, Any],
    labels: list[str] | None,
    preprocess: Preprocess,
    where: str,
) -> PromptModel:
    config = config_from_dict(found.method, {**found.assumed, **given, **found.settings})
    if labels is None and found.head is None:
        raise UsageError(f"{where} holds no head: give --labels to make one of zeros for them, to be trained")
    classes = None if found.head is None else len(found.head["weight"])
    model = PromptModel(backbone, config, classes, labels, preprocess)
    head = found.head or {name: value.new_zeros(value.shape) for name, value in model.head.state_dict().items()}
    tensors = {f"method.{name}": value for name, value in found.tensors.items()}
    tensors |= {f"head.{name}": value for name, value in head.items()}
    parameters = model.task_parameters()
    if parameters.keys() != tensors.keys():
        apart = sorted(parameters.keys() ^ tensors.keys())
        raise CheckpointError(f"{where} does not fit {found.method}: {', '.join(apart[:4])} on one side alone")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"{where} does not fit {found.method}: {name} is {tuple(tensors[name].shape)}, "
                f"expected {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensors[name])
    return model.eval()
