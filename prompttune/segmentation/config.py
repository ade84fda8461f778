"""Settings of segmentation: the head and its parts."""

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
STRIDE = 4
"""Pixels of the input per value of the logits' map, in both directions."""
PYRAMID_LEVELS = 4
MAX_CHANNELS = 4096
"""Largest number of channels of the pyramid head, whose parameters grow with their square."""


@dataclass(frozen=True)
class SegmentationConfig:
    """A task that answers for each place of an image.

    Raises:
        UsageError: the head is unknown, or the number of channels is out of range.
    """

    head: str = "linear"
    """Head: ``linear`` reads the last block's patch tokens; ``pyramid`` those of four depths, as UPerNet does."""
    channels: int = 64
    """Number of channels of the pyramid head; the linear head does not use it."""

    def __post_init__(self) -> None:
        choose("head", self.head, HEADS)
        # The type is checked too: checkpoints from elsewhere may hold any value.
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
        """The settings that all tasks of an engine must share."""
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
    """Height and width of the logits' map: the input's divided by :data:`STRIDE`, rounded up."""
    side = -(-image_size // STRIDE)
    return side, side


def check_maps(method: Method, name: str, backbone: Backbone) -> None:
    """Raise :class:`BackboneError` unless a method gives maps of patch tokens on ``backbone``."""
    if not method.gives_maps:
        raise BackboneError(
            f"segmentation: method {name} gives no maps of patch tokens on {type(backbone).__name__}; "
            "docs/segmentation.md names those that do"
        )
