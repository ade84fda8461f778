"""SA²VP over convolutions written from its description, over timm's own parts, nothing folded. Slow; for comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

import prompttune as pt
from prompttune.backbones import ConvBackbone
from prompttune.methods.sa2vp import ConvSA2VP
from prompttune.methods.sa2vp.parts import PromptMap
from tests.equations import aligned_attention_reference


def stretched(size: int, wanted: int) -> Tensor:
    """The matrix [wanted, size] of linear interpolation between centres of pixels, held at the borders."""
    matrix = torch.zeros(wanted, size)
    for row in range(wanted):
        place = min(max((row + 0.5) * size / wanted - 0.5, 0.0), size - 1.0)
        left = int(place)
        matrix[row, left] += 1 - (place - left)
        matrix[row, min(left + 1, size - 1)] += place - left
    return matrix


def prompt_map(prompt: PromptMap, grid: tuple[int, int], own: tuple[int, int], prefix: int = 0) -> Tensor:
    """The map at full width, its patches resized: [1, N, D]."""
    wide = F.linear(prompt.tokens, prompt.proj.weight, prompt.proj.bias)
    patches = wide[0, prefix:].unflatten(0, own)  # [R', C', D]
    resized = torch.einsum("ri,cj,ijd->rcd", stretched(own[0], grid[0]), stretched(own[1], grid[1]), patches)
    return torch.cat((wide[:, :prefix], resized.flatten(0, 1)[None]), dim=1)


def meet(method: ConvSA2VP, index: int, asking: Tensor, seen: Tensor, heads: int) -> Tensor:
    """What ``seen`` gives ``asking``, maps [B, D, R, C] to such a map, γ left out."""
    config, grid = method.config, (asking.shape[2], asking.shape[3])

    def split(x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return normed.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)  # [B, H, N, d]

    window = config.window if config.attention == "aligned" else None
    attended = aligned_attention_reference(split(asking), split(seen), split(seen), grid, 0, window)
    z = asking + attended.transpose(2, 3).flatten(1, 2).unflatten(2, grid)
    if not config.adapter:
        return z
    adapter = method.adapters[index]
    normed = adapter.norm(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    act = F.gelu if config.activation == "gelu" else F.relu
    hidden = act(F.conv2d(normed, adapter.down.weight[..., None, None], adapter.down.bias))
    return F.conv2d(hidden, adapter.up.weight[..., None, None], adapter.up.bias)


def parts(timms: nn.Module) -> tuple[nn.Module, list[tuple[nn.Module, list[nn.Module]]]]:
    """The stem, and for each stage what stands in front of its blocks and the blocks."""
    if isinstance(timms, ResNet):
        layers = (timms.layer1, timms.layer2, timms.layer3, timms.layer4)
        stem = nn.Sequential(timms.conv1, timms.bn1, timms.act1, timms.maxpool)
        return stem, [(nn.Identity(), list(layer)) for layer in layers]
    return timms.stem, [(stage.downsample, list(stage.blocks)) for stage in timms.stages]


def conv_features(model: pt.PromptModel, images: Tensor, heads: int, own: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pooled features of the base and the prompt pathway, [B, D] each; ``own`` is the grid of the learnable map."""
    backbone, method = model.backbone, model.method
    assert isinstance(backbone, ConvBackbone)
    assert isinstance(method, ConvSA2VP)
    timms, config = backbone.model, method.config
    stem, stages = parts(timms)
    h = stem(images)
    grid = (h.shape[2], h.shape[3])
    p = prompt_map(method.prompts["0"], grid, own).transpose(1, 2).unflatten(2, grid)
    if not isinstance(timms, ResNet):
        p = timms.stem[1](p)
    p = p.expand_as(h)
    for number, (before, blocks) in enumerate(stages):
        h, p = before(h), before(p)
        for index, block in enumerate(blocks):
            h, p = block(h), block(p)
            if number == 2 and index in method.prompt_layers:
                p = p + config.gamma * meet(method, index, p, h, heads)
            elif number == 2:
                h = h + config.gamma * meet(method, index, h, p, heads)
    if isinstance(timms, ResNet):
        return h.mean((2, 3)), p.mean((2, 3))
    norm = timms.head.norm
    return norm(h.mean((2, 3), keepdim=True)).flatten(1), norm(p.mean((2, 3), keepdim=True)).flatten(1)
