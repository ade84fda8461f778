"""Grey of every depth and sample format, LAB and rarer modes: what the numbers of real files become."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage.data import astronaut

from prompttune.images import read_image

GREY = np.tile(np.linspace(0, 255, 64).round(), (48, 1))
"""What each file of this page shows, [48, 64]."""
FORMS = {"u": 1, "i": 2, "f": 3}


def tiff(
    values: np.ndarray, kind: str, *, order: str = "<", white_is_zero: bool = False, packed: bool = False
) -> bytes:
    """A TIFF file of one sample a pixel, of NumPy's type ``kind``; ``u0.5`` is 4 bits, ``u1.5`` 12 bits."""
    bits = int(float(kind[1:]) * 8)
    if bits % 8 and order == "<":
        places = values.astype(np.uint16)[..., None] >> np.arange(bits)[::-1] & 1
        data = np.packbits(places.reshape(len(values), -1), axis=1).tobytes()
    else:
        data = values.astype(f"{order}{kind}").tobytes()
    data = zlib.compress(data) if packed else data
    height, width = values.shape
    tags = [
        *((256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 8 if packed else 1)),
        *((262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data))),
        (339, 3, FORMS[kind[0]]),
    ]
    entries = [
        struct.pack(f"{order}HHII", *entry[:2], 1, entry[2])
        if entry[1] == 4
        else struct.pack(f"{order}HHIHH", *entry[:2], 1, entry[2], 0)
        for entry in tags
    ]
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)


def levels(file: bytes) -> np.ndarray:
    pixels = np.asarray(read_image(file)).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("kind", "white"),
    [
        *(("u1", 255), ("u2", 65535)),
        *(("i1", 127), ("i2", 255), ("i2", 1020), ("i2", 32767), ("i4", 255), ("i4", 1020), ("i4", 65535)),
        *(("i4", 2**31 - 1), ("f4", 1), ("f4", 255), ("f4", 1020)),
    ],
)
def test_grey_tiffs_show_the_same_picture(kind: str, white: int, order: str, packed: bool) -> None:
    found = levels(tiff(GREY / 255 * white, kind, order=order, packed=packed))
    if kind == "i1":
        assert np.array_equal(found, (GREY / 255 * 127).astype(np.int8))
    else:
        assert np.abs(found - GREY).max() <= (1 if white in (1, 255, 65535) else 4)
    if white == 255:
        assert np.array_equal(found, GREY)


@pytest.mark.parametrize(("kind", "white"), [("u0.125", 1), ("u0.25", 3), ("u0.5", 15), ("u1.5", 4095), ("u4", 255)])
def test_few_and_odd_bits_and_unsigned_32(kind: str, white: int) -> None:
    steps = (GREY / 255 * white).round()
    assert np.array_equal(levels(tiff(steps, kind)), np.rint(steps * 255 / white))


def test_large_unsigned_32_bit_values_are_not_negative() -> None:
    found = levels(tiff(GREY / 255 * (2**32 - 1), "u4"))
    assert np.abs(found - GREY).max() <= 4


@pytest.mark.parametrize(("kind", "white"), [("u0.125", 1), ("u0.5", 15), ("u1", 255), ("u2", 65535), ("f4", 1)])
def test_white_is_zero_shows_the_same_picture(kind: str, white: int) -> None:
    stored = (1 - GREY / 255) * white
    found = levels(tiff(stored if kind == "f4" else stored.round(), kind, white_is_zero=True))
    assert np.abs(found - GREY).max() <= 128 / white + 1


def test_a_dark_file_of_16_bits_is_dark() -> None:
    assert levels(tiff(GREY, "u2")).max() == 1
    pgm = b"P5 64 48 4095\n" + GREY.astype(">u2").tobytes()
    assert levels(pgm).max() == round(255 * 255 / 4095)


@pytest.mark.parametrize("side", [8, 28, 64])
@pytest.mark.parametrize(
    ("kind", "outlier"), [("i4", -1), ("i4", -30000), ("i2", 30000), ("f4", np.nan), ("f4", -np.inf)]
)
def test_one_pixel_leaves_the_others_alone(kind: str, outlier: float, side: int) -> None:
    values = np.tile(np.linspace(0, 200, side).round(), (side, 1))
    values[0, 0] = outlier
    found = levels(tiff(values, kind))
    assert np.array_equal(found.ravel()[1:], values.ravel()[1:])


def test_the_scale_of_wide_values_has_no_jump() -> None:
    ends = [np.asarray(levels(tiff(GREY / 255 * white, "i4")))[:, 32].mean() for white in range(245, 300)]
    assert np.abs(np.diff(ends)).max() <= 1


def test_negative_values_that_are_many_keep_their_order() -> None:
    found = levels(tiff(GREY * 16 - 1024, "i2"))[0]
    assert (np.diff(found) > 0).all()
    assert (found[0], found[-1]) == (0, 255)
    assert levels(tiff(GREY / 127.5 - 1, "f4"))[0, [0, 31, 63]].tolist() == [0, 125, 255]


