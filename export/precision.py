"""Lower precision of a frozen backbone: weights and activations in half, norms and softmax and logits in float32."""

from __future__ import annotations

import copy

import torch
from timm.layers import LayerNormFp32
from torch import nn

from prompttune.model import PromptModel

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Precision → torch dtype; int8 is traced in float32 and quantised afterwards."""


def typed_model(model: PromptModel, precision: str) -> PromptModel:
    """``model`` with its backbone in ``precision``, a copy unless nothing changes.

    Norms keep float32 weights and run in float32, because their sums overflow float16. The task's own parameters
    stay as they are: a graph takes them as state.
    """
    dtype = TORCH_DTYPES[precision]
    if dtype == torch.float32:
        return model
    typed = copy.deepcopy(model)
    backbone = typed.backbone.model
    norms = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.LayerNorm)}
    backbone.to(dtype)
    if dtype == torch.bfloat16:
        typed.backbone.model.patch_embed.float()  # ONNX has no bfloat16 convolution before operator set 22
    for name, module in norms.items():
        backbone.set_submodule(name, _float32(module, model.backbone.model.get_submodule(name)))
    return typed.eval()


def _float32(norm: nn.LayerNorm, original: nn.Module) -> nn.LayerNorm:
    made = LayerNormFp32(norm.normalized_shape, norm.eps, norm.elementwise_affine)
    made.load_state_dict(original.state_dict())
    made.requires_grad_(False)
    assert isinstance(made, nn.LayerNorm)
    return made.to(next(original.parameters(), torch.empty(0)).device)
