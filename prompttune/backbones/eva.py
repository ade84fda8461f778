"""timm's Eva, opened up: EVA-02, DINOv3, Perception Encoder and other ViTs with rotary position embeddings.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models, ``timm/models/eva.py``).
Queries and keys are turned by the place of their patch (RoFormer, https://arxiv.org/abs/2104.09864; on maps
https://arxiv.org/abs/2403.13298). Prefix tokens and prompts have no place and are not turned. A prompt map has the
patches' own places.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed
from timm.models import eva
from torch import Tensor, nn

from prompttune.backbones.base import Architecture, set_patch_input
from prompttune.backbones.blocks import Constant
from prompttune.backbones.vit import VitBackbone, VitBlock, vit_problem


def _problem(model: Any) -> str:
    problem = vit_problem(model, eva.Eva, eva.EvaBlock, eva.EvaAttention, AttentionRope)
    if not problem and model.rope is not None and not hasattr(model.rope, "feat_shape"):
        return "its rotary embedding has three axes"
    return problem


class EvaBlock(VitBlock):
    """A block whose queries and keys are turned; LayerScale is a parameter of the block.

    Args:
        timm, index, pooled_alone: see :class:`VitBlock`.
        backbone: the backbone, which turns.
    """

    def __init__(self, timm: Any, index: int, pooled_alone: bool, backbone: EvaBackbone) -> None:
        super().__init__(timm, index, pooled_alone)
        self.backbone = backbone

    def query_heads(self, projected: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.query_heads`; turned."""
        return self.backbone.turn(self.index, super().query_heads(projected))

    def key_heads(self, projected: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.key_heads`; turned."""
        return self.backbone.turn(self.index, super().key_heads(projected))

    def scale_attention(self, projected: Tensor) -> Tensor:
        """See :meth:`VitBlock.scale_attention`."""
        return projected if self.timm.gamma_1 is None else projected * self.timm.gamma_1

    def scale_mlp(self, projected: Tensor) -> Tensor:
        """See :meth:`VitBlock.scale_mlp`."""
        return projected if self.timm.gamma_2 is None else projected * self.timm.gamma_2

    def run_timm(self, tokens: Tensor) -> Tensor:
        """See :meth:`VitBlock.run_timm`."""
        return cast(Tensor, self.timm(tokens, rope=self.backbone.table(self.index)))


class EvaBackbone(VitBackbone):
    """A frozen timm Eva of any size, with or without rotary embedding, of all blocks or one for each of them."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.rope = None if model.rope is None else Constant(model.rope.get_embed)
        """Sines and cosines of the patches, [R C, 2 d], or [L, H, R C, 2 d] where every block has its own."""

    def open_block(self, timm: nn.Module, index: int, pooled_alone: bool) -> EvaBlock:
        """See :meth:`VitBackbone.open_block`."""
        return EvaBlock(timm, index, pooled_alone, self)

    def table(self, index: int) -> Tensor | None:
        """:attr:`rope` of one block, without the axis L."""
        table: Tensor | None = None if self.rope is None else self.rope()
        return table[index] if table is not None and table.ndim == 4 else table

    def turn(self, index: int, heads: Tensor) -> Tensor:
        """Turn queries or keys [..., H, n, d] of a block: the last R C of N tokens or more, no fewer tokens.

        Fewer are the pooled token or prompts that ask alone.
        """
        table = self.table(index)
        if table is None or heads.shape[-2] < self.num_tokens:
            return heads
        front = heads.shape[-2] - table.shape[-2]
        width = heads.shape[-1]  # sliced, because export does not fold a split
        sin = F.pad(table[..., :width], (0, 0, front, 0))  # [(H,) n, d]; what stands in front stays as it is
        cos = F.pad(table[..., width:], (0, 0, front, 0), value=1.0)
        return cast(Tensor, apply_rot_embed(heads, sin, cos, half=bool(self.blocks[index].timm.attn.rotate_half)))


def _wrap(model: eva.Eva, name: str, image_size: int | None) -> EvaBackbone:
    set_patch_input(model, name, image_size)
    return EvaBackbone(model)


EVA = Architecture(
    models=(eva.Eva,),
    modules=("eva",),
    problem=_problem,
    wrap=_wrap,
    kind=EvaBackbone,
    rename=eva.checkpoint_filter_fn,
    settings={"dynamic_img_size": False},
)
