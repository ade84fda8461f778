"""One task over one frozen backbone: method, head, labels and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prompttune.backbones import Backbone, load_backbone
from prompttune.checkpoints.format import CONFIG_FILE, MODEL_FILE, read_config, read_tensors
from prompttune.checkpoints.io import save_checkpoint
from prompttune.errors import CheckpointError, UsageError
from prompttune.images.preprocess import Preprocess
from prompttune.layers.probe import probe
from prompttune.methods import config_from_dict
from prompttune.methods.base import Layout, Method, MethodConfig, State
from prompttune.task_types import ClassificationConfig, TaskType, read_task_type


@dataclass
class Output:
    """Result of a forward; C classes, D channels."""

    logits: Tensor
    """[B, C], or [B, C, h, w] of a head that answers for each place."""
    features: Tensor
    """Pooled features of the base pathway, [B, D]."""
    aux_logits: Tensor | None = None
    """Logits of the shared head on the prompt pathway, in the shape of ``logits``."""
    aux_features: Tensor | None = None
    """Pooled features of the prompt pathway, [B, D]."""
    base_loss_weight: float = 1.0
    """λ of the method, the weight of ``logits`` against ``aux_logits`` in :func:`prompttune.loss`."""
    task_type: TaskType = field(default_factory=ClassificationConfig)


class KnownImages:
    """Images whose image state is known; a model takes them in place of the images.

    A class of its own, because Lightning would cast tensors in a mapping.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    def to(self, device: torch.device, non_blocking: bool = False) -> KnownImages:
        """The same on a device."""
        return KnownImages({name: one.to(device, non_blocking=non_blocking) for name, one in self.state.items()})


