"""Scaled dot-product attention, fused by the library or as explicit products.

Training and PyTorch inference use the fused form, except for training in half precision on a CPU, where the fused
kernel's backward pass takes more than half of a step (``benchmarks/training_step.py``). Exporters choose the form: ONNX
Runtime and TensorRT recognise and fuse explicit products with a softmax in every release.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prompttune.layers.probe import probe_attention

_explicit: ContextVar[bool | None] = ContextVar("explicit", default=None)


def is_explicit() -> bool:
    """Whether :func:`explicit_attention` asks for explicit products."""
    return bool(_explicit.get())


@contextlib.contextmanager
def explicit_attention(explicit: bool = True) -> Iterator[None]:
    """Choose the form of every :func:`attend` in the block; outside of a block, each call uses the faster form."""
    token = _explicit.set(explicit)
    try:
        yield
    finally:
        _explicit.reset(token)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention.

    Args:
        q: [..., Nq, d]; leading axes of size 1 are broadcast to those of k.
        k, v: [..., Nk, d].
        mask: float32, added to the scores, broadcast to [..., Nq, Nk].

    Returns:
        [..., Nq, d]. The explicit form scales q before the product, which keeps float16 scores in range, and computes
        the softmax in float32.
    """
    probe_attention(q, k, mask)
    explicit = _explicit.get()
    if not (_slow_backward(q, k, v) if explicit is None else explicit):
        return _fused(q, k, v, mask)
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float()
    if mask is not None:
        scores = scores + mask
    attended: Tensor = scores.softmax(dim=-1).to(v.dtype) @ v
    return attended


def _slow_backward(*tensors: Tensor) -> bool:
    """Whether gradients would go through the fused CPU kernel in half precision."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype == torch.float32 or not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in tensors)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Call the fused kernels, which need four axes of equal sizes: other shapes use a slow path.

    TensorRT accepts only masks with four axes.
    """
    q = q.expand(*k.shape[:-2], *q.shape[-2:])
    mask = None if mask is None else mask.to(q.dtype)[(None,) * (4 - mask.ndim)]
    if q.ndim == 4:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q, k, v, leading = q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4), q.shape[:-3]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attended.reshape(*leading, *attended.shape[1:])
