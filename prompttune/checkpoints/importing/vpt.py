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
from prompttune.checkpoints.importing.layout import JAX_VIT_NAMES, Foreign, Layout, Names, names_after, need_class_token
from prompttune.checkpoints.importing.source import FileTensors
from prompttune.errors import CheckpointError

ENCODER = "enc."
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
    head = "head.last_layer"

    def backbone_names(self, source: FileTensors) -> Names | None:
        """See :meth:`Layout.backbone_names`."""
        if source.names(f"{JAX}embeddings."):
            return names_after(JAX, JAX_VIT_NAMES)
        return names_after(ENCODER) if source.names(f"{ENCODER}patch_embed.") else None

    def take_task(self, source: FileTensors, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:  # noqa: ARG002
        """See :meth:`Layout.take_task`."""
        self._refuse_others(source)
        vit = need_class_token(backbone, "VPT's ViT")
        shallow, deep, projection = _prompt_names(source)
        count, width = (source.size(shallow, axis, 3) for axis in (1, 2))
        prompts = source.take(shallow, (1, count, width))
        is_deep = deep in source
        if is_deep:
            prompts = torch.cat((prompts, source.take(deep, (vit.depth - 1, count, width))))
        tensors = {"prompts": _projected(prompts, source, projection, vit)}
        return Foreign("vpt-deep" if is_deep else "vpt-shallow", {"num_prompts": count}, tensors=tensors)

    def _refuse_others(self, source: FileTensors) -> None:
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
        refuse_deep_head(source)


def refuse_deep_head(source: FileTensors) -> None:
    """Raise :class:`CheckpointError` for a head of several layers."""
    if source.names("head.projection."):
        raise CheckpointError(f"{source.where} has a head of several layers; a task's head is one linear layer")


def _prompt_names(source: FileTensors) -> tuple[str, str, str]:
    """Names of the prompts of block 0, the prompts of the other blocks, and their projection."""
    if ALONE[0] in source:
        return (*ALONE, "")
    prefix = JAX if f"{JAX}{SHALLOW}" in source else ENCODER
    return f"{prefix}{SHALLOW}", f"{prefix}{DEEP}", f"{prefix}{PROJECTION}"


def _projected(prompts: Tensor, source: FileTensors, projection: str, backbone: VitBackbone) -> Tensor:
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
