"""Reading image files: whatever Pillow decodes becomes upright 8-bit RGB, by one rule for every data set."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from prompttune.errors import MissingExtraError

HEIF_EXTENSIONS = frozenset((".heic", ".heif", ".hif"))
HEIF_INSTALLED = importlib.util.find_spec("pillow_heif") is not None


def _endings(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


EXTENSIONS = _endings(
    "apng avif bmp dib gif j2k jfif jp2 jpe jpeg jpf jpg jpx mpo pbm pgm png pnm ppm tga tif tiff webp"
) | (HEIF_EXTENSIONS if HEIF_INSTALLED else frozenset())
"""Names with these endings are taken for images, in upper or lower case."""
UNREAD_EXTENSIONS = (
    HEIF_EXTENSIONS
    | _endings("ai bpg cdr cur dcm dds dicom djvu emf eps exr fit fits flif hdr heics icns ico jls jxl jxr kra pcx pfm")
    | _endings("psb psd qoi sgi svg svgz wdp wmf xbm xcf xpm")
    | _endings("3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f")
) - EXTENSIONS
"""Names with these endings are pictures that are not read, in upper or lower case."""

SIXTEEN_BIT = 0xFFFF


def is_image(name: str) -> bool:
    """Whether a file name is that of an image: a known extension, not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


def is_unread_image(name: str) -> bool:
    """Whether a file name is that of a picture in a format that is not read, not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in UNREAD_EXTENSIONS


def unread_remedy(name: str) -> str:
    """What to do about a file for which :func:`is_unread_image` holds, such as ``convert it to PNG or JPEG``."""
    if Path(name).suffix.lower() in HEIF_EXTENSIONS:
        return str(MissingExtraError("pillow-heif", "heif"))
    return "convert it to PNG or JPEG"


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
        if formats is None:
            _register_heif()
        with Image.open(file, formats=None if formats is None else tuple(formats)) as image:
            yield image
    except TooManyPixelsError:
        raise
    except UnidentifiedImageError as problem:
        if formats is not None:
            raise OSError(f"not an image, or of another format than {', '.join(formats)}") from problem
        if not HEIF_INSTALLED and _is_heif(file):
            raise OSError(f"a HEIC image: {MissingExtraError('pillow-heif', 'heif')}") from problem
        raise OSError("not an image, or of an unknown format") from problem
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


@functools.cache
def _register_heif() -> None:
    if HEIF_INSTALLED:
        import pillow_heif

        pillow_heif.register_heif_opener()


def _is_heif(file: str | Path | BinaryIO) -> bool:
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(Path(file).open("rb")) if isinstance(file, str | Path) else file
        stream.seek(0)
        header = stream.read(12)
    return header[4:8] == b"ftyp" and header[8:] in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1")


def _reason(problem: Exception) -> str:
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
