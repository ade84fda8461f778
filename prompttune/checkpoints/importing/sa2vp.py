"""SA²VP as released: https://github.com/tommy-xq/SA2VP, ``vit_train_sa2vp.py`` and ``vit_train_swin.py``.

A file holds ``model`` with the whole network. Over a ViT that is ViT-pytorch's with, under ``transformer.``:

========================================  =====================
there                                     here
========================================  =====================
``embeddings.ppt``, ``.ppt_proj``         ``prompts.0.tokens``, ``.proj``
``encoder.deep_ppt`` [K, 1, N, r]         ``prompts.{i}.tokens``, i the later prompt layers
``encoder.deep_proj.{k}``                 ``prompts.{i}.proj``
``encoder.cross_conv`` [K, D]             ``prompts.{i}.scale``
``encoder.cross_attn.{j}.ffn_norm``       ``adapters.{j}.norm``
``encoder.cross_attn.{j}.ffn.fc1, fc2``   ``adapters.{j}.down``, ``.up``
========================================  =====================

Over a Swin the map is ``patch_embed.deep_ppt`` and ``.proj_ppt``, the adapters ``layers.2.cross_attn.{j}``. The frozen
copies of a block's norm and projections in ``cross_attn`` must equal the block's own, which is what our method reads.
γ (``add_scale``: 0.1 in the ViT's code, 0.5 in the Swin's) and the window (3) are constants in that code and stand in
no file. Its other ViT, ``vit_tinypara_acc.py``, stores the same names but computes with one head and zero-padded
windows; the file does not tell, and such a task is not this method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prompttune.backbones import Backbone, SwinBackbone, VitBackbone
from prompttune.checkpoints.importing.layout import (
    JAX_VIT_NAMES,
    SWIN_NAMES,
    Foreign,
    Layout,
    Names,
    image_side,
    names_after,
    need_class_token,
)
from prompttune.checkpoints.importing.source import FileTensors
from prompttune.errors import CheckpointError, UsageError
from prompttune.methods import SA2VPConfig
from prompttune.methods.sa2vp.config import MEETING_STAGE

VIT_GAMMA, SWIN_GAMMA, WINDOW = 0.1, 0.5, 3
"""The released code's constants."""
VIT, SWIN = "vit_base.transformer.", "vit_base."
VIT_MAP, SWIN_MAP = f"{VIT}embeddings.ppt", f"{SWIN}patch_embed.deep_ppt"
VIT_COPIES = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out",),
    "norm1": ("attention_norm",),
}
SWIN_COPIES = {**VIT_COPIES, "attn.qkv": ("attn.qkv",)}
"""Names in a cross attention of the copies of a block's tensors."""
BUFFERS = ("attn_mask", "relative_position_index")
"""Constants of Swin's windows that timm computes itself."""


