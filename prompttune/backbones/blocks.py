"""A frozen block in the pieces that methods drive, and stages of such blocks.

Tokens are [..., N, D] with any leading axes, so that two pathways can run as one batch; H heads of d channels each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

QUERY, KEY, VALUE = range(3)
"""Indices of the parts of a joint projection."""


def merge_heads(attended: Tensor) -> Tensor:
    """[..., H, N, d] to [..., N, H d]."""
    return attended.transpose(-3, -2).flatten(-2)


class Constant(nn.Module):
    """A tensor that follows from frozen weights: computed once, or in every call while the weights train.

    Args:
        compute: a bound method, so that a copy of its object computes from the copy's weights.
    """

    value: Tensor

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        self._compute, self.frozen = compute, True
        self.register_buffer("value", compute().detach(), persistent=False)

    def freeze(self, frozen: bool) -> None:
        """Treat the current value as a constant, or compute it in every call from weights that train."""
        self.frozen = frozen
        if frozen:
            self.value = self._compute().detach()

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value if self.frozen else self._compute()


class FrozenBlock:
    """One block of a backbone.

    Args:
        timm: the frozen timm block.
        index: number of the block, counted over the whole model.
    """

    def __init__(self, timm: Any, index: int) -> None:
        self.timm, self.index = timm, index

    def run(self, x: Tensor) -> Tensor:
        """The whole block."""
        return cast(Tensor, self.timm(x))


class AttentionBlock(FrozenBlock):
    """A block of self attention and MLP: ``run`` is ``feed_forward(x + project(attend(*qkv(norm1(x)))))``.

    Architectures differ in :meth:`attend`, in what follows the projections, and in the norms of queries and keys. Where
    norms come last, :meth:`norm1` changes nothing, and :meth:`project` and :meth:`mlp` end with them.
    """

    def __init__(self, timm: Any, index: int) -> None:
        super().__init__(timm, index)
        self.num_heads = int(timm.attn.num_heads)
        self.head_dim = int(timm.attn.proj.in_features) // self.num_heads
        first = next(layer for layer in timm.mlp.modules() if isinstance(layer, nn.Linear))
        self.hidden_width = first.out_features
        """Channels after the MLP's first linear layer."""

    def norm1(self, tokens: Tensor) -> Tensor:
        """The norm before the attention, if there is one."""
        return cast(Tensor, self.timm.norm1(tokens))

    def qkv(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., H, N, d] from normed tokens [..., N, D]."""
        return self.query(normed), *self.key_value(normed)

    def query(self, normed: Tensor) -> Tensor:
        """Only the queries, [..., H, N, d]."""
        return self.query_heads(self.linear_qkv(normed, QUERY))

    def key_value(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Only the keys and values, [..., H, N, d] each."""
        key, value = (self.linear_qkv(normed, part) for part in (KEY, VALUE))
        return self.key_heads(key), self.heads(value)

    def linear_qkv(self, normed: Tensor, part: int) -> Tensor:
        """Queries, keys or values from normed tokens: [..., N, D] to [..., N, H d]."""
        return F.linear(normed, *self.projection(part))

    def projection(self, part: int) -> tuple[Tensor, Tensor | None]:
        """Weight [H d, D] and bias [H d], if there is one, of the queries, keys or values.

        Each part uses its own rows of a joint weight: splitting one large product would copy it.
        """
        attention, width = self.timm.attn, self.num_heads * self.head_dim
        if attention.qkv is None:
            own = (attention.q_proj, attention.k_proj, attention.v_proj)[part]
            return own.weight, own.bias
        rows = slice(part * width, (part + 1) * width)
        if getattr(attention, "q_bias", None) is not None:
            return attention.qkv.weight[rows], (attention.q_bias, None, attention.v_bias)[part]
        return attention.qkv.weight[rows], None if attention.qkv.bias is None else attention.qkv.bias[rows]

    def heads(self, projected: Tensor) -> Tensor:
        """[..., N, H d] to [..., H, N, d]."""
        split: Tensor = projected.unflatten(-1, (self.num_heads, self.head_dim))  # [..., N, H, d]
        return split.transpose(-3, -2)

    def query_heads(self, projected: Tensor) -> Tensor:
        """Split the queries of :meth:`linear_qkv` into heads, [..., H, N, d]."""
        return self.heads(projected)

    def key_heads(self, projected: Tensor) -> Tensor:
        """Split the keys of :meth:`linear_qkv` into heads, [..., H, N, d]."""
        return self.heads(projected)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The block's own attention: [..., H, N, d] each to [..., N, H d]."""
        raise NotImplementedError

    def project(self, attended: Tensor) -> Tensor:
        """The projection of attention output with merged heads, [..., N, H d] to [..., N, D]."""
        return cast(Tensor, self.timm.attn.proj(attended))

    def mlp(self, tokens: Tensor) -> Tensor:
        """The MLP with its norm, without the residual, [..., N, D]."""
        return cast(Tensor, self.timm.mlp(self.timm.norm2(tokens)))

    def feed_forward(self, tokens: Tensor) -> Tensor:
        """The second half of the block with its residual, [..., N, D]."""
        return tokens + self.mlp(tokens)

    def run(self, x: Tensor) -> Tensor:
        """The whole block, [..., N, D]."""
        return self.feed_forward(x + self.project(self.attend(*self.qkv(self.norm1(x)))))


Kind = TypeVar("Kind", bound=FrozenBlock)


@dataclass(frozen=True)
class Stage(Generic[Kind]):
    """Blocks that end on one grid."""

    blocks: tuple[Kind, ...]
    grid: tuple[int, int]
    """Rows and columns of the map after each of these blocks."""
    width: int

    @property
    def num_tokens(self) -> int:
        """Number of places in the map."""
        return self.grid[0] * self.grid[1]
