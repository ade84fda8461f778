"""Images: one rule from a file to pixels, and the transforms of evaluation and of training."""

from prompttune.images.reading import (
    EXTENSIONS,
    ImageLike,
    TooManyPixelsError,
    is_image,
    is_unread_image,
    open_image,
    opened,
    read_image,
    read_oriented,
    turn_upright,
    unread_remedy,
)

__all__ = [
    "EXTENSIONS",
    "ImageLike",
    "TooManyPixelsError",
    "is_image",
    "is_unread_image",
    "open_image",
    "opened",
    "read_image",
    "read_oriented",
    "turn_upright",
    "unread_remedy",
]
