"""Settings of segmentation: which head, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prompttune.errors import BackboneError, UsageError, choose

if TYPE_CHECKING:
    from prompttune.backbones.base import Backbone
    from prompttune.methods.base import Method

TASKS = ("classification", "segmentation")
HEADS = ("linear", "pyramid")
IGNORE_INDEX = 255
"""In a mask: no class, neither trained nor scored. So a task has at most this many classes."""
STRIDE = 4
"""Pixels of the input to one of the logits' map, in both directions."""
PYRAMID_LEVELS = 4
MAX_CHANNELS = 4096
"""Of the pyramid head, whose parameters grow with their square."""


@dataclass(frozen=True)
class SegmentationConfig:
    """A task that answers for each place of an image.

    Raises:
        UsageError: an unknown head, or channels out of range.
    """

    head: str = "linear"
    """``linear`` reads the last block's patch tokens; ``pyramid`` those of four depths, UPerNet's way."""
    channels: int = 64
    """Of the pyramid head; the linear one has none of its own."""

    def __post_init__(self) -> None:
        choose("head", self.head, HEADS)
        # The type too: checkpoints that come from elsewhere bring any.
        if type(self.channels) is not int or not 1 <= self.channels <= MAX_CHANNELS:
            raise UsageError(f"a pyramid head needs from 1 to {MAX_CHANNELS} channels, not {self.channels!r}")

    def levels(self, depth: int) -> tuple[int, ...]:
        """Blocks whose patch tokens the head reads: the last one, or four that are evenly spread up to it.

        Raises:
            UsageError: the backbone has too few blocks.
        """
        if self.head == "linear":
            return (depth - 1,)
        if depth < PYRAMID_LEVELS:
            raise UsageError(f"the pyramid head reads {PYRAMID_LEVELS} blocks, the backbone has {depth}: use linear")
        return tuple(-(-(number + 1) * depth // PYRAMID_LEVELS) - 1 for number in range(PYRAMID_LEVELS))

    def graph_settings(self) -> dict[str, Any]:
        """The settings that tasks of one engine must agree on."""
        return {"head": self.head} | ({"channels": self.channels} if self.head == "pyramid" else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> SegmentationConfig | None:
        """The segmentation that a checkpoint's config names, None for a classification.

        Raises:
            UsageError, TypeError: settings that this version does not know.
        """
        found = config.get("segmentation")
        return None if found is None else cls.from_dict(found)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SegmentationConfig:
        """The inverse of :meth:`to_dict`."""
        return cls(**values)


def output_size(image_size: int) -> tuple[int, int]:
    """Height and width of the logits' map: a :data:`STRIDE`-th of the input, rounded up."""
    side = -(-image_size // STRIDE)
    return side, side


def check_maps(method: Method, name: str, backbone: Backbone) -> None:
    """Raise :class:`BackboneError` unless a method gives maps of patch tokens on ``backbone``."""
    if not method.gives_maps:
        raise BackboneError(
            f"segmentation: method {name} gives no maps of patch tokens on {type(backbone).__name__}; "
            "docs/segmentation.md names those that do"
        )