class SA2VPLayout(Layout):
    """SA²VP over a ViT or a Swin, told apart by the file's names."""

    name = "sa2vp"
    code = "https://github.com/tommy-xq/SA2VP"
    normalisation = "inception"
    interpolation = "bilinear"
    usual_backbone = "vit_base_patch16_224.orig_in21k"
    settings = ("gamma", "window", "prompt_layers", "activation", "base_weight", "dropout")
    head = "class_head"

    def backbone_names(self, source: FileTensors) -> Names:
        """See :meth:`Layout.backbone_names`; the whole network is always stored."""
        return names_after(SWIN, SWIN_NAMES) if source.names(f"{SWIN}patch_embed.") else names_after(VIT, JAX_VIT_NAMES)

    def image_size(self, source: FileTensors) -> int | None:
        """See :meth:`Layout.image_size`; on a Swin the map has a token for each patch."""
        if SWIN_MAP not in source:
            return super().image_size(source)
        return image_side(source, SWIN_MAP, f"{SWIN}patch_embed.proj.weight", prefix_tokens=0)

    def take_task(self, source: FileTensors, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        """See :meth:`Layout.take_task`."""
        if SWIN_MAP in source:
            return self._swin(source, backbone, given)
        if VIT_MAP not in source:
            raise CheckpointError(f"{source.where} holds neither {VIT_MAP} nor {SWIN_MAP}: not an SA²VP checkpoint")
        return self._vit(source, need_class_token(backbone, "SA²VP's ViT"), given)

    def _vit(self, source: FileTensors, backbone: VitBackbone, given: Mapping[str, Any]) -> Foreign:
        tokens, width = backbone.num_tokens, backbone.width
        found = _found(source.size(VIT_MAP, 2, 3), _prompt_layers(source, given, backbone), VIT_GAMMA)
        rank, later, tensors = found.settings["rank"], found.settings["prompt_layers"][1:], found.tensors
        tensors["prompts.0.tokens"] = source.take(VIT_MAP, (1, tokens, rank))
        _take_linear(source, f"{VIT}embeddings.ppt_proj", tensors, "prompts.0.proj", width, rank)
        if later:
            maps = source.take(f"{VIT}encoder.deep_ppt", (len(later), 1, tokens, rank))
            scales = source.take(f"{VIT}encoder.cross_conv", (len(later), width))
            for place, index in enumerate(later):
                tensors[f"prompts.{index}.tokens"] = maps[place].clone()
                tensors[f"prompts.{index}.scale"] = scales[place].clone()
                _take_linear(source, f"{VIT}encoder.deep_proj.{place}", tensors, f"prompts.{index}.proj", width, rank)
        for index in range(backbone.depth):
            _take_cross(source, f"{VIT}encoder.cross_attn.{index}", found, index, f"blocks.{index}", width, VIT_COPIES)
        return found

    def _swin(self, source: FileTensors, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        if not isinstance(backbone, SwinBackbone):
            raise CheckpointError(f"{source.where} was trained over a Swin; {backbone.name} is not a Swin")
        embedded, stage = backbone.stages[0], backbone.stages[MEETING_STAGE]
        found = _found(source.size(SWIN_MAP, 2, 3), _resolved_layers(given, backbone), SWIN_GAMMA)
        rank, own = found.settings["rank"], f"layers.{MEETING_STAGE}"
        source.ignore([name for name in source.names() if name.endswith(BUFFERS)])
        found.tensors["prompts.0.tokens"] = source.take(SWIN_MAP, (1, embedded.num_tokens, rank))
        _take_linear(source, f"{SWIN}patch_embed.proj_ppt", found.tensors, "prompts.0.proj", embedded.width, rank)
        for index in range(len(stage.blocks)):
            there, here = f"{SWIN}{own}.cross_attn.{index}", f"{own}.blocks.{index}"
            _take_cross(source, there, found, index, here, stage.width, SWIN_COPIES)
        return found


def _found(rank: int, layers: tuple[int, ...], gamma: float) -> Foreign:
    settings = {"rank": rank, "prompt_layers": layers, "init": "released"}
    return Foreign("sa2vp", settings, {"gamma": gamma, "window": WINDOW})


def _resolved_layers(given: Mapping[str, Any], backbone: Backbone) -> tuple[int, ...]:
    """The user's prompt layers, or the released code's."""
    layers = SA2VPConfig(prompt_layers=given.get("prompt_layers")).resolved(backbone).prompt_layers
    assert layers is not None
    return layers


def _prompt_layers(source: FileTensors, given: Mapping[str, Any], backbone: Backbone) -> tuple[int, ...]:
    """The prompt layers; the file must hold one map for each."""
    stored = source.shape(f"{VIT}encoder.deep_ppt")
    maps, layers = 1 + (stored[0] if stored else 0), _resolved_layers(given, backbone)
    if len(layers) != maps:
        raise UsageError(
            f"{source.where} holds {maps} prompt maps, prompt layers {','.join(map(str, layers))} need {len(layers)}; "
            "name the blocks with --prompt-layers, 0 first"
        )
    return layers


def _take_linear(
    source: FileTensors, there: str, tensors: dict[str, Tensor], here: str, rows: int, columns: int
) -> None:
    tensors[f"{here}.weight"] = source.take(f"{there}.weight", (rows, columns))
    tensors[f"{here}.bias"] = source.take(f"{there}.bias", (rows,))


def _take_cross(
    source: FileTensors,
    there: str,
    found: Foreign,
    index: int,
    block: str,
    width: int,
    copies: Mapping[str, tuple[str, ...]],
) -> None:
    """Take the adapter and the frozen copies of one cross attention, called ``there`` in the file."""
    tensors, rank = found.tensors, found.settings["rank"]
    for leaf in ("weight", "bias"):
        tensors[f"adapters.{index}.norm.{leaf}"] = source.take(f"{there}.ffn_norm.{leaf}", (width,))
        for part, names in copies.items():
            rows = width * (3 if part == "attn.qkv" else 1) // len(names)
            shape = (rows, width) if leaf == "weight" and part != "norm1" else (rows,)
            found.copies[f"{block}.{part}.{leaf}"] = torch.cat(
                [source.take(f"{there}.{name}.{leaf}", shape) for name in names]
            )
    _take_linear(source, f"{there}.ffn.fc1", tensors, f"adapters.{index}.down", rank, width)
    _take_linear(source, f"{there}.ffn.fc2", tensors, f"adapters.{index}.up", width, rank)
