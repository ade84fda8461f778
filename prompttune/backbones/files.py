"""Backbone weights from a file: safetensors, PyTorch (tensors only, never pickled code), Google's npz.

A model is built for the image side that the file's positions belong to and takes every tensor as it is stored; what the
file says about its model (arguments, mean and standard deviation) comes with the tensors. Checkpoints of
self-supervised ViTs have their own wrapping and names: MAE (https://github.com/facebookresearch/mae), MoCo v3
(https://github.com/facebookresearch/moco-v3), DINO (https://github.com/facebookresearch/dino).
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prompttune.backbones.layouts import to_timm
from prompttune.backbones.names import parts_of
from prompttune.errors import BackboneError, shortened
from prompttune.foreign import plain_dict, read_foreign, state_dict_of

logger = logging.getLogger("prompttune")

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *PICKLED, ".npz")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "target_encoder", "model_state")
_PREFIXES = re.compile(
    r"(?:(?:module|base_encoder|encoder_q|backbone|encoder|_orig_mod|visual\.trunk|model|timm_model|vision_model|vit|deit|"
    r"dinov2|dinov2_with_registers|swin|resnet|convnext|convnextv2)\.)+"
)
_NOT_BACKBONE = re.compile(
    r"decoder|mask_token|head|predictor|momentum_encoder|projector|pre_logits|attn_pool|fc\.|(dino|ibot)_head|visual\.head|text|"
    r"logit_|encoder_k|queue|pooler|(cls_|distillation_)?classifier|visual_projection|embeddings\.position_ids"
)
"""Prefixes of names, after unwrapping, that belong to pre-training, to a text tower or to a classifier: skipped."""


_KNOWN = (
    ("MoCo v3", r"(module\.)?base_encoder\.blocks\.", "imagenet"),
    ("MAE", r"decoder_embed\.|file mae_(pretrain|finetune)", "imagenet"),
    ("DINO", r"teacher$|.*head\.last_layer|file dino_(deit|vit)", "imagenet"),
    ("MoCo v2", r"(module\.)?encoder_q\.", "imagenet"),
    ("torchvision", r"conv_proj\.", "imagenet"),
    ("SigLIP", r"(module\.)?(logit_bias$|(vision_model\.)?head\.probe)", "inception"),
    ("CLIP", r"(module\.)?(visual\.(class_embedding|trunk)|logit_scale$|(vision_model\.)?pre_layrn)", "clip"),
)
"""Kinds of files: title, pattern of a line (file name, key or tensor name), normalisation in training."""


@dataclass
class Weights:
    """Tensors of a file by the names in it, without their wrapping, and what the file says about its model."""

    path: Path
    tensors: dict[str, Tensor]
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors by their names in the file."""
    kind: str = ""
    """Training that the file comes from, if it shows."""
    normalisation: str = ""
    """One of ``preprocess.NORMALISATIONS``; empty if the file does not say."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the timm model that no shape shows, such as the number of heads."""
    patch: int | None = None
    """Side of a patch in pixels."""
    grid: int | None = None
    """Number of patches along a side of the images that the position embeddings belong to."""
    arch: str = ""
    """timm's name of the model in the file."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of blocks and of heads in an npz file."""


def read_weights(path: Path) -> Weights:
    """Read a weights file.

    Raises:
        BackboneError: the file is missing, damaged or of an unknown kind, or holds no weights.
    """
    if not path.is_file():
        raise BackboneError(f"no weights file at {path}")
    parts = parts_of(path)
    if not parts and path.suffix not in SUFFIXES:
        raise BackboneError(f"{path.name}: unknown kind of weights file; known: {', '.join(SUFFIXES)}")
    if path.suffix == ".npz":
        return _read_npz(path)
    loaded: Any = None
    stored: dict[str, Tensor] = {}
    for part in parts or [path]:
        loaded = read_foreign(part, BackboneError)
        stored |= state_dict_of(loaded, part, _WRAPPERS, BackboneError)
    found = Weights(path, {}, stored)
    for name, value in stored.items():
        short = _PREFIXES.sub("", name, count=1) if _PREFIXES.match(name) else name
        if short in found.tensors:
            raise BackboneError(f"{path} holds more than one backbone: {name} comes twice; save one state dict alone")
        found.tensors[short] = value
    found.tensors = to_timm(found.tensors)
    top = plain_dict(loaded) or {}
    lines = "\n".join((f"file {path.name}", *map(str, top), *stored))
    known = (one for one in _KNOWN if re.search(f"^(?:{one[1]})", lines, re.MULTILINE))
    found.kind, _, found.normalisation = next(known, ("", "", ""))
    arch = str(top.get("arch"))
    if found.kind == "MoCo v3" and arch.endswith("_small"):
        found.args["num_heads"] = 12  # timm's small ViTs have 6
    if "input_resolution" in stored:  # OpenAI's own CLIP
        found.args["act_layer"] = "quick_gelu"
    if "fc_norm.weight" in found.tensors and "norm.weight" not in found.tensors:  # MAE's fine-tuning
        found.args["global_pool"] = "avg"
    found.arch = arch if timm.is_model(arch) else ""
    _measure(found)
    return found


