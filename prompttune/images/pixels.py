"""Conversion of pixels of any kind to 8-bit RGB, by the same rule for every file and program."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

UNIT_FLOATS = 16
"""Largest value of floating point grey on the scale from 0 to 1: resampling and HDR may slightly exceed 1."""
_SPARED = 1000
"""Share of pixels beyond either end of a stretched scale: one in this many, at least one in an image of 64 or more."""
_SWAPPED_TWICE = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"}
"""Pillow's raw modes of compressed TIFFs in the other byte order, whose samples libtiff has already swapped."""

_PNG_SCALES: Mapping[str, Callable[[Any], Any]] = {
    "L;2": lambda grey: grey * 85,
    "L;4": lambda grey: grey * 17,
    "RGB;16B": lambda colour: tuple(value >> 8 for value in colour),
}
"""PNG's raw modes whose pixels Pillow converts to 8 bits without converting the transparent colour."""


class Grey(NamedTuple):
    """Facts about a file's grey values that Pillow's mode does not tell."""

    white: int | None = None
    """Largest value of an unsigned number; None if the file does not define the range."""
    kind: str | None = None
    """NumPy's type of the stored numbers, if Pillow reads them as another type of that size."""
    inverted: bool = False
    """Whether the smallest value is white and Pillow does not invert the image."""


def grey_of(image: Image.Image) -> Grey:
    """How to read an opened image's grey values, from its bit depth and sample format; call it before turning the
    image.

    An image that was copied or converted does not have these facts; then only its mode counts.
    """
    white = 2**16 - 1 if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM") else None
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return Grey(white)
    bits, form = (
        image.tag_v2.get(tag, (1,))[0] for tag in (TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.SAMPLEFORMAT)
    )
    kind = {(8, 2): "i1", (32, 1): "u4"}.get((bits, form)) if image.mode in ("L", "I") else None
    inverted = image.mode[0] in "IF" and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return Grey(white and 2**bits - 1, kind, inverted)


def mend(image: Image.Image) -> None:
    """Correct an image before decoding where Pillow would misread compressed TIFFs and transparent PNGs."""
    if len(getattr(image, "tile", ())) != 1:  # already decoded, or of another kind
        return
    (tile,) = image.tile  # type: ignore[attr-defined]
    if tile.codec_name == "libtiff" and sys.byteorder == "little" and tile.args[0] in _SWAPPED_TWICE:
        image.tile = [tile._replace(args=(_SWAPPED_TWICE[tile.args[0]], *tile.args[1:]))]  # type: ignore[attr-defined]
    elif isinstance(tile.args, str) and tile.args in _PNG_SCALES and "transparency" in image.info:
        image.info["transparency"] = _PNG_SCALES[tile.args](image.info["transparency"])


def to_rgb(image: Image.Image, grey: Grey | None = None) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB; docs/images.md states the rule.

    Unsigned grey of n bits is scaled from [0, 2^n - 1] to [0, 255]. Signed, 32-bit and floating point grey has no
    agreed range: values from 0 to 255, or floats from 0 to 1, keep their scale. If values lie beyond, the scale is
    widened to the image's smallest and largest value, ignoring one pixel in a thousand. LAB is CIE's with white D50.
    Colour profiles are not applied. Transparent parts are laid over white.

    Args:
        image: image in any mode; an RGB image without transparency is returned unchanged.
        grey: result of :func:`grey_of` if the image was turned after opening; None computes it here.
    """
    grey = grey_of(image) if grey is None else grey
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode[0] in "IF" or grey.kind:
        return _grey_to_8_bit(image, grey).convert("RGB")
    if image.mode == "LAB":
        rgb = ImageCms.applyTransform(image, _lab_to_srgb())
        assert rgb is not None  # None only for an in-place operation
        return rgb
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    # Pillow's own conversion uses a coarse colour table and is off by up to 33 levels
    return ImageCms.buildTransform(*profiles, "LAB", "RGB", flags=ImageCms.Flags.NOOPTIMIZE)


def _grey_to_8_bit(image: Image.Image, about: Grey) -> Image.Image:
    values = np.asarray(image)
    if about.kind:
        values = values.view(about.kind)
    low, high = (0.0, float(about.white)) if about.white else _bounds(values)
    grey = values.astype(np.float64)  # eight bytes per pixel: no further copy is made below
    np.nan_to_num(grey, copy=False, nan=0.0, posinf=high, neginf=low)
    np.clip(grey, low, high, out=grey)
    grey -= low
    grey *= 255.0 / (high - low)
    levels = np.rint(grey, out=grey).astype(np.uint8)
    if about.inverted:
        levels = 255 - levels
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # for a 16-bit PNG
        levels[values == transparent] = 255
    return Image.fromarray(levels)


def _bounds(values: NDArray[np.generic]) -> tuple[float, float]:
    """The ends of the scale for grey values without an agreed range."""
    flat = values[np.isfinite(values)] if values.dtype.kind == "f" else values.ravel()
    if not flat.size:
        return 0.0, 1.0
    spared = max(flat.size // _SPARED, int(flat.size >= 64))
    ordered = np.partition(flat, (spared, flat.size - 1 - spared))
    least, greatest = float(ordered[spared]), float(ordered[-1 - spared])
    white = 1.0 if values.dtype.kind == "f" and greatest <= UNIT_FLOATS else 255.0
    return min(least, 0.0), max(greatest, white)
