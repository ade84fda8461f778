"""Reading images: everything that Pillow decodes becomes upright 8-bit RGB, by the same rule everywhere."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from prompttune.errors import DataError, MissingExtraError, PrompttuneError, UsageError
from prompttune.images.pixels import grey_of, mend, to_rgb

HEIF_EXTENSIONS = frozenset((".heic", ".heif", ".hif"))
HEIF_INSTALLED = importlib.util.find_spec("pillow_heif") is not None
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1")


def _endings(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


EXTENSIONS = _endings(
    "apng avif bmp dib gif j2k jfif jp2 jpe jpeg jpf jpg jpx mpo pbm pgm png pnm ppm tga tif tiff webp"
) | (HEIF_EXTENSIONS if HEIF_INSTALLED else frozenset())
"""Suffixes of images, in upper or lower case."""
UNREAD_EXTENSIONS = (
    HEIF_EXTENSIONS
    | _endings("ai bpg cdr cur dcm dds dicom djvu emf eps exr fit fits flif hdr heics icns ico jls jxl jxr kra pcx pfm")
    | _endings("psb psd qoi sgi svg svgz wdp wmf xbm xcf xpm")
    | _endings("3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f")
) - EXTENSIONS
"""Suffixes of unsupported pictures, in upper or lower case."""

ORIENTATIONS = range(2, 9)
"""EXIF orientations that are not upright."""


def is_image(name: str) -> bool:
    """Whether a file name is an image's: a known extension, not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


def is_unread_image(name: str) -> bool:
    """Whether a file name is that of an unsupported picture, not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in UNREAD_EXTENSIONS


def unread_remedy(name: str) -> str:
    """Advice for a file for which :func:`is_unread_image` is true, such as ``convert it to PNG or JPEG``."""
    if Path(name).suffix.lower() in HEIF_EXTENSIONS:
        return str(MissingExtraError("pillow-heif", "heif"))
    return "convert it to PNG or JPEG"


class TooManyPixelsError(OSError):
    """The image exceeds the caller's limit of pixels, or Pillow's."""


ImageFile: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image
ImageLike: TypeAlias = ImageFile | NDArray[np.uint8]
"""A path, an encoded image in memory or in an open binary file, a PIL image, or RGB pixels [height, width, 3]."""


def open_image(source: ImageLike) -> Image.Image:
    """Read one image like every command does; this is the package's public ``read_image``.

    Args:
        source: a path, an encoded image (bytes or an open binary file), a PIL image of any mode, or a NumPy array of
            RGB pixels, uint8 [height, width, 3]. A PIL image is not changed.

    Returns:
        The image upright by its EXIF orientation and in 8-bit RGB,
        converted by :func:`~prompttune.images.pixels.to_rgb`.

    Raises:
        DataError: the image cannot be read; one line with the file's name.
        UsageError: the source is of another type, or an array of another type or shape.
    """
    try:
        return read_image(source)
    except OSError as problem:
        name = f"the image {os.fspath(source)}" if isinstance(source, str | os.PathLike) else "an image"
        raise DataError(f"cannot read {name}: {problem}") from None


def read_image(
    source: ImageLike, *, formats: Sequence[str] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Read one image like :func:`open_image`, for callers who name the source themselves.

    An animated image gives its first frame, a PIL image its current frame.

    Args:
        source: image to read.
        formats: formats to read, by Pillow's names, such as ``JPEG``; None for all formats.
        max_pixels: largest number of pixels (width times height), checked in the header before decoding.

    Raises:
        TooManyPixelsError: the image has more pixels.
        OSError: the image cannot be read; the message is the reason, without the file's name.
        UsageError: the source is of an unknown type, or an array of another type or shape.
    """
    return read_oriented(source, formats=formats, max_pixels=max_pixels)[0]


def read_oriented(
    source: ImageLike, *, formats: Sequence[str] | None = None, max_pixels: int | None = None
) -> tuple[Image.Image, int]:
    """Read an image and return the EXIF orientation of the file too: 1 for an upright image or a missing entry."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            shape = list(source.shape)
            raise UsageError(f"an array of pixels must be uint8 [height, width, 3] in RGB, not {source.dtype} {shape}")
        source = Image.fromarray(source)
    with opened(source, formats) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise TooManyPixelsError(f"{image.width} x {image.height} pixels, more than {max_pixels}")
        grey = grey_of(image)
        upright, orientation = turn_upright(image)
        return to_rgb(upright, grey), orientation


@contextlib.contextmanager
def opened(source: ImageFile, formats: Sequence[str] | None = None) -> Iterator[Image.Image]:
    """Open an image that is not an array; its decoder's errors within the block become an :class:`OSError`.

    Raises:
        TooManyPixelsError: the image exceeds Pillow's limit of pixels.
        OSError: the image cannot be read; the message is the reason, without the file's name.
        UsageError: the source is of an unknown type.
    """
    if not isinstance(source, str | os.PathLike | bytes | Image.Image) and not hasattr(source, "read"):
        kind = type(source).__name__
        raise UsageError(f"an image is a path, bytes, a PIL image or a uint8 array, not of the type {kind}")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        if isinstance(file, Image.Image):
            yield file
            return
        if formats is None:
            _register_heif()
        with Image.open(file, formats=None if formats is None else tuple(formats)) as image:
            yield image
    except (TooManyPixelsError, PrompttuneError):
        raise
    except UnidentifiedImageError as problem:
        reason = _reason(problem) if isinstance(file, Image.Image) else _unidentified(file, formats)
        raise OSError(reason) from problem
    except Image.DecompressionBombError as problem:
        raise TooManyPixelsError(_reason(problem)) from problem
    except Exception as problem:  # for a damaged file Pillow's decoders may raise any error
        raise OSError(_reason(problem)) from problem


def turn_upright(image: Image.Image) -> tuple[Image.Image, int]:
    """Decode an image and turn it upright by its EXIF orientation.

    Returns:
        The upright image, the same object if it was upright already; and the orientation of the file, 1 for an upright
        image or a missing entry.
    """
    mend(image)
    # for a TIFF, which Pillow turns while it decodes
    orientation = getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation)
    image.load()
    # damaged metadata hides the orientation, but not the picture
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, struct.error):
        found = image.getexif().get(ExifTags.Base.Orientation)
        if found in ORIENTATIONS:
            orientation, image = found, ImageOps.exif_transpose(image)
    return image, next((known for known in ORIENTATIONS if known == orientation), 1)


@functools.cache
def _register_heif() -> None:
    if HEIF_INSTALLED:
        import pillow_heif

        pillow_heif.register_heif_opener()


def _unidentified(file: str | os.PathLike[str] | BinaryIO, formats: Sequence[str] | None) -> str:
    """Reason why no decoder accepts a file."""
    if formats is not None:
        return f"not an image, or of another format than {', '.join(formats)}"
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(Path(file).open("rb")) if isinstance(file, str | os.PathLike) else file
        stream.seek(0)
        header = stream.read(12)
    if not HEIF_INSTALLED and header[4:8] == b"ftyp" and header[8:] in _HEIF_BRANDS:
        return f"a HEIC image: {MissingExtraError('pillow-heif', 'heif')}"
    if header[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a TIFF image that is damaged, or of a kind that is not read: convert it to 8 or 16 bits, unsigned"
    return "not an image, or of an unknown format"


def _reason(problem: Exception) -> str:
    text = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return " ".join(text.split()) or type(problem).__name__