def test_floats_somewhat_above_1_are_not_black() -> None:
    assert levels(tiff(GREY / 255 * 1.1, "f4"))[0, -1] == 255
    assert levels(tiff(np.full((4, 4), np.nan), "f4")).max() == 0


def test_a_kind_of_tiff_that_is_not_read_says_so() -> None:
    for kind, order in (("f8", "<"), ("u4", ">")):
        with pytest.raises(OSError, match=r"TIFF image .* of a kind that is not read: convert it to 8 or 16 bits"):
            read_image(tiff(GREY, kind, order=order))


@pytest.mark.parametrize(
    ("bits", "pixels", "transparent", "expected"),
    [
        (1, b"\x40", 0, [255, 255]),
        (2, b"\x70", 1, [255, 255]),
        (2, b"\x70", 2, [85, 255]),
        (4, b"\x3a", 3, [255, 170]),
        (8, b"\x03\xaa", 3, [255, 170]),
        (16, b"\x03\xe8\x9c\x40", 1000, [255, 156]),
    ],
)
def test_a_transparent_grey_of_any_depth_is_white(
    bits: int, pixels: bytes, transparent: int, expected: list[int]
) -> None:
    assert levels(png(bits, 0, pixels, struct.pack(">H", transparent))).tolist() == [expected]


def test_a_transparent_colour_of_16_bits_is_white() -> None:
    pixels, transparent = (
        struct.pack(">6H", 1000, 2000, 3000, 40000, 20000, 10000),
        struct.pack(">3H", 1000, 2000, 3000),
    )
    assert np.asarray(read_image(png(16, 2, pixels, transparent))).tolist() == [[[255] * 3, [156, 78, 39]]]


def png(bits: int, colour: int, pixels: bytes, transparent: bytes) -> bytes:
    """Two pixels side by side."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)),
        *((b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


# ------------------------------------------------------------------ colours


def test_lab_files_are_cies_with_white_d50() -> None:
    rgb = astronaut()[::4, ::4]
    stream = io.BytesIO()
    Image.fromarray(rgb).convert("LAB").save(stream, "TIFF")
    assert np.abs(np.asarray(read_image(stream.getvalue())).astype(int) - rgb).max() <= 4


def test_every_lab_colour_of_the_screen_is_right_within_a_level() -> None:
    stored = np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3), -1).reshape(1, -1, 3).astype(np.uint8)
    image = Image.frombytes("LAB", stored.shape[1::-1], stored.tobytes())
    lab = np.dstack([stored[..., 0] / 2.55, *(stored[..., place].view(np.int8).astype(float) for place in (1, 2))])
    expected, inside = from_lab_d50(lab)
    found = np.asarray(read_image(image)).astype(int)
    assert inside.sum() > 500
    assert np.abs(found - expected)[inside].max() <= 1


def from_lab_d50(lab: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CIE's formula, adapted from D50 to D65 by Bradford's matrix, in 8 bits; and which colours sRGB can show."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.96422, 1.0, 0.82521)
    to_linear = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.033454],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = xyz @ np.transpose(to_linear)
    bounded = linear.clip(0, 1)
    curved = np.where(bounded <= 0.0031308, 12.92 * bounded, 1.055 * bounded ** (1 / 2.4) - 0.055)
    return np.rint(255 * curved), ((linear > 0) & (linear < 1)).all(-1)


def test_grey_in_lab_stays_grey() -> None:
    grey = np.repeat(np.arange(256)[None, :, None], 3, 2).astype(np.uint8)
    assert np.abs(np.asarray(read_image(Image.fromarray(grey).convert("LAB"))).astype(int) - grey).max() <= 2


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_every_mode_with_alpha_lies_over_white(mode: str) -> None:
    base = Image.new("RGBA", (2, 1), (60, 60, 60, 255))
    base.putpixel((1, 0), (0, 0, 0, 0))
    image = {"La": base.convert("LA").convert("La")}.get(mode) or base.convert(mode)
    assert np.asarray(read_image(image)).tolist() == [[[60] * 3, [255] * 3]]


def test_cmyk_of_a_jpeg_and_of_a_tiff_are_one_picture() -> None:
    rgb = np.full((8, 8, 3), (200, 90, 30), dtype=np.uint8)
    for form, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
        stream = io.BytesIO()
        Image.fromarray(rgb).convert("CMYK").save(stream, form, **options)
        assert np.abs(np.asarray(read_image(stream.getvalue())).astype(int) - rgb).max() <= 2


def test_colour_profiles_are_not_applied() -> None:
    rgb = Image.fromarray(astronaut()[:8, :8])
    stream = io.BytesIO()
    rgb.save(stream, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes())
    assert np.array_equal(np.asarray(read_image(stream.getvalue())), np.asarray(rgb))
