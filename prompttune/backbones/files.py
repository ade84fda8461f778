"""Backbone weights from a file: safetensors, PyTorch (tensors only, never pickled code), Google's npz.

Checkpoints of self-supervised ViTs come with their own wrapping and names; they are mapped onto timm's here:
MAE (https://github.com/facebookresearch/mae), MoCo v3 (https://github.com/facebookresearch/moco-v3) and DINO
(https://github.com/facebookresearch/dino).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prompttune.errors import BackboneError, shortened
from prompttune.foreign import read_state_dict

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
"""Prefixes of names, after unwrapping, that belong to pre-training or to a classifier and are skipped."""


def load_file_into(model: nn.Module, path: Path, rename: Callable[[dict[str, Tensor], Any], dict[str, Tensor]]) -> None:
    """Copy weights into a model; timm's ``rename`` resamples position embeddings and biases of another size.

    Raises:
        BackboneError: the file is missing, damaged, of an unknown kind or for another architecture.
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
    tensors = _own_tensors(path, model)
    try:
        renamed = rename(tensors, model)
    except Exception as problem:  # timm does not check the shapes that it unpacks
        told = _misshapen(tensors, model) or _told(problem)
        raise BackboneError(f"{path} does not fit the backbone: {told}") from None
    try:
        result = model.load_state_dict(renamed, strict=False)
    except RuntimeError as problem:
        raise BackboneError(f"{path} does not fit the backbone: {_told(problem)}") from None
    unknown = [name for name in result.unexpected_keys if not name.startswith(_NOT_BACKBONE)]
    if result.missing_keys or unknown:
        raise BackboneError(
            f"{path} does not fit the backbone: {_some('missing', result.missing_keys)}"
            f"{' and ' if result.missing_keys and unknown else ''}{_some('unknown', unknown)}"
        )


def _misshapen(tensors: Mapping[str, Tensor], model: nn.Module) -> str:
    own = model.state_dict()
    wrong = [
        f"{name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in tensors.items()
        if name in own and value.shape != own[name].shape
    ]
    return _some("wrong shape:", wrong)


def _told(problem: Exception) -> str:
    """The first two lines of an error: torch's first line says only that there is an error."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(problem).__name__


def _some(kind: str, names: list[str]) -> str:
    return f"{kind} {shortened(names, 3)}" if names else ""


def _load_npz(model: VisionTransformer, path: Path) -> None:
    try:
        model.load_pretrained(str(path))
    except Exception as problem:  # errors of zipfile and NumPy, and timm's for arrays of other shapes
        raise BackboneError(f"{path} is not a Google ViT checkpoint of this architecture: {_told(problem)}") from None


def _own_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The backbone's tensors in a file, without the prefixes of their authors' code."""
    own = model.state_dict().keys()  # a ConvNeXt's head ends in a norm of the backbone
    tensors: dict[str, Tensor] = {}
    for name, value in read_state_dict(path, _WRAPPERS, BackboneError).items():
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
