"""Reading image files: whatever Pillow decodes becomes upright 8-bit RGB, by one rule for every data set."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("avif", "bmp", "dib", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm"),
        *("tga", "tif", "tiff", "webp"),
    )
)
"""Names with these endings are taken for images, in upper or lower case."""

SIXTEEN_BIT = 0xFFFF


def is_image(name: str) -> bool:
    """Whether a file name is that of an image: a known extension, not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


class TooManyPixelsError(OSError):
    """An image is larger than the caller takes, or than Pillow does."""


def read_image(
    file: str | Path | BinaryIO, *, formats: Sequence[str] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Decode an image file, turn it upright after its EXIF orientation and convert it with :func:`to_rgb`.

    Of an animated image this is the first frame.

    Args:
        file: what to read.
        formats: Pillow's names of the formats to read, such as ``JPEG``; None reads all that Pillow knows.
        max_pixels: width times height at most, looked up in the header before any pixel is decoded.

    Raises:
        TooManyPixelsError: it has more pixels.
        OSError: it cannot be read; the message is the reason, without the file's name.
    """
    return read_oriented(file, formats=formats, max_pixels=max_pixels)[0]


def read_oriented(
    file: str | Path | BinaryIO, *, formats: Sequence[str] | None = None, max_pixels: int | None = None
) -> tuple[Image.Image, int]:
    """As :func:`read_image`, and the EXIF orientation that the file had: 1 where it is upright or has none."""
    with opened(file, formats) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise TooManyPixelsError(f"{image.width} x {image.height} pixels, more than {max_pixels}")
        orientation = turn_upright(image)
        upright = to_rgb(image)
    return upright, orientation


@contextlib.contextmanager
def opened(file: str | Path | BinaryIO, formats: Sequence[str] | None = None) -> Iterator[Image.Image]:
    """Open an image file; what its decoder raises before the block ends becomes an :class:`OSError`.

    Raises:
        TooManyPixelsError: it has more pixels than Pillow takes.
        OSError: it cannot be read; the message is the reason, without the file's name.
    """
    try:
        with Image.open(file, formats=None if formats is None else tuple(formats)) as image:
            yield image
    except TooManyPixelsError:
        raise
    except Image.DecompressionBombError as problem:
        raise TooManyPixelsError(_reason(problem)) from problem
    except Exception as problem:  # a damaged file makes Pillow's many decoders raise whatever their code raises
        raise OSError(_reason(problem)) from problem


def turn_upright(image: Image.Image) -> int:
    """Decode an image, turn it after its EXIF orientation and return that: 1 where it is upright or has none."""
    image.load()
    orientation: object = 1
    # damaged metadata hides the orientation, not the picture
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, struct.error):
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        ImageOps.exif_transpose(image, in_place=True)
    return next((known for known in range(2, 9) if known == orientation), 1)


def _reason(problem: Exception) -> str:
    if isinstance(problem, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    text = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return " ".join(text.split()) or type(problem).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    16-bit grey is scaled from [0, 65535] to [0, 255], not clipped; 32-bit and floating point grey has no agreed
    range and is stretched from its least to its greatest value. What is transparent is laid over white.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey_to_8_bit(np.asarray(image), image.mode))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(values: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    grey = values.astype(np.float64)  # eight bytes a pixel: nothing below makes another copy
    low, high = 0.0, float(SIXTEEN_BIT)
    # older versions of Pillow open 16-bit PNG files in mode I
    if mode == "F" or grey.min() < low or grey.max() > high:
        np.nan_to_num(grey, copy=False, posinf=0.0, neginf=0.0)
        low, high = float(grey.min()), float(grey.max())
    span = (high - low) or 1.0
    grey -= low
    grey /= span
    grey *= 255.0
    return np.rint(grey, out=grey).astype(np.uint8)
