"""The same image gives the same tensor through every door: Python, the server, inference and training."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from pillow_heif import register_heif_opener
from skimage.data import astronaut

import prompttune as pt
from prompttune.data.base import FileSource
from prompttune.errors import DataError, UsageError
from prompttune.explanation.inputs import read_pictures
from prompttune.images.preprocess import Preprocess
from prompttune.serve.infer.items import ArrayPayload, BytesPayload, FilePayload
from prompttune.serve.infer.sources.shards import ShardSource
from prompttune.serve.infer.sources.tables import TableSource
from prompttune.serve.limits import Limits
from prompttune.serve.messages import BadRequestError, InferRequest, InputTensor, bytes_array
from prompttune.serve.service.images import FORMATS, Decoder
from prompttune.serve.service.tensors import RowImage, read_rows
from tests.engines import exported

TRANSFORM = Preprocess(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PHOTO = Image.fromarray(astronaut()[:160, 150:270]).resize((60, 80))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def numbers(kind: str, factor: float = 1.0) -> Image.Image:
    return Image.fromarray((np.asarray(PHOTO.convert("L"), dtype=np.float64) * factor).astype(kind))


def animated(form: str, **options: object) -> bytes:
    return encoded(PHOTO, form, save_all=True, append_images=[PHOTO.rotate(90)], **options)


@functools.cache
def kinds() -> dict[str, bytes]:
    """File name → content."""
    register_heif_opener()
    alpha = PHOTO.copy()
    alpha.putalpha(PHOTO.convert("L"))
    return {
        **{f"exif{number}.jpg": encoded(PHOTO, "JPEG", exif=turned(number)) for number in range(1, 9)},
        "exif6.png": encoded(PHOTO, "PNG", exif=turned(6)),
        "exif8.webp": encoded(PHOTO, "WEBP", exif=turned(8)),
        "exif5.tif": encoded(PHOTO, "TIFF", exif=turned(5)),
        "alpha.png": encoded(alpha, "PNG"),
        "alpha.webp": encoded(alpha, "WEBP"),
        "grey_alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "palette.png": encoded(PHOTO.quantize(40), "PNG"),
        "palette_alpha.png": encoded(PHOTO.quantize(40), "PNG", transparency=bytes(range(0, 240, 6))),
        "palette.gif": encoded(PHOTO, "GIF", transparency=3),
        "bilevel.png": encoded(PHOTO.convert("1"), "PNG"),
        "bilevel.tif": encoded(PHOTO.convert("1"), "TIFF", compression="group4"),
        "grey.png": encoded(PHOTO.convert("L"), "PNG"),
        "grey16.png": encoded(numbers("u2", 257), "PNG"),
        "grey16.tif": encoded(numbers("u2", 200), "TIFF"),
        "grey16.pgm": encoded(numbers("i4", 100), "PPM"),
        "grey32.tif": encoded(numbers("i4"), "TIFF"),
        "float.tif": encoded(numbers("f4", 1 / 255), "TIFF"),
        "cmyk.jpg": encoded(PHOTO.convert("CMYK"), "JPEG"),
        "cmyk.tif": encoded(PHOTO.convert("CMYK"), "TIFF"),
        "lab.tif": encoded(PHOTO.convert("LAB"), "TIFF"),
        "animated.gif": animated("GIF"),
        "animated.webp": animated("WEBP"),
        "animated.apng": animated("PNG"),
        "two.mpo": animated("MPO", exif=turned(6)),
        "still.avif": encoded(PHOTO, "AVIF", exif=turned(6)),
        "still.heic": encoded(PHOTO, "HEIF", exif=turned(6)),
        "still.jp2": encoded(PHOTO, "JPEG2000"),
        "still.bmp": encoded(PHOTO, "BMP"),
    }


def names() -> list[str]:
    return sorted(kinds())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind; a table and a shard with all of them in the order of their names."""
    made = tmp_path_factory.mktemp("kinds")
    for name, content in kinds().items():
        (made / name).write_bytes(content)
    pq.write_table(pa.table({"image": [kinds()[name] for name in names()]}), made / "all.parquet")
    with tarfile.open(made / "all.tar", "w") as archive:
        for place, name in enumerate(names()):
            archive.add(made / name, f"{place}.{name}")
    return made


@pytest.fixture(scope="module")
def engine() -> pt.Engine:
    return pt.Engine(exported("linear"))


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder(1, Limits())
    yield made
    made.close()


def tensor(image: Image.Image) -> bytes:
    assert image.mode == "RGB"
    return TRANSFORM.transform()(image).numpy().tobytes()


