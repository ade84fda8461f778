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

from prompttune.backbones import Backbone
from prompttune.checkpoints.importing.layout import (
    Foreign,
    Layout,
    Names,
    image_side,
    jax_vit_names,
    need_class_token,
    need_swin,
    refuse_given,
    same_weights,
    swin_names,
    take_backbone,
    take_head,
)
from prompttune.checkpoints.importing.source import Source
from prompttune.errors import CheckpointError, UsageError
from prompttune.methods import SA2VPConfig
from prompttune.methods.sa2vp.config import SWIN_STAGE

VIT_GAMMA, SWIN_GAMMA, WINDOW = 0.1, 0.5, 3
"""The released code's constants."""
VIT, SWIN = "vit_base.transformer.", "vit_base."
VIT_MAP, SWIN_MAP = f"{VIT}embeddings.ppt", f"{SWIN}patch_embed.deep_ppt"
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

    def backbone_names(self, source: Source) -> Names:
        """See :meth:`Layout.backbone_names`; the whole network is always stored."""
        return swin_names(SWIN) if SWIN_MAP in source else jax_vit_names(VIT)

    def image_size(self, source: Source) -> int | None:
        """See :meth:`Layout.image_size`; on a Swin the map has a token for each patch."""
        if SWIN_MAP not in source:
            return super().image_size(source)
        return image_side(source, SWIN_MAP, f"{SWIN}patch_embed.proj.weight", prefix_tokens=0)

    def convert(self, source: Source, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        """See :meth:`Layout.convert`."""
        if SWIN_MAP not in source and VIT_MAP not in source:
            raise CheckpointError(f"{source.where} holds neither {VIT_MAP} nor {SWIN_MAP}: not an SA²VP checkpoint")
        return self._swin(source, backbone, given) if SWIN_MAP in source else self._vit(source, backbone, given)

    def _vit(self, source: Source, given_backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        backbone = need_class_token(given_backbone, "SA²VP's ViT")
        tokens, width, depth = backbone.num_tokens, backbone.width, backbone.depth
        rank = source.size(VIT_MAP, 2, 3)
        layers = _prompt_layers(source, given, backbone)
        names = jax_vit_names(VIT)
        weights = take_backbone(source, names, backbone)
        tensors = {"prompts.0.tokens": source.take(VIT_MAP, (1, tokens, rank))}
        _take_linear(source, f"{VIT}embeddings.ppt_proj", tensors, "prompts.0.proj", width, rank)
        later = layers[1:]
        if later:
            maps = source.take(f"{VIT}encoder.deep_ppt", (len(later), 1, tokens, rank))
            scales = source.take(f"{VIT}encoder.cross_conv", (len(later), width))
            for place, index in enumerate(later):
                tensors[f"prompts.{index}.tokens"] = maps[place].clone()
                tensors[f"prompts.{index}.scale"] = scales[place].clone()
                _take_linear(source, f"{VIT}encoder.deep_proj.{place}", tensors, f"prompts.{index}.proj", width, rank)
        copies = {}
        for index in range(depth):
            stem = f"{VIT}encoder.cross_attn.{index}"
            _take_adapter(source, stem, tensors, index, width, rank)
            parts = [f"{stem}.attn.to_{part}" for part in "qkv"]
            for leaf in ("weight", "bias"):
                shape = (width, width) if leaf == "weight" else (width,)
                joint = [source.take(f"{part}.{leaf}", shape) for part in parts]
                copies[f"blocks.{index}.attn.qkv.{leaf}"] = torch.cat(joint)
                copies[f"blocks.{index}.attn.proj.{leaf}"] = source.take(f"{stem}.attn.to_out.{leaf}", shape)
                copies[f"blocks.{index}.norm1.{leaf}"] = source.take(f"{stem}.attention_norm.{leaf}", (width,))
        return self._finish(source, backbone, given, weights, copies, tensors, rank, layers, VIT_GAMMA)

    def _swin(self, source: Source, given_backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        backbone = need_swin(given_backbone, source.where)
        layers = SA2VPConfig(prompt_layers=given.get("prompt_layers")).resolved(backbone).prompt_layers
        assert layers is not None
        embedded, stage = backbone.stages[0], backbone.stages[SWIN_STAGE]
        rank = source.size(SWIN_MAP, 2, 3)
        source.ignore([name for name in source.names() if name.endswith(BUFFERS)])
        weights = take_backbone(source, swin_names(SWIN), backbone)
        tensors = {"prompts.0.tokens": source.take(SWIN_MAP, (1, embedded.num_tokens, rank))}
        _take_linear(source, f"{SWIN}patch_embed.proj_ppt", tensors, "prompts.0.proj", embedded.width, rank)
        copies = {}
        for index in range(len(stage.blocks)):
            stem, here = f"{SWIN}layers.{SWIN_STAGE}.cross_attn.{index}", f"layers.{SWIN_STAGE}.blocks.{index}"
            _take_adapter(source, stem, tensors, index, stage.width, rank)
            for leaf in ("weight", "bias"):
                for there, part in (
                    ("attn.qkv", "attn.qkv"),
                    ("attn.to_out", "attn.proj"),
                    ("attention_norm", "norm1"),
                ):
                    own = f"{here}.{part}.{leaf}"
                    copies[own] = source.take(f"{stem}.{there}.{leaf}", weights[own].shape)
        return self._finish(source, backbone, given, weights, copies, tensors, rank, layers, SWIN_GAMMA)

    def _finish(
        self,
        source: Source,
        backbone: Backbone,
        given: Mapping[str, Any],
        weights: dict[str, Tensor],
        copies: dict[str, Tensor],
        tensors: dict[str, Tensor],
        rank: int,
        layers: tuple[int, ...],
        gamma: float,
    ) -> Foreign:
        head = take_head(source, "class_head", backbone)
        source.check(f"SA²VP over {backbone.name} at {backbone.image_size} pixels")
        refuse_given(given, {"rank": rank})
        for name, copied in copies.items():
            if not torch.equal(copied, weights[name]):
                raise CheckpointError(
                    f"{source.where}: the cross attention's copy of {name} is not the block's own; SA²VP freezes both"
                )
        return Foreign(
            "sa2vp",
            {"rank": rank, "prompt_layers": layers, "init": "released"},
            {"gamma": gamma, "window": WINDOW},
            tensors,
            head,
            same_weights(weights, backbone, source.where),
        )


def _prompt_layers(source: Source, given: Mapping[str, Any], backbone: Backbone) -> tuple[int, ...]:
    """The user's prompt layers, or the released code's; the file must hold one map for each."""
    stored = source.shape(f"{VIT}encoder.deep_ppt")
    maps = 1 + (stored[0] if stored else 0)
    layers = SA2VPConfig(prompt_layers=given.get("prompt_layers")).resolved(backbone).prompt_layers
    assert layers is not None
    if len(layers) != maps:
        raise UsageError(
            f"{source.where} holds {maps} prompt maps, prompt layers {','.join(map(str, layers))} need {len(layers)}; "
            "name the blocks with --prompt-layers, 0 first"
        )
    return layers


def _take_linear(source: Source, there: str, tensors: dict[str, Tensor], here: str, rows: int, columns: int) -> None:
    tensors[f"{here}.weight"] = source.take(f"{there}.weight", (rows, columns))
    tensors[f"{here}.bias"] = source.take(f"{there}.bias", (rows,))


def _take_adapter(source: Source, stem: str, tensors: dict[str, Tensor], index: int, width: int, rank: int) -> None:
    for leaf in ("weight", "bias"):
        tensors[f"adapters.{index}.norm.{leaf}"] = source.take(f"{stem}.ffn_norm.{leaf}", (width,))
    _take_linear(source, f"{stem}.ffn.fc1", tensors, f"adapters.{index}.down", rank, width)
    _take_linear(source, f"{stem}.ffn.fc2", tensors, f"adapters.{index}.up", width, rank)
