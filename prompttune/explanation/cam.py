"""Grad-CAM of the last layer, with Captum's ``LayerGradCam``.

Grad-CAM: https://arxiv.org/abs/1610.02391. Captum, https://captum.ai, needs a module whose output has channels before
rows and columns. A transformer does not have such a module, and the forward takes a state besides the images. The
network is therefore wrapped, and the output of the chosen layer passes through an identity in that shape.

On a ViT the layer is the norm before the last block's attention: after it the patches do not reach a class token any
more (the choice of https://github.com/jacobgil/pytorch-grad-cam). On a Swin it is the norm before the pooling, on a
ResNet or ConvNeXt the last block, whose map is pooled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.conv import ConvBackbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.backbones.vit import VitBackbone
from prompttune.errors import MissingExtraError, UsageError
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
    if model.task != "classification":
        raise UsageError(f"a {model.task} does not predict a class for the whole image")
    last_layer(model.method.driven)


class MappedModel(nn.Module):
    """Logits of images under one state; the last layer's output passes through :attr:`maps` as [B, D, R, C]."""

    def __init__(self, model: PromptModel, state: State) -> None:
        super().__init__()
        self.model = model
        self.state = state
        self.layer, self.grid = last_layer(model.method.driven)
        self.gives_maps = isinstance(model.method.driven, ConvBackbone)
        self.maps = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to logits [B, classes], bit-identical to those without the identity."""
        with self._detour():
            return self.model.forward_state(images, self.state).logits

    @contextlib.contextmanager
    def _detour(self) -> Iterator[None]:
        handle = self.layer.register_forward_hook(self._through_maps)
        try:
            yield
        finally:
            handle.remove()

    def _through_maps(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        """Maps [B, D, R, C], tokens [B, N, D] with the patches last, or [pathways, B, N, D], the image's first."""
        if self.gives_maps:
            return cast(Tensor, self.maps(output))
        pathways = output if output.ndim == 4 else output.unsqueeze(0)
        tokens = pathways[0]
        front = tokens.shape[1] - self.grid[0] * self.grid[1]
        maps = tokens[:, front:].transpose(1, 2).unflatten(2, self.grid)  # [B, D, R, C]
        patches = self.maps(maps).flatten(2).transpose(1, 2)  # [B, R C, D]
        tokens = torch.cat((tokens[:, :front], patches), dim=1)
        return torch.cat((tokens.unsqueeze(0), pathways[1:])) if output.ndim == 4 else tokens


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
        MissingExtraError: Captum is not installed.
        UsageError: the backbone is not supported.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        raise MissingExtraError("captum", "explain", "or leave grad-cam out of --show") from None
    mapped = MappedModel(model, state)
    weighed = LayerGradCam(mapped, mapped.maps).attribute(
        images.clone().requires_grad_(), target=target, relu_attributions=True
    )
    return cast(Tensor, weighed).detach().float().squeeze(1).cpu()
