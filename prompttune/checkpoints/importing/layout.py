"""Interface of every layout of a released checkpoint, and the mapping of its backbone's names to timm's."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prompttune.backbones import Backbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.backbones.vit import VitBackbone
from prompttune.checkpoints.importing.source import Source
from prompttune.errors import CheckpointError, UsageError

SAME_WEIGHTS = 1e-6
"""Largest difference between weights that count as equal."""
HEAD_PARTS = ("weight", "bias")
LARGEST_SIDE = 8192
"""Largest side in pixels that a file's shapes may imply."""
Names = Callable[[str], tuple[str, ...]]
"""Function from timm's name of a backbone tensor to the file's names, whose tensors are joined along axis 0."""


@dataclass
class Foreign:
    """A task from a released file, under our names."""

    method: str
    settings: dict[str, Any]
    """Settings from the file's shapes or its own config."""
    assumed: dict[str, Any] = field(default_factory=dict)
    """Settings that the file does not hold, at the released code's values; the user may give others."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Parameters of the method, by their names in its ``state_dict``."""
    head: dict[str, Tensor] | None = None
    """``weight`` [C, D] and ``bias`` [C]; None if the file does not hold a head."""
    backbone: str = "not in the file"
    """What was done with the backbone's weights in the file."""
    notes: list[str] = field(default_factory=list)


class Layout(ABC):
    """A form in which released code stores a task."""

    name: ClassVar[str]
    code: ClassVar[str]
    """Address of the released code."""
    normalisation: ClassVar[str]
    """Normalisation of the released code's evaluation transform, by the names of ``preprocess.NORMALISATIONS``."""
    interpolation: ClassVar[str | None]
    """Resizing filter of that transform; None for the backbone's own."""
    usual_backbone: ClassVar[str]
    """timm's name of the backbone that the released code trains over."""
    settings: ClassVar[tuple[str, ...]]
    """Settings that a user may give because the file does not hold them."""

    def open(self, path: Path) -> Source:
        """Read ``path``."""
        from prompttune.checkpoints.importing.source import read_file

        return Source(read_file(path), str(path))

    @abstractmethod
    def backbone_names(self, source: Source) -> Names | None:
        """The file's names of the backbone's tensors; None if it does not hold any."""

    @abstractmethod
    def convert(self, source: Source, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        """Take the task's tensors out of ``source``; ``given`` are the user's settings."""

    def image_size(self, source: Source) -> int | None:
        """Side in pixels of the images that the file was trained at, if its shapes imply it."""
        names = self.backbone_names(source)
        if names is None:
            return None
        return image_side(source, names("pos_embed")[0], names("patch_embed.proj.weight")[0], prefix_tokens=1)


def image_side(source: Source, places: str, patches: str, *, prefix_tokens: int) -> int | None:
    """Side in pixels of the training images; None if the shapes do not imply it.

    Args:
        source: the file.
        places: name of a tensor [1, P + R C, D] with a row for each of P prefix tokens and of R C patches.
        patches: name of the patch embedding's weight [D, 3, p, p].
        prefix_tokens: P.
    """
    rows, kernel = source.shape(places), source.shape(patches)
    if rows is None or kernel is None or len(rows) != 3 or len(kernel) != 4 or rows[1] <= prefix_tokens:
        return None
    side = math.isqrt(rows[1] - prefix_tokens) * kernel[-1]
    return side if 0 < side <= LARGEST_SIDE else None


def timm_names(prefix: str) -> Names:
    """timm's own names after a prefix."""
    return lambda name: (prefix + name,)


def swin_names(prefix: str) -> Names:
    """Microsoft's Swin (https://github.com/microsoft/Swin-Transformer): merging belongs to the stage before it."""

    def names(name: str) -> tuple[str, ...]:
        merging = re.match(r"layers\.(\d+)\.downsample\.(.*)", name)
        if merging:
            return (f"{prefix}layers.{int(merging[1]) - 1}.downsample.{merging[2]}",)
        return (prefix + name,)

    return names


_PLACES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "encoder.encoder_norm",
}
_PARTS = {
    "norm1": ("attention_norm",),
    "norm2": ("ffn_norm",),
    "attn.qkv": ("attn.query", "attn.key", "attn.value"),
    "attn.proj": ("attn.out",),
    "mlp.fc1": ("ffn.fc1",),
    "mlp.fc2": ("ffn.fc2",),
}