class PromptModel(nn.Module):
    """A task: ``method`` and ``head`` train; the backbone stays frozen and in evaluation mode.

    Args:
        backbone: frozen backbone, which many tasks may share.
        config: config of the method; or the method's name, with its settings as keywords.
        num_classes: number of classes; required without ``labels``.
        labels: class names in the order of the logits; by default ``"0" .. "C-1"``.
        preprocess: evaluation transform; by default the backbone's own, squashed to its image size.
        task_type: type of the task with the settings of its head; None for a classification.
        settings: settings of a method that is given by its name.

    Raises:
        UsageError: the method or a setting is unknown, the labels are invalid, or the transform has another size.
        BackboneError: the method does not support the backbone, or does not give maps of patch tokens there.

    Example:
        >>> backbone = load_backbone("vit_small_patch14_dinov2", image_size=56)
        >>> model = PromptModel(backbone, "sa2vp", 10, rank=16)
        >>> model(images).logits.shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        backbone: Backbone,
        config: MethodConfig | str,
        num_classes: int | None = None,
        labels: list[str] | None = None,
        preprocess: Preprocess | None = None,
        task_type: TaskType | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = _config(config, settings)
        labels = _labels(num_classes, labels)
        if preprocess is not None and preprocess.image_size != backbone.image_size:
            raise UsageError(
                f"preprocessing makes images of {preprocess.image_size} pixels, "
                f"the backbone takes {backbone.image_size}"
            )
        self.labels = labels
        self.preprocess = preprocess or backbone.default_preprocess()
        self.metrics: dict[str, Any] = {}
        self.backbone = backbone
        self.method: Method = config.build(backbone)
        self.config = self.method.config
        self.task_type = task_type or ClassificationConfig()
        self.task_type.check_method(self.method, self.config.method, backbone)
        self.levels = self.task_type.levels(backbone.depth)
        """Blocks whose patch tokens the head reads; empty if it reads the pooled features."""
        self.head = self.task_type.make_head(backbone, len(labels), self.method.width)
        self._fixed = self.task_parameters().keys() - self.trained_parameters().keys()

    def task_parameters(self) -> dict[str, nn.Parameter]:
        """All values in a checkpoint by name, ``method.*`` and ``head.*``; see :meth:`trained_parameters`."""
        return {
            f"{part}.{name}": parameter
            for part, module in (("method", self.method), ("head", self.head))
            for name, parameter in module.named_parameters()
        }

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The :meth:`task_parameters` that gradients train; the method itself sets the others."""
        return {name: parameter for name, parameter in self.task_parameters().items() if parameter.requires_grad}

    def requires_grad_(self, requires_grad: bool = True) -> PromptModel:
        """Unfreeze or freeze the trained parameters; the backbone and values that a method sets stay frozen."""
        for name, parameter in self.task_parameters().items():
            parameter.requires_grad_(requires_grad and name not in self._fixed)
        return self

    @property
    def only_reads(self) -> bool:
        """Whether the tasks of an image share its image state as it is; else it is repeated for each of them, as also
        where the head reads maps."""
        return self.method.only_reads and not self.head.size

    def take_sizes(self, stored: Mapping[str, Tensor]) -> None:
        """Make room for stored parameters whose size was chosen when training began; see :meth:`Method.take_sizes`."""
        self.method.take_sizes({name.removeprefix("method."): tensor for name, tensor in stored.items()})

    def task_state(self) -> State:
        """Everything that can be computed without an image, leading dimension 1; differentiable."""
        return self.method.task_state() | self.head.task_state()

    def state_layout(self) -> Layout:
        """Shape of each state tensor without its leading dimension; ``"rank"`` and ``"classes"`` differ by task."""
        return self.method.state_layout() | self.head.state_layout()

    def image_state(self, images: Tensor | KnownImages) -> State:
        """Everything that can be computed without a task, leading dimension B: the frozen work on normalised images
        [B, 3, S, S].

        Raises:
            UsageError: the images have another type or shape.
        """
        if isinstance(images, KnownImages):
            return images.state
        self.backbone.check_images(images)
        return self.method.image_state(images, self.levels)

    def forward_state(self, images: Tensor | KnownImages, state: State, aux: bool = False) -> Output:
        """:meth:`image_state`, then :meth:`answer`."""
        return self.answer(self.image_state(images), state, aux)

    def answer(self, image: State, state: State, aux: bool = False) -> Output:
        """The only forward: training, checkpoints, export and serving all run it.

        Args:
            image: tensors of :meth:`image_state`, with leading dimension B.
            state: tensors of :meth:`task_state`, with leading dimension 1, or B for one task per row; for a method that
                only reads the image state also B K, for K tasks of each image in turn.
            aux: whether to compute the prompt pathway's output too, if the method has one.
        """
        found = self.method(image, state, aux, self.levels)
        probe("features", found.features)
        logits, aux_logits = self.head(found.features, found.maps, state), None
        if found.aux_features is not None:
            aux_logits = self.head(found.aux_features, found.aux_maps, state)
        weight = self.config.base_loss_weight
        return Output(logits, found.features, aux_logits, found.aux_features, weight, self.task_type)

    def forward(self, images: Tensor | KnownImages, aux: bool | None = None) -> Output:
        """Run one task.

        Args:
            images: normalised [B, 3, S, S].
            aux: whether to compute the prompt pathway's output; None computes it in training mode if the loss uses it.
        """
        if aux is None:
            aux = self.training and self.config.base_loss_weight < 1
        return self.forward_state(images, self.task_state(), aux)

    def save(self, path: str | Path, metrics: dict[str, Any] | None = None) -> None:
        """Write a checkpoint folder; see :mod:`prompttune.checkpoints`."""
        if metrics is not None:
            self.metrics = dict(metrics)
        trained = self.trained_parameters()
        count = sum(parameter.numel() for name, parameter in trained.items() if name.startswith("method."))
        save_checkpoint(Path(path), self.to_config(), self.task_parameters(), count, self.method.parameters_left())

    def to_config(self) -> dict[str, Any]:
        """What a checkpoint says of the task beside its tensors, ready for JSON."""
        backbone = self.backbone
        return {
            "method": self.config.method,
            "settings": self.config.to_dict(),
            "backbone": {
                "name": backbone.name,
                "image_size": backbone.image_size,
                "weights": backbone.weights,
                "weights_source": backbone.weights_source,
                "fingerprint": backbone.fingerprint,
            },
            "preprocess": self.preprocess.to_dict(),
            "labels": self.labels,
            "metrics": self.metrics,
            **self.task_type.to_config(),
        }

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone | None = None, weights: str | Path | None = None) -> PromptModel:
        """Read a checkpoint folder.

        Args:
            path: the folder.
            backbone: use this one; it must be the checkpoint's own by fingerprint and image size.
            weights: where to take the backbone's weights from, if not from where training took them.

        Raises:
            CheckpointError: the folder is damaged, or does not fit the backbone.
            BackboneError: the backbone's weights cannot be found.
        """
        folder = Path(path)
        config = read_config(folder)
        wanted = config["backbone"]
        if backbone is None:
            backbone = load_backbone(wanted["name"], wanted["image_size"], weights or wanted["weights"])
        _check_backbone(folder, wanted, backbone)
        try:
            model = cls(
                backbone,
                config_from_dict(config["method"], config["settings"]),
                labels=config["labels"],
                preprocess=Preprocess.from_dict(config["preprocess"]),
                task_type=read_task_type(config),
            )
        except (UsageError, TypeError, KeyError) as problem:
            raise CheckpointError(f"{folder / CONFIG_FILE} does not fit this prompttune: {problem}") from None
        take_tensors(model, read_tensors(folder, config), str(folder / MODEL_FILE))
        model.metrics = config["metrics"]
        return model.eval()


