"""VPT as released: https://github.com/KMnP/vpt, ``src/models/vit_prompt/`` and ``src/engine/trainer.py``.

Two kinds of file. ``Checkpointer.save`` of fvcore writes ``model`` with the whole network: ``enc.`` a ViT-pytorch
(supervised, ``enc.transformer.``) or a timm ViT (MoCo v3), ``head.last_layer``. ``SAVE_FOR_EACH_EPOCH`` writes the
prompts alone, ``shallow_prompt`` and ``deep_prompt``, as NumPy arrays.

``prompt_embeddings`` [1, P, d] enter block 0, ``deep_prompt_embeddings`` [L - 1, P, d] the others; with
``prompt_proj`` (d to D) both are projected first, which folds into them exactly.

Refused, because our VPT computes something else: MAE (its head reads the mean of prompts and patches), Swin (the
released code pools prompts too and pairs windows with the prompts of other images), prompts for some layers only, a
head of several layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prompttune.backbones import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.checkpoints.importing.layout import (
    Foreign,
    Layout,
    Names,
    jax_vit_names,
    need_class_token,
    refuse_given,
    same_weights,
    take_backbone,
    take_head,
    timm_names,
)
from prompttune.checkpoints.importing.source import Source
from prompttune.errors import CheckpointError

ENCODER, HEAD = "enc.", "head.last_layer"
JAX = f"{ENCODER}transformer."
SHALLOW, DEEP, PROJECTION = "prompt_embeddings", "deep_prompt_embeddings", "prompt_proj"
ALONE = ("shallow_prompt", "deep_prompt")
"""Names in a file that holds only prompts."""


class VPTLayout(Layout):
    """VPT-shallow and VPT-deep over a ViT."""

    name = "vpt"
    code = "https://github.com/KMnP/vpt"
    normalisation = "imagenet"
    interpolation = "bilinear"
    usual_backbone = "vit_base_patch16_224.orig_in21k"
    settings = ("dropout",)

    def backbone_names(self, source: Source) -> Names | None:
        """See :meth:`Layout.backbone_names`."""
        if source.names(f"{JAX}embeddings."):
            return jax_vit_names(JAX)
        return timm_names(ENCODER) if source.names(f"{ENCODER}patch_embed.") else None

    def convert(self, source: Source, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        """See :meth:`Layout.convert`."""
        self._refuse_others(source)
        vit = need_class_token(backbone, "VPT's ViT")
        names = self.backbone_names(source)
        weights = None if names is None else take_backbone(source, names, vit)
        shallow, deep, projection = _prompt_names(source)
        count, width = (source.size(shallow, axis, 3) for axis in (1, 2))
        prompts = source.take(shallow, (1, count, width))
        is_deep = deep in source
        if is_deep:
            prompts = torch.cat((prompts, source.take(deep, (vit.depth - 1, count, width))))
        prompts = _projected(prompts, source, projection, vit)
        head = take_head(source, HEAD, vit)
        method = "vpt-deep" if is_deep else "vpt-shallow"
        source.check(f"{method} over {vit.name} at {vit.image_size} pixels")
        refuse_given(given, {"num_prompts": count})
        found = Foreign(method, {"num_prompts": count}, {}, {"prompts": prompts}, head)
        if weights is not None:
            found.backbone = same_weights(weights, vit, source.where)
        return found

    def _refuse_others(self, source: Source) -> None:
        if source.names(f"{ENCODER}layers."):
            raise CheckpointError(
                f"{source.where} is VPT over a Swin: the released code pools prompts beside patches and pairs windows "
                "with the prompts of other images, which vpt-shallow and vpt-deep do not"
            )
        if f"{ENCODER}fc_norm.weight" in source:
            raise CheckpointError(
                f"{source.where} is VPT over MAE, whose head reads the mean of prompts and patches; vpt-shallow and "
                "vpt-deep read the backbone's own pooling"
            )
        if source.names("head.projection."):
            raise CheckpointError(f"{source.where} has a head of several layers; a task's head is one linear layer")


def _prompt_names(source: Source) -> tuple[str, str, str]:
    """Names of the prompts of block 0, the prompts of the other blocks, and their projection."""
    if ALONE[0] in source:
        return (*ALONE, "")
    prefix = JAX if f"{JAX}{SHALLOW}" in source else ENCODER
    return f"{prefix}{SHALLOW}", f"{prefix}{DEEP}", f"{prefix}{PROJECTION}"


def _projected(prompts: Tensor, source: Source, projection: str, backbone: VitBackbone) -> Tensor:
    """Prompts [1 or L, P, d] at the backbone's width, [1 or L, P, D]."""
    narrow = prompts.shape[-1]
    if projection and f"{projection}.weight" in source:
        weight = source.take(f"{projection}.weight", (backbone.width, narrow))
        return prompts @ weight.T + source.take(f"{projection}.bias", (backbone.width,))
    if narrow != backbone.width:
        raise CheckpointError(
            f"{source.where}: its prompts have {narrow} channels and no projection, {backbone.name} has "
            f"{backbone.width}"
        )
    return prompts