_POSITIONS = ("pos_embed", "visual.positional_embedding", "preprocessor.pos_embed")
_MOST_PREFIX_TOKENS = 16


def _measure(found: Weights) -> None:
    """Find the patch size and the image side from the shapes of the patch and position embeddings."""
    patches = [value for value in found.tensors.values() if value.ndim == 4 and value.shape[1] == 3]
    if len(patches) == 1:
        found.patch = int(patches[0].shape[-1])
    for name, value in found.tensors.items():
        if name.endswith("patch_generator.embedder.weight"):  # RADIO's, as a matrix
            found.patch = math.isqrt(value.shape[1] // 3)
    positions = [value for name, value in found.tensors.items() if name in _POSITIONS or name.endswith(".pos_embed")]
    if found.patch and positions and positions[0].ndim > 1:
        found.grid = _side(positions[0].shape[-2])


def _side(positions: int) -> int | None:
    """Side of a square grid with some prefix tokens; None if the grid is not square."""
    sides = (math.isqrt(positions - prefix) for prefix in range(min(_MOST_PREFIX_TOKENS, positions)))
    found = (side for prefix, side in enumerate(sides) if side * side == positions - prefix)
    return next(found, None)


def _read_npz(path: Path) -> Weights:
    found, positions = Weights(path, {}), 0
    try:
        with np.load(path) as arrays:
            for name in arrays.files:
                if name.endswith("embedding/kernel") and arrays[name].ndim == 4:
                    found.patch = int(arrays[name].shape[0])
                elif name.endswith("pos_embedding"):
                    positions = int(arrays[name].shape[1])
                elif name.endswith("query/kernel") and "/encoderblock" in name:
                    *layers, _, heads, _ = arrays[name].shape  # some files stack all layers in one array
                    depth = found.counts.get("blocks", 0) + (layers[0] if layers else 1)
                    found.counts = {"blocks": int(depth), "heads": int(heads)}
            found.grid = _side(positions)
    except Exception as problem:  # errors of zipfile and NumPy, and an unknown layout
        raise BackboneError(f"{path} is not a Google ViT checkpoint: {_told(problem)}") from None
    return found


def load_into(
    model: nn.Module, found: Weights, name: str, rename: Callable[[dict[str, Tensor], Any], dict[str, Tensor]]
) -> None:
    """Copy a file's weights into a model, which is resized to the file's image side; every tensor must fit.

    Args:
        model: the model.
        found: the file.
        name: the model's name, for errors.
        rename: timm's function from an author's tensors to its own.

    Raises:
        BackboneError: the file is for another architecture, or lacks a tensor.
    """
    if found.counts and not isinstance(model, VisionTransformer):
        raise BackboneError(f"{found.path.name}: Google's npz files hold ViTs, {name} is a {type(model).__name__}")
    embed: Any = getattr(model, "patch_embed", None)
    own_patch = embed.patch_size[0] if isinstance(embed, PatchEmbed) else None
    if found.patch and own_patch and found.patch != own_patch:
        raise _misfit(found, name, f"its patches have {found.patch} pixels, the model's {own_patch}")
    resizable = hasattr(model, "set_input_size") and hasattr(embed, "feat_ratio")
    if found.grid and getattr(model, "pos_embed", None) is not None and resizable:
        side = found.grid * int(embed.feat_ratio())
        cast(Any, model).set_input_size((side, side))  # of initial values, so that the file's come in unchanged
    if found.path.suffix == ".npz":
        _load_npz(model, found, name)
        return
    own = model.state_dict()
    as_stored = own.keys() <= found.stored.keys()  # timm's own names may begin with "encoder."
    tensors = {
        name: value
        for name, value in (found.stored if as_stored else found.tensors).items()
        # A ConvNeXt's head ends in a norm of the backbone; timm knows DINOv2 by its mask token.
        if name in own or name == "mask_token" or not _NOT_BACKBONE.match(name)
    }
    if not tensors:
        raise BackboneError(f"{found.path} holds no backbone weights")
    # timm would resample the biases of other windows; the patches and positions have the model's size by now.
    tables = [n for n in tensors if n.endswith("relative_position_bias_table") and n in own]
    wrong = [n for n in tables if tensors[n].shape != own[n].shape]
    if wrong:
        raise _misfit(found, name, _wrong(wrong, tensors, own))
    try:
        with contextlib.redirect_stdout(None):  # timm prints
            renamed = rename(tensors, model)
    except Exception as problem:  # timm does not check the shapes that it unpacks
        wrong = [n for n, value in tensors.items() if n in own and value.shape != own[n].shape]
        raise _misfit(found, name, _wrong(wrong, tensors, own) or _told(problem)) from None
    counts = "num_batches_tracked"  # files of old versions of torch lack them, and nothing reads them
    missing = [n for n in own if n not in renamed and not n.endswith(counts)]
    unknown = [n for n in renamed if n not in own and not _NOT_BACKBONE.match(n)]
    wrong = [n for n, value in own.items() if n in renamed and renamed[n].shape != value.shape]
    # timm's filter leaves the biases of DINOv3 out where the model has none
    unknown += [n for n in tensors if n.endswith("attn.qkv.bias") and n not in renamed and _lost(n, tensors, renamed)]
    if missing == _LAST_NORM and isinstance(model, ConvNeXt):
        logger.warning(
            "%s has no last norm, as ConvNeXt V2's pre-training: it keeps its initial values", found.path.name
        )
        missing = []
    told = [_some("missing", missing), _some("unknown", unknown), _wrong(wrong, renamed, own)]
    if any(told):
        hints = [hint for sign, hint in _HINTS if any(n.endswith(sign) for n in unknown)]
        advice = f"; try {' '.join(f'--backbone-arg {hint}' for hint in hints)}" if hints else ""
        raise _misfit(found, name, " and ".join(filter(None, told)) + advice)
    model.load_state_dict(renamed, strict=False)


_LAST_NORM = ["head.norm.weight", "head.norm.bias"]
_HINTS = (
    ("ls1.gamma", "init_values=1e-5"),
    ("reg_token", "reg_tokens=NUMBER"),
    ("norm_pre.weight", "pre_norm=true"),
    ("q_norm.weight", "qk_norm=true"),
    ("attn.qkv.bias", "qkv_bias=true"),
)
"""Ends of unknown names, and the argument of timm's model that has them."""


def _lost(name: str, tensors: Mapping[str, Tensor], renamed: Mapping[str, Tensor]) -> bool:
    query, _, value = tensors[name].chunk(3)
    return name.replace("qkv.bias", "q_bias") not in renamed and bool(query.any() or value.any())


def _misfit(found: Weights, name: str, problem: str) -> BackboneError:
    """The error of a file that does not fit, with what it holds and names that would fit."""
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in found.tensors]
    depth = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    first = found.tensors.get("blocks.0.norm1.weight")
    if not depth or not found.patch or first is None:
        return BackboneError(f"{found.path} does not fit the backbone {name}: {problem}")
    width = len(first)
    size = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}.get(width, "*")
    like = [found.arch] if found.arch else timm.list_models(f"vit_{size}_patch{found.patch}_*")
    fitting = f"; such as {shortened(like, 3)}" if like and size != "*" and name.split(".")[0] not in like else ""
    return BackboneError(
        f"{found.path} does not fit the backbone {name}: {problem}; the file holds a ViT of {depth} blocks of width "
        f"{width} with patches of {found.patch} pixels{fitting}"
    )


def _wrong(names: list[str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    return _some(
        "wrong shape:",
        [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}" for name in names],
    )


def _told(problem: Exception) -> str:
    """The first two lines of an error: torch's first line says only that there is an error."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(problem).__name__


def _some(kind: str, names: list[str]) -> str:
    return f"{kind} {shortened(names, 3)}" if names else ""


def _load_npz(model: Any, found: Weights, name: str) -> None:
    counts = {"blocks": len(model.blocks), "heads": model.blocks[0].attn.num_heads}
    if found.counts != counts:
        raise _misfit(found, name, f"it holds {found.counts}, the model {counts}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    try:
        model.load_pretrained(str(found.path))
    except Exception as problem:  # errors of zipfile and NumPy, and timm's for arrays of other shapes
        raise BackboneError(
            f"{found.path} is not a Google ViT checkpoint of this architecture: {_told(problem)}"
        ) from None
    absent = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if absent:
        raise _misfit(found, name, _some("missing", absent))
