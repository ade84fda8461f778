"""timm's ResNet and ConvNeXt, opened up stage by stage and block by block: the parts that prompt methods drive.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models,
``timm/models/resnet.py`` and ``convnext.py``); the models are https://arxiv.org/abs/1512.03385,
https://arxiv.org/abs/2201.03545 (ConvNeXt) and https://arxiv.org/abs/2301.00808 (ConvNeXt V2). Maps are [B, C, R, C']
as convolutions take them; B images, C channels, R rows and C' columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TypeAlias, cast

import torch
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, checkpoint_filter_fn
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from prompttune.backbones.base import Architecture, StagedBackbone
from prompttune.backbones.blocks import FrozenBlock, Stage
from prompttune.errors import UsageError
from prompttune.layers.probe import probe

ConvModel: TypeAlias = ResNet | ConvNeXt
_BLOCKS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    ResNet: (BasicBlock, Bottleneck),
    ConvNeXt: (ConvNeXtBlock,),
}


def _problem(model: ConvModel) -> str:
    if type(model) not in _BLOCKS:
        return f"it is a {type(model).__name__}"
    if _pooling(model) == "":
        return "it has no pooling"
    for stage in _stages(model):
        for block in _blocks(stage):
            if type(block) not in _BLOCKS[type(model)]:
                return f"its blocks are {type(block).__name__}"
    return ""


def _pooling(model: ConvModel) -> str:
    pool = model.global_pool if isinstance(model, ResNet) else model.head.global_pool
    return str(pool.pool_type)


def _stages(model: ConvModel) -> list[nn.Module]:
    if isinstance(model, ResNet):
        return [model.layer1, model.layer2, model.layer3, model.layer4]
    return list(model.stages)


def _blocks(stage: nn.Module) -> list[nn.Module]:
    return list(cast(nn.Sequential, stage if isinstance(stage, nn.Sequential) else stage.blocks))


def _stem(model: ConvModel) -> nn.Sequential:
    return nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool) if isinstance(model, ResNet) else model.stem


def _map_shapes(model: ConvModel, image_size: int) -> Iterator[tuple[int, int, int]]:
    """Channels, rows and columns of the maps after the stem and after each stage, without computing them."""
    x = torch.empty(1, 3, image_size, image_size, device="meta")
    for part in (_stem(model), *_stages(model)):
        tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        with torch.no_grad():
            x = torch.func.functional_call(part, shapes, (x,))
        yield int(x.shape[1]), int(x.shape[2]), int(x.shape[3])


class ConvBackbone(StagedBackbone):
    """A frozen timm ResNet or ConvNeXt of any depth, width and image size; batch norms keep their running statistics.

    ``x`` is a map [B, C, R, C'].

    Args:
        model: the timm model.
        image_size: side of the square input, in pixels.

    Raises:
        UsageError: the image is too small for the model's strides.
    """

    model: ConvModel

    def __init__(self, model: ConvModel, image_size: int) -> None:
        super().__init__(model)
        self.image_size = image_size
        try:
            shapes = list(_map_shapes(self.model, image_size))
        except RuntimeError:  # a convolution or pooling window exceeds the map
            raise UsageError(
                f"image size {image_size} is too small: the map of the last stage would be empty"
            ) from None
        self.stem_width, rows, columns = shapes[0]
        self.grid = (rows, columns)
        numbers = itertools.count()
        self.set_stages(
            Stage(tuple(FrozenBlock(timm, next(numbers)) for timm in _blocks(stage)), (grid[0], grid[1]), width)
            for stage, (width, *grid) in zip(_stages(self.model), shapes[1:], strict=True)
        )
        self.width = int(self.model.head_hidden_size)

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to the stem's output, [B, C, R, C']."""
        stem = _stem(self.model)
        first = next(module for module in stem.modules() if isinstance(module, nn.Conv2d))
        x = cast(Tensor, stem(images.to(first.weight.dtype)))
        probe("embed", x)
        return x

    def position(self, x: Tensor) -> Tensor:
        """Apply the last norm of a ConvNeXt's stem to a prompt map [1, C, R, C']; a ResNet's stem has none."""
        return x if isinstance(self.model, ResNet) else cast(Tensor, self.model.stem[-1](x))

    def enter(self, number: int, x: Tensor) -> Tensor:
        """Apply the layers between two stages, before stage ``number``; a ResNet has none."""
        if isinstance(self.model, ResNet):
            return x
        return cast(Tensor, self.model.stages[number].downsample(x))

    def pool(self, x: Tensor) -> Tensor:
        """The model's own pooling with its norms: [B, C, R, C'] to [B, D]."""
        if not isinstance(self.model, ResNet):
            x = self.model.norm_pre(x)
        # With channels last, the exporter would create a view with wrong strides for the pooling.
        return cast(Tensor, self.model.forward_head(x.contiguous(), pre_logits=True))


def _wrap(model: ConvModel, _name: str, image_size: int | None) -> ConvBackbone:
    size = int(model.pretrained_cfg["input_size"][-1]) if image_size is None else image_size
    if size <= 0:
        raise UsageError(f"image size must be above 0, not {size}")
    return ConvBackbone(model, size)


def _rename(tensors: dict[str, Tensor], model: ConvModel) -> dict[str, Tensor]:
    return tensors if isinstance(model, ResNet) else cast(dict[str, Tensor], checkpoint_filter_fn(tensors, model))


CONV = Architecture(
    models=(ResNet, ConvNeXt),
    modules=("resnet", "convnext"),
    problem=_problem,
    wrap=_wrap,
    kind=ConvBackbone,
    rename=_rename,
)
