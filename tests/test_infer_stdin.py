"""Standard input: lists and JSON lines."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image

from prompttune.errors import DataError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.sources.stdin import JsonReader, ListReader
from tests.videos import PATIENCE_S, Pulled


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return file.getvalue()


def lines(*values: object) -> BinaryIO:
    return io.BytesIO(b"".join(json.dumps(value).encode() + b"\n" for value in values))


@pytest.fixture
def pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as writer:
        yield os.fdopen(reading, "rb"), writer  # the reader may still be waited in


# --- lists


def test_each_line_of_a_list_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(png())
    text = f"\ufeff{tmp_path}/a b.png\r\n\n   \n# a remark\n{tmp_path}/none.png\nhttps://host/a.png\n{tmp_path}/a b.png"
    items = list(ListReader(io.BytesIO(text.encode())).items())
    assert [(item.row, item.source) for item in items] == [
        (0, f"{tmp_path}/a b.png"),
        (4, f"{tmp_path}/none.png"),
        (5, "https://host/a.png"),
        (6, f"{tmp_path}/a b.png"),
    ]
    assert items[0].payload.open().size == (4, 3)
    with pytest.raises(OSError, match="No such file"):
        items[1].payload.open()
    assert items[2].error == "prompttune reads no URLs: download it first"


def test_a_file_name_of_any_bytes_is_found(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.png"
    with open(name, "wb") as file:  # noqa: PTH123  # a name that is no text
        file.write(png())
    (item,) = ListReader(io.BytesIO(name + b"\n")).items()
    assert item.payload.open().size == (4, 3)
    assert item.source == f"{tmp_path}/\\xff.png"


def test_a_list_in_another_encoding_is_an_error_in_each_line() -> None:
    items = list(ListReader(io.BytesIO("a.png\nb.png\n".encode("utf-16-le"))).items())
    assert {item.error for item in items} == {"the line holds a zero byte: write one path per line, in UTF-8"}
    (item,) = ListReader(io.BytesIO(b"c:\\photos\\a.png\n")).items()
    assert "is a path of Windows" in str(item.error)


def test_lines_are_given_as_they_come(pipe: tuple[BinaryIO, BinaryIO]) -> None:
    reader, writer = pipe
    pulled = Pulled(ListReader(reader).items())
    writer.write(b"a.png\n")
    assert pulled.next().source == "a.png"
    writer.write(b"b.png\nc.")
    assert pulled.next().source == "b.png"
    writer.write(b"png\n")
    assert pulled.next().source == "c.png"
    writer.close()
    assert pulled.rest() == []


def test_closing_does_not_wait_for_the_writer(pipe: tuple[BinaryIO, BinaryIO]) -> None:
    reader, writer = pipe
    source = ListReader(reader)
    pulled = Pulled(source.items())
    writer.write(b"a.png\n")
    pulled.next()
    source.close()
    assert pulled.rest() == []


@pytest.mark.slow
def test_a_process_ends_while_standard_input_is_still_open() -> None:
    code = (
        "from prompttune.serve.infer.sources.stdin import ListReader, standard_input\n"
        "source = ListReader(standard_input(), limit=1)\n"
        "print([item.source for item in source.items()])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        process.stdin.write(b"a.png\n")
        process.stdin.flush()
        assert process.wait(PATIENCE_S) == 0
        assert process.stdout.read() == b"['a.png']\n"
        assert process.stderr.read() == b""


def test_a_broken_stream_is_one_clear_line() -> None:
    class Broken(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    for stream in (Broken(), closed()):
        with pytest.raises(DataError, match=r"^cannot read standard input: [^\n]+$"):
            Pulled(ListReader(stream).items()).next()


def closed() -> BinaryIO:
    stream = io.BytesIO(b"a.png\n")
    stream.close()
    return stream


# --- JSON lines


def test_json_lines_name_or_hold_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    coded = base64.b64encode(png("blue")).decode()
    stream = lines(
        {"path": f"{tmp_path}/a.png", "task": "one", "label": "seven"},
        {"image": coded, "id": 5, "label": 3},
        {"image": f"data:image/png;base64,{coded}", "other": [1]},
        {"path": f"{tmp_path}/a.png", "id": "x", "task": None, "label": None},
    )
    items = list(JsonReader(stream, label_key="label").items())
    assert [(item.source, item.row, item.task, item.target, item.error) for item in items] == [
        (f"{tmp_path}/a.png", 0, "one", "seven", None),
        ("5", 1, None, "3", None),
        ("-", 2, None, None, None),
        ("x", 3, None, None, None),
    ]
    colours = [item.payload.open().getpixel((0, 0)) for item in items]
    assert colours == [(255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0)]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"nonsense", "not JSON: Expecting value"),
        (b"\xff\xfe", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON: "),
        (b"[1]", "not a JSON object"),
        (b"{}", "needs either path or image"),
        (b'{"path": "a", "image": "b"}', "needs either path or image"),
        (b'{"path": 1}', "path is not a text"),
        (b'{"path": "s3://a/b.png"}', "prompttune reads no URLs"),
        (b'{"image": 1}', "image is not base64 text"),
        (b'{"image": "\xc3\xa4"}', "image is not base64"),
        (b'{"image": "a"}', "image is not base64"),
        (b'{"path": "a", "id": true}', "id is neither a text nor a number"),
        (b'{"path": "a", "task": {}}', "task is neither a text nor a number"),
        (b'{"path": "a", "label": ["b"]}', "label is neither a text nor a number"),
        (b'{"path": "' + b"a" * 200_000 + b'"}', "a line of more than 150000 bytes"),
    ],
)
def test_a_bad_line_is_an_item_and_not_the_end(line: bytes, error: str) -> None:
    stream = io.BytesIO(b'{"path": "a.png"}\n' + line + b'\n{"path": "b.png"}\n')
    first, bad, last = JsonReader(stream, label_key="label", longest=150_000).items()
    assert (first.source, first.row, last.source, last.row) == ("a.png", 0, "b.png", 2)
    assert bad.row == 1
    assert bad.payload is None
    assert bad.error.startswith(error)


def test_what_a_bad_line_tells_is_kept() -> None:
    (item,) = JsonReader(lines({"id": "x", "task": "one", "label": "b", "image": "?"}), label_key="label").items()
    assert item == Item("x", row=0, task="one", target="b", error="image is not base64")


def test_texts_can_be_written_whatever_json_spells() -> None:
    (item,) = JsonReader(io.BytesIO(rb'{"path": "\ud800.png", "task": "\udfff"}')).items()
    assert (item.source, item.task) == ("\\ud800.png", "\\udfff")
