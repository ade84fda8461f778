"""Lower precision of a frozen backbone: half-precision weights and activations; norms, softmax, logits in float32."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import LayerNorm, LayerNorm2d, LayerNorm2dFp32, LayerNormFp32
from torch import Tensor, nn

from prompttune.backbones.base import PatchBackbone
from prompttune.model import PromptModel

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""torch dtype by precision; int8 is traced in float32 and quantised afterwards."""


def typed_model(model: PromptModel, precision: str) -> PromptModel:
    """``model`` with its backbone in ``precision``, a copy unless the precision is the same.

    Norms keep float32 weights and run in float32, because their sums overflow float16; a batch norm, which does not sum
    here, becomes its scale and shift. The task's own parameters are unchanged: a graph gets them as state.
    """
    dtype = TORCH_DTYPES[precision]
    if dtype == torch.float32:
        return model
    typed = copy.deepcopy(model)
    backbone = typed.backbone.model
    kinds = (nn.LayerNorm, nn.GroupNorm)
    norms = {name: module for name, module in backbone.named_modules() if isinstance(module, kinds)}
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            _reduce(module)
    backbone.to(dtype)
    if dtype == torch.bfloat16 and isinstance(typed.backbone, PatchBackbone):
        patches: Any = typed.backbone.model.patch_embed
        patches.float()  # before operator set 22, ONNX lacks bfloat16 convolutions
        patches.register_forward_hook(lambda _module, _args, found: found.to(dtype))
    for name, module in norms.items():
        backbone.set_submodule(name, _float32(module, model.backbone.model.get_submodule(name)))
    return typed.eval()


@torch.no_grad()
def _reduce(norm: nn.BatchNorm2d) -> None:
    """Fold a frozen batch norm into its weight and bias: a variance may exceed float16."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
    shift = (0.0 if norm.bias is None else norm.bias) - norm.running_mean * scale
    norm.weight, norm.bias = nn.Parameter(scale, requires_grad=False), nn.Parameter(shift, requires_grad=False)
    norm.running_mean, norm.running_var, norm.eps = torch.zeros_like(scale), torch.ones_like(scale), 0.0


class _Float32(nn.Module):
    """A norm, with the activation that it may have, in float32 between tensors of another type."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.drop = getattr(norm, "drop", None)  # where methods find what comes before an activation

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.float())
        return normed.to(x.dtype)


def _float32(norm: nn.LayerNorm | nn.GroupNorm, original: nn.Module) -> nn.Module:
    if type(norm) not in (nn.LayerNorm, LayerNorm, LayerNorm2d):
        return _Float32(copy.deepcopy(original))
    assert isinstance(norm, nn.LayerNorm)
    kind = LayerNorm2dFp32 if isinstance(norm, LayerNorm2d) else LayerNormFp32
    made = kind(norm.normalized_shape, norm.eps, norm.elementwise_affine)
    made.load_state_dict(original.state_dict())
    made.requires_grad_(False)
    assert isinstance(made, nn.LayerNorm)
    return made.to(next(original.parameters(), torch.empty(0)).device)


_convolutions = threading.Lock()


@contextmanager
def exact_convolutions(exact: bool = True) -> Iterator[None]:
    """Let convolutions of float32 on CUDA, which PyTorch leaves to TF32 unless told otherwise, run in float32.

    The flag is one of the process and is read when a kernel is put into its stream, so blocks take turns, and nothing
    needs to be waited for inside of one. ``exact`` False does nothing.
    """
    if not exact:
        yield
        return
    cudnn: Any = torch.backends.cudnn  # it puts an object in its module's place
    with _convolutions:
        before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
        try:
            yield
        finally:
            cudnn.conv.fp32_precision = before