def jax_vit_names(prefix: str) -> Names:
    """ViT-pytorch (https://github.com/jeonsworld/ViT-pytorch), which follows Google's JAX code: q, k and v apart."""

    def names(name: str) -> tuple[str, ...]:
        if name in _PLACES:
            return (f"{prefix}{_PLACES[name]}",)
        stem, _, leaf = name.rpartition(".")
        if stem in _PLACES:
            return (f"{prefix}{_PLACES[stem]}.{leaf}",)
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if block and block[2] in _PARTS:
            return tuple(f"{prefix}encoder.layer.{block[1]}.{part}.{leaf}" for part in _PARTS[block[2]])
        return (f"{prefix}{name}",)  # the code does not have such a tensor: it is reported as missing

    return names


def take_backbone(source: Source, names: Names, backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's tensors in the file, by timm's names; shapes are those of ``backbone``."""
    taken = {}
    for name, parameter in backbone.model.named_parameters():
        parts = names(name)
        shape = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        taken[name] = (
            torch.cat([source.take(part, shape) for part in parts])
            if len(parts) > 1
            else source.take(parts[0], parameter.shape)
        )
    return taken


def same_weights(found: Mapping[str, Tensor], backbone: Backbone, where: str) -> str:
    """Compare the backbone in the file with the given one; return a sentence that they are the same.

    Raises:
        CheckpointError: they differ.
    """
    other = []
    for name, parameter in backbone.model.named_parameters():
        apart = (found[name] - parameter.detach()).abs().max().item()
        if not apart <= SAME_WEIGHTS:
            other.append((apart, name))
    if other:
        apart, name = max(other)
        raise CheckpointError(
            f"{where} was trained over other weights than {backbone.name} from {backbone.weights_source}: "
            f"{len(other)} of {len(found)} backbone tensors differ, {name} the most, by {apart:.3g}; give the right "
            "ones with --weights, or --save-backbone FILE to use those in the checkpoint"
        )
    return f"{len(found)} tensors in the file, equal to {backbone.name} from {backbone.weights_source}"


def take_head(source: Source, stem: str, backbone: Backbone) -> dict[str, Tensor] | None:
    """The linear head called ``stem``; None if it does not exist."""
    if f"{stem}.weight" not in source:
        return None
    classes = source.size(f"{stem}.weight", 0, 2)
    return {
        "weight": source.take(f"{stem}.weight", (classes, backbone.width)),
        "bias": source.take(f"{stem}.bias", (classes,)),
    }


def need_class_token(backbone: Backbone, code: str) -> VitBackbone:
    """``backbone`` as a ViT whose features are its class token, its only prefix token.

    Raises:
        CheckpointError: the backbone is another one.
    """
    if not isinstance(backbone, VitBackbone) or not backbone.pools_class_token or backbone.num_prefix_tokens != 1:
        raise CheckpointError(
            f"{code} reads the class token of a ViT without other prefix tokens; {backbone.name} has something else"
        )
    return backbone


def need_swin(backbone: Backbone, where: str) -> SwinBackbone:
    """``backbone`` as a Swin.

    Raises:
        CheckpointError: the backbone is not a Swin.
    """
    if not isinstance(backbone, SwinBackbone):
        raise CheckpointError(f"{where} was trained over a Swin; {backbone.name} is not a Swin")
    return backbone


def refuse_given(given: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` if a given setting contradicts the file."""
    for name, value in derived.items():
        if given.get(name, value) != value:
            raise UsageError(f"{name} is {value} in the file, not {given[name]}")
