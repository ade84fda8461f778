"""Decoding of requests: evaluation's own tensors, in threads, and one clear refusal for everything hostile."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from skimage.data import data_dir

from prompttune.images import read_image
from prompttune.images.preprocess import CROP_MODES, INTERPOLATIONS, Preprocess
from prompttune.serve.limits import Limits
from prompttune.serve.messages import BadRequestError, ServeError, TooLargeError
from prompttune.serve.service import images
from prompttune.serve.service.images import Decoder
from prompttune.serve.service.tensors import RowImage

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = Preprocess(32, MEAN, STD)
PHOTOGRAPHS = [Path(data_dir) / name for name in ("astronaut.png", "camera.png", "coffee.png", "rocket.jpg")]
LIMITS = Limits(pixels=1_000_000)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder(2, LIMITS)
    yield made
    made.close()


def prepared(decoder: Decoder, payload: bytes | np.ndarray, preprocess: Preprocess = PLAIN, row: int = 0) -> np.ndarray:
    return asyncio.run(decoder.prepare(preprocess, RowImage(row, payload)))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(width: int = 20, height: int = 14, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file of a few bytes that says it is large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


# ------------------------------------------------------------------ equality


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_equals_the_evaluation_transform(
    decoder: Decoder, photograph: Path, interpolation: str, crop_mode: str
) -> None:
    preprocess = Preprocess(56, MEAN, STD, interpolation, 0.9, crop_mode)
    expected = preprocess.transform()(read_image(photograph)).numpy()
    answer = prepared(decoder, photograph.read_bytes(), preprocess)
    assert answer.dtype == np.float32
    assert answer.tobytes() == expected.tobytes()
    raw = np.asarray(read_image(photograph))
    assert prepared(decoder, raw, preprocess).tobytes() == expected.tobytes()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


SHAPES_OF_FILES = {
    "grey": encoded(picture().convert("L")),
    "bilevel": encoded(picture().convert("1")),
    "palette": encoded(picture().convert("P")),
    "palette with a transparent entry": encoded(picture().convert("P"), transparency=3),
    "transparent": encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 9, 4), dtype=np.uint8))),
    "16 bits": encoded(Image.fromarray(np.random.default_rng(2).integers(0, 65536, (9, 9)).astype(np.uint16))),
    "CMYK": encoded(picture().convert("CMYK"), "JPEG"),
    "progressive": encoded(picture(64, 64), "JPEG", progressive=True),
    "turned by its EXIF entry": _turned(),
    "WebP": encoded(picture(), "WEBP"),
    "WebP without loss": encoded(picture(), "WEBP", lossless=True),
    "WebP animation": encoded(picture(), "WEBP", save_all=True, append_images=[picture(seed=1)], lossless=True),
    "PNG animation": encoded(picture(), save_all=True, append_images=[picture(seed=1)]),
    "one pixel": encoded(picture(1, 1)),
}


@pytest.mark.parametrize("name", SHAPES_OF_FILES)
def test_every_shape_of_file_is_read_as_training_reads_it(decoder: Decoder, name: str) -> None:
    content = SHAPES_OF_FILES[name]
    expected = PLAIN.transform()(read_image(io.BytesIO(content))).numpy()
    assert prepared(decoder, content).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["WebP animation", "PNG animation"])
def test_an_animation_is_its_first_frame(decoder: Decoder, name: str) -> None:
    assert np.array_equal(prepared(decoder, SHAPES_OF_FILES[name]), prepared(decoder, encoded(picture())))


def test_a_turned_image_is_upright(decoder: Decoder) -> None:
    assert not np.array_equal(prepared(decoder, _turned()), prepared(decoder, encoded(picture(), "JPEG")))


def test_a_normalised_image_is_left_alone(decoder: Decoder) -> None:
    image = np.zeros((3, 32, 32), dtype=np.float32)
    assert prepared(decoder, image) is image


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_generated_pictures_equal_the_evaluation_transform(decoder: Decoder, data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    preprocess = Preprocess(
        data.draw(st.sampled_from([8, 30, 48])), MEAN, STD, crop_mode=data.draw(st.sampled_from(["squash", "center"]))
    )
    image = picture(width, height, seed=data.draw(st.integers(0, 9)))
    expected = preprocess.transform()(image).numpy()
    assert prepared(decoder, encoded(image), preprocess).tobytes() == expected.tobytes()
    assert prepared(decoder, np.asarray(image), preprocess).tobytes() == expected.tobytes()


# ------------------------------------------------------------------ refusals


def refusal(decoder: Decoder, payload: bytes | np.ndarray, preprocess: Preprocess = PLAIN) -> ServeError:
    with pytest.raises(ServeError) as caught:
        prepared(decoder, payload, preprocess, row=7)
    message = str(caught.value)
    assert message.startswith("image of row 7")
    assert "\n" not in message
    assert len(message) < 300
    return caught.value


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO", "EPS"])
def test_other_formats_are_refused(decoder: Decoder, form: str) -> None:
    problem = refusal(decoder, encoded(picture(), form))
    assert isinstance(problem, BadRequestError)
    assert "not an image, or of another format than JPEG, PNG, WEBP" in str(problem)


@pytest.mark.parametrize("content", [b"", b"\0", b"not an image", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(decoder: Decoder, content: bytes) -> None:
    assert isinstance(refusal(decoder, content), BadRequestError)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_anywhere_is_read_or_refused(decoder: Decoder, form: str) -> None:
    whole = encoded(picture(40, 40), form)
    refused = 0
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        try:
            assert prepared(decoder, whole[:length]).shape == (3, 32, 32)
        except BadRequestError:
            refused += 1
    assert refused > 30


@given(form=st.sampled_from(["PNG", "JPEG", "WEBP"]), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_file_with_changed_bytes_is_read_or_refused(decoder: Decoder, form: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(picture(), form))
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=6)):
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        assert prepared(decoder, bytes(damaged)).shape == (3, 32, 32)
    except (BadRequestError, TooLargeError) as problem:
        assert "\n" not in str(problem)  # noqa: PT017  # anything else that is raised fails the test


JPEG_BOMB = encoded(picture(8, 8), "JPEG").replace(struct.pack(">HH", 8, 8), struct.pack(">HH", 65500, 65500), 1)
BOMBS = {
    "png": png_bomb(40_000, 40_000),
    "png of the largest sides": png_bomb(2**31 - 1, 2**31 - 1),
    "png of 16 bits": png_bomb(20_000, 20_000, depth=16, colour=0),
    "png that Pillow would warn of": png_bomb(10_000, 10_000),
    "jpeg": JPEG_BOMB,
    "webp": encoded(Image.new("RGB", (1200, 1200)), "WEBP"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # each test starts with pytest's own filters
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(
    decoder: Decoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert isinstance(refusal(decoder, BOMBS[name]), TooLargeError)


def test_one_pixel_over_the_limit(decoder: Decoder) -> None:
    flat = Image.new("RGB", (1000, 1001))
    assert "1000 x 1001 pixels, more than 1000000" in str(refusal(decoder, encoded(flat)))
    assert prepared(decoder, encoded(flat.crop((0, 0, 1000, 1000)))).shape == (3, 32, 32)


def test_a_strip_that_resizing_would_blow_up_is_refused(decoder: Decoder) -> None:
    strip = Preprocess(32, MEAN, STD, crop_mode="center")
    assert isinstance(refusal(decoder, np.zeros((1, 100_000, 3), dtype=np.uint8), strip), TooLargeError)
    assert isinstance(refusal(decoder, encoded(Image.new("L", (1, 50_000))), strip), TooLargeError)


def test_a_strip_that_is_squashed_is_answered(decoder: Decoder) -> None:
    strip = np.zeros((1, 100_000, 3), dtype=np.uint8)
    assert prepared(decoder, strip, Preprocess(32, MEAN, STD)).shape == (3, 32, 32)


def test_sides_that_round_to_nothing_are_refused(decoder: Decoder) -> None:
    border = Preprocess(32, MEAN, STD, crop_mode="border")
    problem = refusal(decoder, np.zeros((1, 200, 3), dtype=np.uint8), border)
    assert isinstance(problem, BadRequestError)
    assert "cannot be resized" in str(problem)


def test_compressed_text_in_a_png_is_bounded(decoder: Decoder) -> None:
    whole = encoded(picture())
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (64 * 2**20)))
    start = whole.index(b"IDAT") - 4
    assert "Decompressed data too large" in str(refusal(decoder, whole[:start] + text + whole[start:]))


# ------------------------------------------------------------------- threads


def test_no_warning_leaves_the_decoder() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decoder = Decoder(1, LIMITS)
        try:
            refusal(decoder, png_bomb(10_000, 10_000))
        finally:
            decoder.close()
    assert [str(one.message) for one in seen] == []


def test_decoding_happens_in_its_own_threads_and_no_more_than_asked_for(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2)
    names: list[str] = []

    def seen(*args: object, **options: object) -> Image.Image:
        names.append(threading.current_thread().name)
        together.wait(timeout=60)  # two at a time, or it breaks
        return picture()

    monkeypatch.setattr(images, "read_image", seen)

    async def all_of_them() -> None:
        await asyncio.gather(*(decoder.prepare(PLAIN, RowImage(row, b"")) for row in range(6)))

    asyncio.run(all_of_them())
    assert len(names) == 6
    assert {name.rpartition("_")[0] for name in names} == {"decode"}
    assert len(set(names)) == 2


def test_a_cancelled_caller_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(1, LIMITS)
    go, begun, count = threading.Event(), threading.Event(), []

    def held(*args: object, **options: object) -> Image.Image:
        count.append(1)
        begun.set()
        assert go.wait(timeout=60)
        return picture()

    monkeypatch.setattr(images, "read_image", held)

    async def story() -> None:
        first = asyncio.create_task(decoder.prepare(PLAIN, RowImage(0, b"")))
        await asyncio.to_thread(begun.wait, 30)
        second = asyncio.create_task(decoder.prepare(PLAIN, RowImage(1, b"")))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go.set()
        await first

    try:
        asyncio.run(story())
    finally:
        go.set()
        decoder.close()
    assert len(count) == 1


def test_operators_of_torch_stay_in_the_decoding_thread() -> None:
    before = torch.get_num_threads()
    seen: dict[str, int] = {}

    def note(name: str) -> None:
        seen[name] = torch.get_num_threads()

    decoder = Decoder(2, LIMITS)
    try:
        decoder._pool.submit(note, "decoding").result(timeout=60)
        later = threading.Thread(target=note, args=("later",))
        later.start()
        later.join()
    finally:
        decoder.close()
    assert seen == {"decoding": 1, "later": before}
    assert torch.get_num_threads() == before


def test_transforms_are_made_once_and_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "TRANSFORMS", 2)
    decoder = Decoder(1, LIMITS)
    try:
        for size in (16, 16, 17, 18, 19):
            prepared(decoder, encoded(picture()), Preprocess(size, MEAN, STD))
        info = decoder._transform.cache_info()
    finally:
        decoder.close()
    assert (info.hits, info.misses, info.currsize) == (1, 4, 2)
