"""Attention maps by block: where the token that is pooled looks, LSPT's figures 3 and 4.

LSPT, https://arxiv.org/abs/2402.17406. The forward uses fused attention, which keeps no weights; here they are
recomputed from the queries and keys that :func:`prompttune.layers.probe.watching_attention` shows. Shapes: B images,
H heads, K keys a query sees, a grid of R rows and C columns.
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
from prompttune.explanation.subjects import Subject
from prompttune.layers.probe import watching_attention


@dataclass(frozen=True)
class BlockAttention:
    """What one query of a block attends to.

    The query is the class token where that is what the backbone pools, else the mean over the patches' queries of
    their weights.
    """

    weights: Tensor
    """[B, H, K], rows sum to 1: prefix tokens first, then prompts, the patches last."""
    num_prefix_tokens: int
    grid: tuple[int, int]

    @property
    def maps(self) -> Tensor:
        """The part on the patches, [B, H, R, C]."""
        rows, columns = self.grid
        maps: Tensor = self.weights[..., -rows * columns :].unflatten(-1, self.grid)
        return maps

    def shares(self) -> dict[str, float]:
        """Parts of the attention on prefix tokens, prompts and patches, means over images and heads; their sum is 1."""
        patches = self.grid[0] * self.grid[1]
        whole = self.weights.mean(dim=(0, 1))
        return {
            "prefix": float(whole[: self.num_prefix_tokens].sum()),
            "prompts": float(whole[self.num_prefix_tokens : len(whole) - patches].sum()),
            "patches": float(whole[len(whole) - patches :].sum()),
        }


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of the scaled scores, as :func:`prompttune.layers.attention.attend` weighs the values.

    Args:
        q, k: [..., N, d] and [..., K, d].
        mask: added to the scores.

    Returns:
        float32 [..., N, K].
    """
    scores: Tensor = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(dim=-1)


def check_readable(backbone: Backbone) -> None:
    """Raise :class:`UsageError` unless the attention of ``backbone`` has one map of all patches a block."""
    if isinstance(backbone, SwinBackbone):
        raise UsageError(f"{backbone.name} attends within windows, which gives no map of the image")
    if not isinstance(backbone, VitBackbone):
        raise UsageError(f"{backbone.name} has no attention")


@torch.no_grad()
def block_attention(subject: Subject, images: Tensor, layers: list[int]) -> dict[int, BlockAttention]:
    """Run images through a subject and keep what the chosen blocks attend to.

    A block's self attention is the first one behind its norm; what SA²VP asks the other pathway comes after it, and
    of two pathways in one batch the image's is the first. Of two passes, which ``dam-vp`` makes, the last counts.

    Args:
        subject: a run, or a plain backbone.
        images: normalised [B, 3, S, S].
        layers: blocks, counted from 0.

    Raises:
        UsageError: the backbone has no such maps.
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
            found[current] = _pooled(backbone, q, k, mask, subject.leading_keys)
        current = None

    with _entering(backbone, enter), watching_attention(watch):
        subject.features(images)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise UsageError(f"{subject.name} shows no attention in layer {missing[0]}")
    return {layer: found[layer] for layer in layers}


@contextlib.contextmanager
def _entering(backbone: VitBackbone, enter: Any) -> Iterator[None]:
    """Call ``enter`` with a block's number whenever the norm in front of its attention runs."""
    norms: list[nn.Module] = [backbone.block(index).norm1 for index in range(backbone.depth)]
    handles = [norm.register_forward_pre_hook(partial(enter, index)) for index, norm in enumerate(norms)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pooled(backbone: VitBackbone, q: Tensor, k: Tensor, mask: Tensor | None, leading: int) -> BlockAttention:
    if q.ndim == 5:  # two pathways in one batch
        q, k = q[0], k[0]
    q = q.expand(*k.shape[:-2], *q.shape[-2:])  # one query for all rows
    patches = backbone.grid[0] * backbone.grid[1]
    asking = slice(0, 1) if backbone.pools_class_token else slice(q.shape[-2] - patches, None)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], q.shape[-2], -1)[..., asking, :]
    weights = attention_weights(q[..., asking, :], k, mask).mean(dim=-2)  # [B, H, K]
    behind = leading + backbone.num_prefix_tokens
    weights = torch.cat((weights[..., leading:behind], weights[..., :leading], weights[..., behind:]), dim=-1)
    return BlockAttention(weights.cpu(), backbone.num_prefix_tokens, backbone.grid)