@pytest.mark.parametrize("name", names())
def test_python_inference_and_training_read_alike(folder: Path, name: str) -> None:
    path, content, place = folder / name, kinds()[name], names().index(name)
    image = pt.read_image(path)
    loaded = Image.open(path)
    loaded.load()
    sources = TableSource(folder / "all.parquet"), ShardSource(folder / "all.tar")
    cell, member = (list(source.items())[place].payload for source in sources)
    doors = {
        "text": pt.read_image(str(path)),
        "bytes": pt.read_image(content),
        "file": pt.read_image(io.BytesIO(content)),
        "PIL": pt.read_image(Image.open(path)),
        "loaded PIL": pt.read_image(loaded),
        "upright PIL": pt.read_image(image),
        "array": pt.read_image(np.asarray(image)),
        "infer, file": FilePayload(path).open(),
        "infer, bytes": BytesPayload(content).open(),
        "infer, pixels": ArrayPayload(np.asarray(image)).open(),
        "infer, table": cell.open(),
        "infer, shard": member.open(),
        "training": FileSource([path], [0], ["a", "b"], folder).load(0)[0],
        "explain": read_pictures([path], 1, [])[0][0].image,
    }
    expected = tensor(image)
    assert not [door for door, found in doors.items() if tensor(found) != expected]
    assert loaded.size == Image.open(path).size or name == "exif5.tif"  # a caller's image is left as it is


@pytest.mark.parametrize("name", names())
def test_the_server_reads_alike_or_names_what_it_reads(folder: Path, decoder: Decoder, name: str) -> None:
    content, image = kinds()[name], pt.read_image(folder / name)
    sent = [
        InputTensor("image", "BYTES", bytes_array([content])),
        InputTensor("image", "BYTES", bytes_array([base64.b64encode(content)]), text=True),
    ]
    payloads = [read_rows(InferRequest("task", [one]), Limits(), 32).payloads[0] for one in sent]
    for payload in payloads:
        if Image.open(io.BytesIO(content)).format in (*FORMATS, "MPO"):  # a JPEG with further images behind it
            assert asyncio.run(decoder.prepare(TRANSFORM, payload)).tobytes() == tensor(image)
        else:
            with pytest.raises(BadRequestError, match=r"image of row 0 .* JPEG, PNG, WEBP"):
                asyncio.run(decoder.prepare(TRANSFORM, payload))
    pixels = asyncio.run(decoder.prepare(TRANSFORM, RowImage(0, np.asarray(image))))
    assert pixels.tobytes() == tensor(image)


@pytest.mark.parametrize("name", ["exif6.jpg", "exif6.png", "alpha.png", "grey16.png", "palette_alpha.png", "lab.tif"])
def test_an_engine_answers_alike(engine: pt.Engine, folder: Path, name: str) -> None:
    path = folder / name
    rows = [path, str(path), kinds()[name], Image.open(path), np.asarray(pt.read_image(path))]
    tensors = np.stack([engine.preprocess("task0").transform()(pt.read_image(path)).numpy()] * len(rows))
    assert engine.predict(rows, "task0") == engine.predict(tensors, "task0")
    assert engine.predict(rows[-1], "task0") == engine.predict(path, "task0") == engine.predict(rows[2], "task0")
    assert engine.predict(np.stack([rows[-1]] * 2), "task0") == engine.predict([path, path], "task0")


def test_a_converted_or_turned_image_is_turned_once() -> None:
    lazy = Image.open(io.BytesIO(kinds()["exif6.jpg"]))
    expected = tensor(pt.read_image(lazy))
    assert tensor(pt.read_image(lazy.convert("RGB"))) == expected
    for transform in (TRANSFORM, replace(TRANSFORM, crop_mode="border")):
        assert torch.equal(transform.transform()(lazy), transform.transform()(pt.read_image(lazy)))
    assert tensor(pt.read_image(ImageOps.exif_transpose(lazy))) == expected
    assert tensor(pt.read_image(pt.read_image(pt.read_image(lazy)))) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"must be uint8 \[height, width, 3\] in RGB, not uint8 \[3, 8, 8\]"),
        (np.zeros((8, 8, 3), np.float32), r"not float32 \[8, 8, 3\]"),
        (np.zeros((8, 8, 4), np.uint8), r"not uint8 \[8, 8, 4\]"),
        (np.zeros((8, 8), np.uint8), r"not uint8 \[8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"not uint8 \[0, 8, 3\]"),
        (7, "not of the type int"),
        (None, "not of the type NoneType"),
    ],
)
def test_what_is_no_image_is_told_in_one_line(engine: pt.Engine, source: object, message: str) -> None:
    for read in (pt.read_image, lambda one: engine.predict([one], "task0")):
        with pytest.raises(UsageError, match=message) as caught:
            read(source)
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    for name, reason in (("a.png", "not an image, or of an unknown format"), ("gone.png", "No such file")):
        with pytest.raises(DataError, match=rf"cannot read the image .*{name}: {reason}"):
            pt.read_image(tmp_path / name)
    with pytest.raises(DataError, match="cannot read an image: not an image"):
        pt.read_image(b"")


ROOT = Path(__file__).parent.parent


def test_no_recipe_reads_images_in_another_way() -> None:
    recipes = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    recipes += [path for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    texts = {path.name: path.read_text(encoding="utf-8") for path in recipes}
    assert not [name for name, text in texts.items() if "Image.open(" in text or ".convert(" in text]
    assert {name for name, text in texts.items() if "pt.read_image(" in text} >= {"deployment.md", "quickstart.md"}
