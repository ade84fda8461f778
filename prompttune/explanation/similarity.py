"""Similarity of an image token to the tokens of the prompt map, by block: SA²VP's figure 5.

SA²VP: https://arxiv.org/abs/2312.10376. The outputs of a block are compared by cosine: the chosen token of the image's
pathway with every patch of the prompt pathway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.backbones.conv import ConvBackbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.errors import UsageError
from prompttune.layers.probe import recording
from prompttune.methods import State
from prompttune.model import PromptModel

Maps = dict[int, Tensor]
"""Tokens [N, D] of one image for each block, the patches last."""


@torch.no_grad()
def record_maps(model: PromptModel, state: State, images: Tensor) -> tuple[Maps, Maps]:
    """Run one image and keep both pathways of each block with a prompt map.

    Args:
        model: any model; without a prompt map the result is empty.
        state: state of the model.
        images: normalised [1, 3, S, S].

    Returns:
        Tokens of the image's pathway, and of the prompt pathway.
    """
    with recording() as recorded:
        model.forward_state(images, state, aux=True)
    pairs = {index: (f"block{index}", f"block{index}.prompts") for index in range(model.backbone.depth)}
    both = {index: names for index, names in pairs.items() if all(name in recorded for name in names)}
    return (
        {index: _tokens(recorded[image][0]) for index, (image, _) in both.items()},
        {index: _tokens(recorded[prompts][0]) for index, (_, prompts) in both.items()},
    )


def _tokens(one: Tensor) -> Tensor:
    """Tokens [N, D] unchanged, or the places of a convolutional map [D, R, C]."""
    return one if one.ndim == 2 else one.flatten(1).transpose(0, 1)


def grid_of(backbone: Backbone, layer: int) -> tuple[int, int]:
    """Rows and columns of the map in a block."""
    if isinstance(backbone, SwinBackbone | ConvBackbone):
        return next(stage.grid for stage in backbone.stages if backbone.blocks[layer] in stage.blocks)
    return backbone.grid


def number_of(token: tuple[int, int] | None, grid: tuple[int, int]) -> int:
    """The index of a token among the patches; None is the centre.

    Raises:
        UsageError: the token is outside the map.
    """
    rows, columns = grid
    row, column = (rows // 2, columns // 2) if token is None else token
    if not (0 <= row < rows and 0 <= column < columns):
        raise UsageError(f"token {row},{column} is outside the map of {rows} x {columns} tokens, counted from 0,0")
    return row * columns + column


def cosine_map(image: Tensor, prompts: Tensor, token: int, grid: tuple[int, int]) -> Tensor:
    """Cosine similarity of one patch of the image with every patch of the prompt map.

    Args:
        image, prompts: [N, D], the patches last.
        token: index of the patch.
        grid: rows R and columns C.

    Returns:
        float32 [R, C], from -1 to 1.
    """
    patches = grid[0] * grid[1]
    chosen = image[image.shape[0] - patches + token].float()
    found = F.cosine_similarity(chosen.unsqueeze(0), prompts[-patches:].float(), dim=-1)
    placed: Tensor = found.unflatten(0, grid)
    return placed.cpu()
