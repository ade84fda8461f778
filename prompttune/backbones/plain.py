"""Any timm model as a whole, for the methods that need its features, its maps or its modules.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from prompttune.backbones.base import Architecture, Backbone, set_patch_input
from prompttune.errors import UsageError, describe_failure


class PlainBackbone(Backbone):
    """A frozen timm model that runs as a whole; its pooled features are those in front of its classifier.

    Args:
        model: the timm model.
        image_size: side of the square input, in pixels.
    """

    def __init__(self, model: Any, image_size: int) -> None:
        super().__init__(model)
        self.image_size, self.depth, self.grid = image_size, 0, (0, 0)
        self.width = int(model.head_hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        """See :meth:`Backbone.forward`."""
        self.check_images(images)
        return self.run_timm(images)


def _problem(model: Any) -> str:
    parts = ("forward_features", "forward_head", "head_hidden_size", "pretrained_cfg")
    return "" if all(hasattr(model, part) for part in parts) else f"{type(model).__name__} gives no pooled features"


def _wrap(model: Any, name: str, image_size: int | None) -> PlainBackbone:
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    own = int((fixed or model.pretrained_cfg["input_size"])[-1])
    if image_size is None or image_size == own:
        return PlainBackbone(model, own)
    if image_size <= 0:
        raise UsageError(f"image size must be above 0, not {image_size}")
    if model.pretrained_cfg.get("fixed_input_size") and not hasattr(model, "set_input_size"):
        raise UsageError(f"{name} takes images of {own} pixels, not of {image_size}")
    try:
        if hasattr(model, "set_input_size"):
            set_patch_input(model, name, image_size)
        backbone = PlainBackbone(model, image_size)
        with torch.no_grad():
            backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError, IndexError) as problem:
        raise UsageError(
            f"{name} does not run on images of {image_size} pixels, its own size is {own}: {describe_failure(problem)}"
        ) from None
    return backbone


def _rename(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename by the function that timm keeps beside the model, if there is one."""
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return tensors if rename is None else rename(tensors, model)


PLAIN = Architecture(
    models=(nn.Module,),
    modules=(),
    problem=_problem,
    wrap=_wrap,
    kind=PlainBackbone,
    rename=_rename,
)
