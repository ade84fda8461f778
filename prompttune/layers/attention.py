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
_for_cpu: ContextVar[bool] = ContextVar("for_cpu", default=False)
FAINT = -40.0
"""Difference to the score of another key at which a key's weight, e^-40, is lost in the rounding of float32."""


def is_explicit() -> bool:
    """Whether :func:`explicit_attention` asks for explicit products."""
    return bool(_explicit.get())


@contextlib.contextmanager
def explicit_attention(explicit: bool = True, for_cpu: bool = False) -> Iterator[None]:
    """Choose the form of every :func:`attend` in the block; outside of a block, each call uses the faster form.

    Args:
        explicit: whether to write out products and softmax.
        for_cpu: whether the explicit form is for ONNX Runtime or OpenVINO on a CPU. On some processors ONNX Runtime's
            softmax is slow where a score lies more than some 87 below another one of its row. OpenVINO joins products
            and softmax only if no result between them is cast; in bf16 it rounds the scores to bf16 with a cast too.
    """
    tokens = _explicit.set(explicit), _for_cpu.set(for_cpu)
    try:
        yield
    finally:
        _explicit.reset(tokens[0])
        _for_cpu.reset(tokens[1])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, hides: bool = False) -> Tensor:
    """Softmax attention.

    Args:
        q: [..., Nq, d]; leading axes of size 1 are broadcast to those of k.
        k, v: [..., Nk, d].
        mask: float32, added to the scores, broadcast to [..., Nq, Nk].
        hides: whether the mask hides keys by scores far below all others; with as many queries as keys, a query must
            see the key of its own number.

    Returns:
        [..., Nq, d]. The explicit form scales q before the product, which keeps float16 scores in range, and computes
        the softmax in float32, except for bf16 on a CPU.
    """
    probe_attention(q, k, mask)
    explicit = _explicit.get()
    if not (_slow_backward(q, k, v) if explicit is None else explicit):
        return _fused(q, k, v, mask)
    q, for_cpu = q * q.shape[-1] ** -0.5, _for_cpu.get()
    in_bf16 = for_cpu and q.dtype == torch.bfloat16
    scores = q @ k.transpose(-2, -1)
    scores = scores if in_bf16 else scores.float()
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
        if for_cpu and not in_bf16 and hides and q.shape[-2] == k.shape[-2]:
            own = (q * k).sum(-1, keepdim=True).float()
            diagonal = mask.flatten(-2)[..., :: mask.shape[-1] + 1].unsqueeze(-1)
            scores = scores.maximum(own + (diagonal + FAINT))
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
