"""``import_checkpoint``: from a released file to a checkpoint folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from prompttune.checkpoints.importing.source import FileTensors
from prompttune.checkpoints.importing.vpt import VPTLayout
from prompttune.errors import UsageError
from prompttune.files import locked, replacing, replacing_folder, visible
from prompttune.images.preprocess import CROP_MODES, INTERPOLATIONS, NORMALISATIONS, OWN_CROP, Preprocess
from prompttune.methods import config_from_dict
from prompttune.model import PromptModel, take_tensors
from prompttune.registry import Registry
from prompttune.settings import setting, settle


def _check(name: str, layout: Any) -> None:
    if not isinstance(layout, Layout):
        raise UsageError(f"the layout {name!r} must be an instance of a subclass of Layout, not {layout!r}")


LAYOUTS: Registry[Layout] = Registry("layout", "prompttune.layouts", _check)
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


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Settings of an import."""

    overwrite: bool = setting(False, "Replace an existing checkpoint")
    image_size: int | None = setting(
        None, "Image side, pixels", low=1, shown="from FILE, else the backbone's", section="Backbone"
    )
    weights: str = setting(
        "auto", "auto, random, random:SEED or a file; equal to a backbone in FILE", kind=str, section="Backbone"
    )
    save_backbone: Path | None = setting(
        None,
        "File (.safetensors) to write the backbone in FILE to; it then serves as --weights",
        metavar="PATH",
        section="Backbone",
    )
    normalisation: str | None = setting(
        None,
        "Mean and standard deviation: ImageNet's, Inception's (0.5) or the backbone's own",
        NORMALISATIONS,
        shown="the released code's",
        section="Evaluation transform",
    )
    crop_mode: str = setting(
        "squash", "Way to make an image square", (*CROP_MODES, OWN_CROP), section="Evaluation transform"
    )
    crop_pct: float = setting(
        1.0, "Share of the resized image to keep", above=0, high=1, section="Evaluation transform"
    )
    interpolation: str | None = setting(
        None, "Resizing filter", INTERPOLATIONS, shown="the released code's", section="Evaluation transform"
    )

    def __post_init__(self) -> None:
        settle(self)


def import_checkpoint(
    layout: str,
    file: str | Path,
    output: str | Path,
    *,
    backbone: str | Backbone | None = None,
    labels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Imported:
    """Write the task in a released checkpoint as a checkpoint folder.

    Args:
        layout: the code that wrote ``file``, one of :data:`LAYOUTS`.
        file: ``.pth`` or ``.safetensors``; the adapter's folder for ``lora``.
        output: the checkpoint folder to write.
        backbone: timm's name of the backbone that the task was trained over, or a loaded backbone.
        labels: class names in the order of the logits; by default ``"0" .. "C-1"``. A file without a head needs them.
        settings: settings of the method that the file does not hold; others are refused.
        options: fields of :class:`ImportSettings`.

    Raises:
        UsageError: a layout or setting is unknown, a setting that the file lacks is not given, or ``output`` would
            replace a folder that holds another of these files.
        CheckpointError: the file cannot be read or does not fit the backbone or the method.
        BackboneError: the backbone's weights cannot be found.
    """
    kind, chosen = LAYOUTS[layout], ImportSettings(**options)
    folder, path, given = Path(output), Path(file), dict(settings or {})
    for name in given:
        if name not in kind.settings:
            raise UsageError(
                f"{layout} does not have a setting {name!r}; settings that its files lack: {', '.join(kind.settings)}"
            )
    if backbone is None:
        raise UsageError(
            f"give the backbone that the task was trained over; the released code takes {kind.usual_backbone}"
        )
    _check_places(folder, path, backbone, chosen)
    source = kind.open(path)
    with locked(folder), _backbone(kind, source, backbone, chosen) as frozen:
        _check_places(folder, path, backbone, chosen)  # again: another process may have written meanwhile
        found = kind.convert(source, frozen, given)
        preprocess = frozen.default_preprocess(
            chosen.normalisation or kind.normalisation,
            chosen.crop_mode,
            chosen.crop_pct,
            chosen.interpolation or kind.interpolation,
        )
        model = _model(found, frozen, given, list(labels) if labels is not None else None, preprocess, source.where)
        model.metrics = {"imported": {"from": layout, "code": kind.code, "file": path.name}}
        with replacing_folder(folder, CONFIG_FILE) as temporary:
            model.save(temporary)
    assumed = {name: value for name, value in found.assumed.items() if name not in given}
    return Imported(model, folder, layout, assumed, source.ignored, found.backbone, found.head is not None, found.notes)


def _check_places(folder: Path, file: Path, backbone: str | Backbone, chosen: ImportSettings) -> None:
    """Check where the output and the backbone are written: nothing that is read or foreign may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output {folder} is a file, not a folder")
    if any(visible(folder)) and not chosen.overwrite:
        raise UsageError(f"the output {folder} is not empty; give --overwrite, or another folder")
    if any(visible(folder)) and not (folder / CONFIG_FILE).exists():
        raise UsageError(f"{folder} holds files but no checkpoint that could be overwritten; give another folder")
    target, output = chosen.save_backbone and chosen.save_backbone.expanduser(), folder.resolve()
    weights = Path(backbone.weights if isinstance(backbone, Backbone) else chosen.weights).expanduser()
    used = {"checkpoint": file, "backbone": target, "weights": weights if weights.is_file() else None}
    for what, path in used.items():
        if path is not None and path.resolve().is_relative_to(output):
            raise UsageError(
                f"the {what} {path} is inside the output {folder}, which is replaced as a whole; give another folder"
            )
    if target is None:
        return
    if isinstance(backbone, Backbone):
        raise UsageError("save_backbone needs the backbone's name, not a loaded backbone")
    if chosen.weights != "auto":
        raise UsageError(
            f"--save-backbone takes the checkpoint's own backbone, --weights {chosen.weights} another one: "
            "give one of the two"
        )
    if target.suffix != ".safetensors":
        raise UsageError(f"the backbone is saved as .safetensors, not as {target.name}")
    if target.is_dir() or target.resolve() in (file.resolve(), *output.parents):
        raise UsageError(f"the backbone cannot be saved over {target}; give another file")
    if target.exists() and not chosen.overwrite:
        raise UsageError(f"{target} exists; give --overwrite, or another file")


@contextlib.contextmanager
def _backbone(
    kind: Layout, source: FileTensors, backbone: str | Backbone, chosen: ImportSettings
) -> Iterator[Backbone]:
    """The backbone of the task; ``save_backbone`` holds it when the block ends without an error."""
    if isinstance(backbone, Backbone):
        yield backbone
        return
    size = chosen.image_size or kind.image_size(source)
    if chosen.save_backbone is None:
        yield load_backbone(backbone, size, chosen.weights)
        return
    names, target = kind.backbone_names(source), chosen.save_backbone.expanduser()
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


def _own_backbone(source: FileTensors, names: Names, backbone: str, size: int | None) -> dict[str, Tensor]:
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
    take_tensors(model, tensors, where)
    return model.eval()
