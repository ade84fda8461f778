"""Attention maps by block for the pooled token, as in LSPT's figures 3 and 4.

LSPT, https://arxiv.org/abs/2402.17406. The forward uses fused attention, which does not keep its weights; here they
are recomputed from the queries and keys that :func:`prompttune.layers.probe.watching_attention` gives. Shapes: B
images, H heads, K keys per query, a grid of R rows and C columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.backbones.vit import VitBackbone
from prompttune.errors import UsageError
from prompttune.explanation.subjects import ExplainedModel
from prompttune.layers.probe import watching_attention


@dataclass(frozen=True)
class BlockAttention:
    """Attention of one query in a block.

    The query is the class token if the backbone pools it; else the weights are the mean over the queries of the
    patches.
    """

    weights: Tensor
    """[B, H, K], rows sum to 1: first the prefix tokens, then the prompts, then the patches."""
    num_prefix_tokens: int
    grid: tuple[int, int]

    @property
    def maps(self) -> Tensor:
        """Attention to the patches, [B, H, R, C]."""
        rows, columns = self.grid
        maps: Tensor = self.weights[..., -rows * columns :].unflatten(-1, self.grid)
        return maps

    def shares(self) -> dict[str, float]:
        """Shares of the attention to prefix tokens, prompts and patches, means over images and heads; they sum to 1."""
        patches = self.grid[0] * self.grid[1]
        whole = self.weights.mean(dim=(0, 1))
        return {
            "prefix": float(whole[: self.num_prefix_tokens].sum()),
            "prompts": float(whole[self.num_prefix_tokens : len(whole) - patches].sum()),
            "patches": float(whole[len(whole) - patches :].sum()),
        }


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of the scaled scores, as in :func:`prompttune.layers.attention.attend`.

    Args:
        q, k: [..., N, d] and [..., K, d].
        mask: tensor added to the scores.

    Returns:
        float32 [..., N, K].
    """
    scores: Tensor = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(dim=-1)


def check_readable(backbone: Backbone) -> None:
    """Raise :class:`UsageError` unless ``backbone`` has one attention map of all patches in each block."""
    if isinstance(backbone, SwinBackbone):
        raise UsageError(f"{backbone.name} attends within windows, which gives no map of the image")
    if not isinstance(backbone, VitBackbone):
        raise UsageError(f"{backbone.name} has no attention{' that can be read' if backbone.limits else ''}")


@torch.no_grad()
def block_attention(subject: ExplainedModel, images: Tensor, layers: list[int]) -> dict[int, BlockAttention]:
    """Run images through a subject and keep the attention of the chosen blocks.

    A block's self attention is the first one after its norm; SA²VP's cross attention comes after it. If two pathways
    share a batch, the image's pathway comes first. ``dam-vp`` makes two passes, of which the last one counts.

    Args:
        subject: a run or a plain backbone.
        images: normalised [B, 3, S, S].
        layers: indices of blocks, counted from 0.

    Raises:
        UsageError: the backbone does not have such maps.
    """
    backbone = subject.driven
    check_readable(backbone)
    assert isinstance(backbone, VitBackbone)
    found: dict[int, BlockAttention] = {}
    current: int | None = None

    def enter(index: int, *_: Any) -> None:
        nonlocal current
        current = index

    def watch(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        nonlocal current
        if current in layers:
            rows = slice(len(images))  # without another pathway of the same batch
            found[current] = _pooled(backbone, q[rows], k[rows], mask, subject.leading_keys(current))
        current = None

    with _entering(backbone, enter), watching_attention(watch):
        subject.features(images)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise UsageError(f"{subject.name} shows no attention in layer {missing[0]}")
    return {layer: found[layer] for layer in layers}


@contextlib.contextmanager
def _entering(backbone: VitBackbone, enter: Any) -> Iterator[None]:
    """Call ``enter`` with a block's index whenever the norm before its attention runs."""
    norms: list[nn.Module] = [block.timm.norm1 for block in backbone.blocks]
    handles = [norm.register_forward_pre_hook(partial(enter, index)) for index, norm in enumerate(norms)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pooled(backbone: VitBackbone, q: Tensor, k: Tensor, mask: Tensor | None, leading: int) -> BlockAttention:
    q = q.expand(*k.shape[:-2], *q.shape[-2:])  # one query for all rows
    patches = backbone.grid[0] * backbone.grid[1]
    asking = slice(0, 1) if backbone.pools_class_token else slice(q.shape[-2] - patches, None)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], q.shape[-2], -1)[..., asking, :]
    weights = attention_weights(q[..., asking, :], k, mask).mean(dim=-2)  # [B, H, K]
    behind = leading + backbone.num_prefix_tokens
    weights = torch.cat((weights[..., leading:behind], weights[..., :leading], weights[..., behind:]), dim=-1)
    return BlockAttention(weights.cpu(), backbone.num_prefix_tokens, backbone.grid)
