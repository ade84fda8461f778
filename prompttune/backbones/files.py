"""Backbone weights from a file: safetensors, PyTorch (tensors only, never pickled code), Google's npz.

Checkpoints of self-supervised ViTs come with their own wrapping and names; they are mapped onto timm's here:
MAE (https://github.com/facebookresearch/mae), MoCo v3 (https://github.com/facebookresearch/moco-v3) and DINO
(https://github.com/facebookresearch/dino).
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import convnext, swin_transformer, vision_transformer
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from prompttune.errors import BackboneError

TimmModel: TypeAlias = VisionTransformer | SwinTransformer | ResNet | ConvNeXt
"""What a backbone may be in timm."""
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *PICKLED, ".npz")
_WRAPPERS = ("state_dict", "model", "teacher", "target_encoder", "model_state")
_PREFIXES = ("module.", "base_encoder.", "backbone.", "encoder.", "_orig_mod.")
_NOT_BACKBONE = (
    "decoder",
    "mask_token",
    "head",
    "predictor",
    "momentum_encoder",
    "projector",
    "pre_logits",
    "fc.",
)
"""Starts of names, after unwrapping, that belong to pre-training or to a classifier and are left out."""


def load_file_into(model: TimmModel, path: Path) -> None:
    """Copy the weights in ``path`` into ``model``; timm resamples position embeddings and biases of another size.

    Raises:
        BackboneError: the file is missing, damaged, of an unknown kind or of another architecture.
    """
    if not path.is_file():
        raise BackboneError(f"no weights file at {path}")
    if path.suffix not in SUFFIXES:
        raise BackboneError(f"{path.name}: unknown kind of weights file; known: {', '.join(SUFFIXES)}")
    if path.suffix == ".npz":
        if not isinstance(model, VisionTransformer):
            raise BackboneError(f"{path.name}: Google's npz files hold ViTs, this backbone is a {type(model).__name__}")
        _load_npz(model, path)
        return
    tensors = _unwrap(_read(path), path, model)
    try:
        result = model.load_state_dict(_renamed(tensors, model), strict=False)
    except (RuntimeError, KeyError, AssertionError) as problem:
        raise BackboneError(f"{path} does not fit the backbone: {_first_line(problem)}") from None
    unknown = [name for name in result.unexpected_keys if not name.startswith(_NOT_BACKBONE)]
    if result.missing_keys or unknown:
        raise BackboneError(
            f"{path} does not fit the backbone: {_some('missing', result.missing_keys)}"
            f"{' and ' if result.missing_keys and unknown else ''}{_some('unknown', unknown)}"
        )


def _renamed(tensors: dict[str, Tensor], model: TimmModel) -> dict[str, Tensor]:
    """An author's names and shapes as timm has them."""
    if isinstance(model, ResNet):
        return tensors
    architectures = {SwinTransformer: swin_transformer, ConvNeXt: convnext}
    architecture = architectures.get(type(model), vision_transformer)
    renamed: dict[str, Tensor] = architecture.checkpoint_filter_fn(tensors, model)
    return renamed


def _first_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return " ".join(lines[:2])


def _some(kind: str, names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{kind} {shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else ""


def _load_npz(model: VisionTransformer, path: Path) -> None:
    try:
        model.load_pretrained(str(path))
    except (ValueError, KeyError, RuntimeError, OSError) as problem:
        raise BackboneError(f"{path} is not a Google ViT checkpoint of this architecture: {problem}") from None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        # MAE and DeiT store their training arguments beside the weights; a Namespace holds no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as problem:
        raise BackboneError(f"{path} is damaged: {problem}") from None
    except pickle.UnpicklingError:
        raise BackboneError(
            f"{path} holds more than tensors and is refused; save its state_dict as .safetensors first"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as problem:
        raise BackboneError(f"cannot read the weights {path}: {_first_line(problem)}") from None
    if not isinstance(loaded, Mapping):
        raise BackboneError(f"{path} holds no state dict")
    return loaded


def _unwrap(loaded: Mapping[str, Any], path: Path, model: TimmModel) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        inner = loaded.get(wrapper)
        if isinstance(inner, Mapping):
            loaded = inner
    own = model.state_dict().keys()  # a ConvNeXt's head ends in a norm of the backbone
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(value, Tensor) or "momentum_encoder." in name:
            continue
        short = name
        while short.startswith(_PREFIXES):
            short = short.split(".", 1)[1]
        if (
            not short.startswith(_NOT_BACKBONE) or short == "mask_token" or short in own
        ):  # timm knows DINOv2 by its mask token
            tensors[short] = value
    if not tensors:
        raise BackboneError(f"{path} holds no backbone weights")
    return tensors