def _check_backbone(folder: Path, wanted: Mapping[str, Any], backbone: Backbone) -> None:
    if backbone.image_size != wanted["image_size"]:
        raise CheckpointError(
            f"{folder} was trained at image size {wanted['image_size']}, the backbone has {backbone.image_size}"
        )
    if backbone.fingerprint != wanted["fingerprint"]:
        raise CheckpointError(
            f"{folder} was trained over {wanted['name']} with fingerprint {wanted['fingerprint'][:12]} "
            f"({wanted['weights_source']}), the backbone is {backbone.name} with {backbone.fingerprint[:12]} "
            f"({backbone.weights_source}); give the right file with --weights"
        )


def take_tensors(model: PromptModel, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy stored tensors into a model; raises :class:`CheckpointError` if names or shapes do not fit."""
    model.take_sizes(tensors)
    parameters = model.task_parameters()
    missing = sorted(parameters.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - parameters.keys())
    if missing or unknown:
        raise CheckpointError(f"{where} lacks {missing[:3]} and has unknown {unknown[:3]}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(f"{where}: {name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}")
        parameter.data.copy_(tensors[name])


def _config(config: MethodConfig | str, settings: Mapping[str, Any]) -> MethodConfig:
    if isinstance(config, str):
        return config_from_dict(config, settings)
    if not isinstance(config, MethodConfig):
        raise UsageError(
            f"a method is given by its name or its config, such as SA2VPConfig(rank=16), not by {config!r}"
        )
    if settings:
        raise UsageError(f"{', '.join(settings)}: a config has its settings in it; give them with a method's name")
    return config


def _labels(num_classes: int | None, labels: list[str] | None) -> list[str]:
    if labels is None:
        if num_classes is None or num_classes < 1:
            raise UsageError(f"num_classes must be at least 1, not {num_classes}")
        return [str(index) for index in range(num_classes)]
    labels = [str(label) for label in labels]
    if not labels or len(set(labels)) != len(labels):
        raise UsageError("labels must be present and differ from each other")
    if num_classes not in (None, len(labels)):
        raise UsageError(f"{len(labels)} labels for {num_classes} classes")
    return labels
