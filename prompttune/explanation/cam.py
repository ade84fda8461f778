"""Grad-CAM of the last layer: https://arxiv.org/abs/1610.02391.

On a ViT the layer is the norm before the last block's attention: after it the patches do not reach a class token any
more (the choice of https://github.com/jacobgil/pytorch-grad-cam). On a Swin it is the norm before the pooling, on a
ResNet or ConvNeXt the last block, whose map is pooled.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.conv import ConvBackbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.backbones.vit import VitBackbone
from prompttune.errors import UsageError
from prompttune.methods import State
from prompttune.model import PromptModel


def last_layer(backbone: Backbone) -> tuple[nn.Module, tuple[int, int]]:
    """The module whose output Grad-CAM weighs, and the rows and columns of its map.

    Raises:
        UsageError: this kind of backbone is not supported.
    """
    if isinstance(backbone, VitBackbone):
        return backbone.blocks[-1].timm.norm1, backbone.grid
    if isinstance(backbone, SwinBackbone):
        return cast(nn.Module, backbone.model.norm), backbone.stages[-1].grid
    if isinstance(backbone, ConvBackbone):
        return backbone.blocks[-1].timm, backbone.stages[-1].grid
    raise UsageError(f"Grad-CAM does not support a {type(backbone).__name__}")


def check_explicable(model: PromptModel) -> None:
    """Raise :class:`UsageError` unless Grad-CAM can explain the answers of ``model``."""
    if not model.task_type.takes("predict"):
        raise UsageError(f"a {model.task_type.name} does not predict a class for the whole image")
    last_layer(model.method.driven)


def grad_cam(model: PromptModel, state: State, images: Tensor, target: int) -> Tensor:
    """Grad-CAM of one class: the last layer's channels, weighted by the mean gradient of the class's logit, then ReLU.

    Args:
        model: a model in evaluation mode.
        state: state of the model.
        images: normalised [B, 3, S, S].
        target: index of the class.

    Returns:
        float32 [B, R, C], at least 0, in units of the logit's gradient times the layer's output.

    Raises:
        UsageError: the backbone is not supported.
    """
    layer, grid = last_layer(model.method.driven)
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        with torch.enable_grad():
            logits = model.forward_state(images.clone().requires_grad_(), state).logits
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, target].sum(), outputs[-1])
    maps, slopes = _as_maps(outputs[-1].detach(), grid), _as_maps(gradient, grid)  # [B, D, R, C]
    weighed: Tensor = (maps * slopes.mean(dim=(2, 3), keepdim=True)).sum(dim=1).relu()
    return weighed.float().cpu()


def _as_maps(output: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [B, D, R, C] of a layer: its maps, the last R C tokens of [B, N, D], or those of the image's pathway."""
    if output.ndim == 4 and tuple(output.shape[2:]) == grid:
        return output
    if output.ndim == 4 and tuple(output.shape[1:3]) == grid:  # timm's own forward of a Swin
        return output.permute(0, 3, 1, 2)
    tokens = output[0] if output.ndim == 4 else output  # [pathways, B, N, D], the image's first
    maps: Tensor = tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
    return maps
