"""SSF, scaling and shifting of features: https://arxiv.org/abs/2210.08823 (NeurIPS 2022).

Every linear operation and norm is followed by a scale and a shift per channel, at the places of the released code: the
patch embedding, then in each block ``norm1``, ``qkv``, ``proj``, ``norm2``, ``fc1``, ``fc2``, and the final norm. For
ViT-B/16 these are 205,824 values.

The paper merges them into the weights, which would make a task a copy of the backbone; here they stay per-row
tensors, so tasks can be mixed in a batch. The released code scales ``proj`` and ``fc2`` before LayerScale, which is a
factor per channel, so its effect on the shift folds into the state. Deviation: a backbone with a norm in its patch
embedding has one place there, after the norm, while the released code has two. With ``first_block`` above 0 the patch
embedding is shared and has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBlock
from prompttune.errors import BackboneError
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Levels, State, implements
from prompttune.methods.over_vit import BlocksConfig, OverVit

INIT_STD = 0.02


@dataclass(frozen=True)
class SSFConfig(BlocksConfig):
    """Settings of SSF."""

    method = "ssf"
    summary = "Scale and shift of the features after every layer"
    paper = "https://arxiv.org/abs/2210.08823"


@implements(SSFConfig)
class SSF(OverVit):
    """``scale.{place}`` and ``shift.{place}`` for the places of :meth:`shapes`, changed blocks stacked."""

    own_norms = ("norm1", "norm2")

    def __init__(self, config: SSFConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        for block in self.backbone.blocks:
            if type(block.timm.mlp) is not Mlp:
                kind = type(block.timm.mlp).__name__
                raise BackboneError(f"ssf needs blocks with a plain MLP; {backbone.name} has {kind}")
        shapes = self.shapes()
        self.scale = nn.ParameterDict({place: torch.empty(shape) for place, shape in shapes.items()})
        self.shift = nn.ParameterDict({place: torch.empty(shape) for place, shape in shapes.items()})
        for place in shapes:
            nn.init.normal_(self.scale[place], 1.0, INIT_STD)
            nn.init.normal_(self.shift[place], 0.0, INIT_STD)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The places that are scaled and shifted, with the shape of each scale: L changed blocks, D channels, M hidden
        channels.
        """
        backbone, depth, width = self.backbone, len(self.changed), self.backbone.width
        found: dict[str, tuple[int, ...]] = {
            "patches": (width,),
            "norm1": (depth, width),
            "qkv": (depth, 3, backbone.num_heads * backbone.head_dim),
            "proj": (depth, width),
            "norm2": (depth, width),
            "fc1": (depth, backbone.blocks[0].hidden_width),
            "fc2": (depth, width),
            "norm": (width,),
        }
        if self.first_block:
            del found["patches"]
        return found

    def task_state(self) -> State:
        """``scale.*`` and ``shift.*``; LayerScale is already applied to the shifts of ``proj`` and ``fc2``."""
        state = {f"scale.{place}": scale.unsqueeze(0) for place, scale in self.scale.items()}
        state |= {f"shift.{place}": shift.unsqueeze(0) for place, shift in self.shift.items()}
        shifts: dict[str, list[Tensor]] = {"proj": [], "fc2": []}
        for index, block in enumerate(self.changed):
            shifts["proj"].append(block.scale_attention(self.shift["proj"][index]))
            shifts["fc2"].append(block.scale_mlp(self.shift["fc2"][index]))
        state |= {f"shift.{place}": torch.stack(rows).unsqueeze(0) for place, rows in shifts.items()}
        return state

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:
        """``patches`` [B, R C, D], embedded; or the tokens of :meth:`OverVit.image_state` if blocks are in front."""
        return (
            super().image_state(images, levels)
            if self.first_block
            else {"patches": self.backbone.embed_patches(images)}
        )

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone = self.backbone
        tokens = image["tokens"] if self.first_block else backbone.place(_adapt(image["patches"], state, "patches"))
        for index, block in enumerate(self.changed):
            tokens = block.read(tokens) + _attention(block, index, tokens, state)  # [B, N, D]
            tokens = tokens + _mlp(block, index, tokens, state)
            probe(f"block{block.index}", tokens)
        return Features(backbone.pool_normed(_adapt(backbone.final_norm(tokens), state, "norm")))


def _adapt(features: Tensor, state: State, place: str, *at: int) -> Tensor:
    """Scale and shift features [B, N, C] by the tensors of ``place``; ``at`` selects the block and the part."""
    scale, shift = state[f"scale.{place}"], state[f"shift.{place}"]  # [1 or B, (L, (3,)) C]
    for index in at:
        scale, shift = scale[:, index], shift[:, index]
    return torch.add(features * scale.unsqueeze(1), shift.unsqueeze(1))


def _attention(block: VitBlock, index: int, tokens: Tensor, state: State) -> Tensor:
    """The attention of changed block ``index``, without the residual, [B, N, D] to [B, 1 or N, D]."""
    normed = _adapt(block.norm1(tokens), state, "norm1", index)
    query, key, value = (
        _adapt(block.linear_qkv(source, part), state, "qkv", index, part)
        for part, source in enumerate((block.read(normed), normed, normed))
    )
    attended = block.attend(block.query_heads(query), block.key_heads(key), block.heads(value))
    return _adapt(block.project(attended), state, "proj", index)


def _mlp(block: VitBlock, index: int, tokens: Tensor, state: State) -> Tensor:
    """The MLP of changed block ``index``, without the residual, [B, N, D]."""
    timm = block.timm
    normed = _adapt(timm.norm2(tokens), state, "norm2", index)
    hidden = _adapt(timm.mlp.fc1(normed), state, "fc1", index)
    return _adapt(block.scale_mlp(timm.mlp.fc2(timm.mlp.norm(timm.mlp.act(hidden)))), state, "fc2", index)
