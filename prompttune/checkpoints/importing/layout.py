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
from prompttune.backbones.vit import VitBackbone
from prompttune.checkpoints.importing.source import FileTensors, read_file
from prompttune.errors import CheckpointError

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
    copies: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the backbone's tensors, by timm's names, that must equal the backbone's own in the file."""


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

    head: ClassVar[str]
    """Name of the linear head in the file."""

    def open(self, path: Path) -> FileTensors:
        """Read ``path``."""
        return FileTensors(read_file(path), str(path))

    @abstractmethod
    def backbone_names(self, source: FileTensors) -> Names | None:
        """The file's names of the backbone's tensors; None if it does not hold any."""

    @abstractmethod
    def take_task(self, source: FileTensors, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        """Take the task's tensors, without the head, out of ``source``; ``given`` are the user's settings."""

    def convert(self, source: FileTensors, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        """Take the whole task out of ``source``, with every tensor of the file accounted for.

        Raises:
            CheckpointError: the file does not fit the layout or the backbone.
            UsageError: a given setting contradicts the file, or one that it lacks is not given.
        """
        found = self.take_task(source, backbone, given)
        names = self.backbone_names(source)
        weights = None if names is None else take_backbone(source, names, backbone)
        found.head = take_head(source, self.head, backbone)
        source.check(f"{found.method} over {backbone.name} at {backbone.image_size} pixels")
        if weights is not None:
            for name, copied in found.copies.items():
                if not torch.equal(copied, weights[name]):
                    raise CheckpointError(f"{source.where}: its copy of {name} is not the frozen block's own")
            found.backbone = same_weights(weights, backbone, source.where)
        return found

    def image_size(self, source: FileTensors) -> int | None:
        """Side in pixels of the images that the file was trained at, if its shapes imply it."""
        names = self.backbone_names(source)
        if names is None:
            return None
        return image_side(source, names("pos_embed")[0], names("patch_embed.proj.weight")[0], prefix_tokens=1)


def image_side(source: FileTensors, places: str, patches: str, *, prefix_tokens: int) -> int | None:
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


SWIN_NAMES = {rf"layers\.{stage}\.downsample\.(.+)": (rf"layers.{stage - 1}.downsample.\1",) for stage in range(1, 4)}
"""Microsoft's Swin (https://github.com/microsoft/Swin-Transformer): merging belongs to the stage before it."""
JAX_VIT_NAMES = {
    r"cls_token": ("embeddings.cls_token",),
    r"pos_embed": ("embeddings.position_embeddings",),
    r"patch_embed\.proj\.(\w+)": (r"embeddings.patch_embeddings.\1",),
    r"norm\.(\w+)": (r"encoder.encoder_norm.\1",),
    r"blocks\.(\d+)\.norm1\.(\w+)": (r"encoder.layer.\1.attention_norm.\2",),
    r"blocks\.(\d+)\.norm2\.(\w+)": (r"encoder.layer.\1.ffn_norm.\2",),
    r"blocks\.(\d+)\.attn\.qkv\.(\w+)": tuple(
        rf"encoder.layer.\1.attn.{part}.\2" for part in ("query", "key", "value")
    ),
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": (r"encoder.layer.\1.attn.out.\2",),
    r"blocks\.(\d+)\.mlp\.(\w+)\.(\w+)": (r"encoder.layer.\1.ffn.\2.\3",),
}
"""ViT-pytorch (https://github.com/jeonsworld/ViT-pytorch), which follows Google's JAX code: q, k and v apart."""


def names_after(prefix: str, table: Mapping[str, tuple[str, ...]] | None = None) -> Names:
    """timm's names after a prefix, except those that match a pattern of the table: its templates give the others."""

    def names(name: str) -> tuple[str, ...]:
        for pattern, templates in (table or {}).items():
            if match := re.fullmatch(pattern, name):
                return tuple(prefix + match.expand(template) for template in templates)
        return (prefix + name,)

    return names


def take_backbone(source: FileTensors, names: Names, backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's tensors in the file, by timm's names; shapes are those of ``backbone``."""
    taken = {}
    for name, parameter in backbone.model.named_parameters():
        parts = names(name)
        shape = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        tensors = [source.take(part, shape) for part in parts]
        taken[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
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


def take_head(source: FileTensors, stem: str, backbone: Backbone) -> dict[str, Tensor] | None:
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
