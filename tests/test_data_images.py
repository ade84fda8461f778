"""Decoding: every mode becomes RGB, upright, with its range kept."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pillow_heif import register_heif_opener
from skimage.data import astronaut

from prompttune.images import TooManyPixelsError, is_image, is_unread_image, read_image, unread_remedy
from prompttune.images.pixels import to_rgb
from tests.data_helpers import picture


@pytest.mark.parametrize("name", ["a.jpg", "b.JPEG", "c.Png", "d.tif", "e.webp", "f.bmp", "g.GIF"])
def test_image_names(name: str) -> None:
    assert is_image(name)


@pytest.mark.parametrize("name", [".hidden.jpg", "._a.jpg", "notes.txt", "jpg", "a.npy", "a.jpg.bak"])
def test_other_names(name: str) -> None:
    assert not is_image(name)


@pytest.mark.parametrize("name", ["a.CR2", "b.jxl", "c.psd", "d.dcm", "e.svg"])
def test_pictures_that_are_not_read_are_known_by_name(name: str) -> None:
    assert is_unread_image(name)
    assert not is_image(name)
    assert "PNG" in unread_remedy(name)
    assert not is_unread_image(f".{name}")


def test_heic_is_read_as_other_files_are(tmp_path: Path) -> None:
    assert is_image("IMG_1.HEIC")
    register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(astronaut()[:64, :32]).save(tmp_path / "a.heic", exif=exif.tobytes(), quality=-1, chroma=444)
    upright = np.rot90(astronaut()[:64, :32], -1)
    assert np.abs(np.asarray(read_image(tmp_path / "a.heic")).astype(int) - upright).max() <= 2


WITHOUT_HEIF = """
import sys; sys.modules["pillow_heif"] = None
from prompttune.images import is_image, is_unread_image, read_image, unread_remedy
assert is_unread_image("a.HEIC") and not is_image("a.heic")
try: read_image(sys.argv[1])
except OSError as problem: print(problem)
print(unread_remedy("a.heic"))
"""


def test_heic_without_its_library_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    command = [sys.executable, "-c", WITHOUT_HEIF, str(tmp_path / "a.jpg")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    remedy = "pillow-heif is not installed: pip install 'prompttune[heif]'"
    assert lines == [f"a HEIC image: {remedy}", remedy]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_keep_the_picture(mode: str) -> None:
    image = Image.fromarray(astronaut()).resize((32, 32))
    expected = np.asarray(image.convert(mode).convert("RGB"))
    assert np.array_equal(np.asarray(to_rgb(image.convert(mode))), expected)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]
        assert image.mode == "RGB"
    assert np.asarray(to_rgb(Image.fromarray(grey.astype(np.int32))))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_transparent_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png")).tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    palette.info["transparency"] = 0
    assert np.asarray(to_rgb(palette))[0].tolist() == [[255, 255, 255], [1, 1, 1]]


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter counter-clockwise by the camera
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.rot90(np.asarray(image), -1))


def test_damaged_exif_keeps_the_picture(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png", exif=b"Exif\0\0MM" + struct.pack(">HI", 99, 7) + b"\xff" * 9)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(picture(0)))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"not an image", "not an image"),
        (png(picture(0, side=64))[:4000], "truncated"),
        (None, "No such file"),
    ],
)
def test_unreadable_files_give_a_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "some.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(OSError, match=reason) as caught:
        read_image(file)
    assert "some.png" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_damaged_byte_is_read_or_refused(tmp_path: Path) -> None:
    whole = png(picture(0))
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        # anything but an OSError, which the loader takes for a corrupt image, fails the test
        with contextlib.suppress(OSError):
            assert read_image(io.BytesIO(bytes(damaged))).mode == "RGB"


def test_only_the_formats_asked_for_are_read() -> None:
    assert read_image(io.BytesIO(png(picture(0))), formats=("PNG",)).size == (12, 12)
    with pytest.raises(OSError, match="not an image, or of another format than JPEG, WEBP"):
        read_image(io.BytesIO(png(picture(0))), formats=("JPEG", "WEBP"))


def test_pixels_are_counted_before_they_are_decoded() -> None:
    whole = png(picture(0))
    cut = whole[: whole.index(b"IDAT") + 6]  # there is nothing to decode
    with pytest.raises(TooManyPixelsError, match="12 x 12 pixels, more than 143"):
        read_image(io.BytesIO(cut), max_pixels=143)
    with pytest.raises(OSError, match="truncated"):
        read_image(io.BytesIO(cut), max_pixels=144)
    assert read_image(io.BytesIO(png(picture(0))), max_pixels=144).size == (12, 12)


def test_more_pixels_than_pillow_takes_are_an_error_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(TooManyPixelsError, match="exceeds limit"):
        read_image(io.BytesIO(png(picture(0))))
