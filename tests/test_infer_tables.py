"""Images of tables: what their rows become, in each format, and what is said about those that are damaged."""

import base64
import io
import json
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from prompttune.errors import DataError, MissingExtraError, UsageError
from prompttune.serve.infer.items import FilePayload
from prompttune.serve.infer.sources import arrow, cells
from prompttune.serve.infer.sources.tables import TableSource

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def encoded(shade):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), shade % 256, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def shade_of(item):
    return item.payload.open().getpixel((0, 0))[0]


def write_stream(table, path, rows):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_file(table, path, rows, compression=None):
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=rows)


FORMATS = {
    "t.parquet": lambda table, path, rows: pq.write_table(table, path, row_group_size=rows),
    "file.arrow": write_file,
    "stream.arrow": write_stream,
    "t.feather": lambda table, path, rows: write_file(table, path, rows, "lz4"),
}
every_format = pytest.mark.parametrize("name", FORMATS)


def write(folder, name, table, rows=7):
    FORMATS[name](table, folder / name, rows)
    return folder / name


def errors(source):
    """What each row says, found before or while its image is opened."""
    said = []
    for item in source.items():
        error = item.error
        if error is None:
            try:
                item.payload.open()
            except OSError as problem:
                error = str(problem)
        said.append(error)
    return said


def test_csv(tmp_path):
    Image.fromarray(np.full((4, 6, 3), 5, np.uint8)).save(tmp_path / "a,1.png")
    text = 'id, image ,task,label\n\n1,"a,1.png",birds, 3 \n2,https://host/b.png,birds,\n3,,birds,x\n4,gone.png,,y\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig")
    source = TableSource(tmp_path / "t.csv", None, "task", "label")
    items = list(source.items())
    assert [item.source for item in items] == ["a,1.png", "https://host/b.png", str(tmp_path / "t.csv"), "gone.png"]
    assert [item.row for item in items] == [0, 1, 2, 3]
    assert [item.task for item in items] == ["birds", "birds", "birds", None]
    assert [item.target for item in items] == ["3", None, "x", "y"]
    urls = "prompttune reads no URLs: download it first"
    assert [item.error for item in items] == [None, urls, "the image cell is empty", "no task"]
    assert shade_of(items[0]) == 5
    assert source.total == 4
    assert list(TableSource(tmp_path / "t.csv", None, "task", "label").items()) == items


def test_rows_of_another_width_are_errors(tmp_path):
    (tmp_path / "t.tsv").write_text("path\tlabel\na.png\nb.png\tx\ty\nc.png\tx\t\nd.png\tx\n")
    items = list(TableSource(tmp_path / "t.tsv", label_column="label").items())
    assert [item.error for item in items] == [
        "line 2 has 1 cells and the header 2; put quotes around a cell with a comma",
        "line 3 has 3 cells and the header 2; put quotes around a cell with a comma",
        None,
        None,
    ]
    assert [item.source for item in items] == ["a.png", "b.png", "c.png", "d.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the table .* is empty; its first line must name the columns"),
        (b'path\na.png\n"b.png\nc.png\n', r"the table .*t\.csv line 3: the quotes do not match"),
        (b"path;label\na.png;x\n", r"the table .*t\.csv has one column, and its columns are separated by semicolons"),
        (b"path\ncaf\xe9.png\n", r"the table .*t\.csv line 2 is not in UTF-8: save it as UTF-8"),
    ],
)
def test_damaged_csv_is_found_before_anything_starts(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        TableSource(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        ("a,b", {}, r"name the column of .*t\.csv that holds the images with --image-column: a, b$"),
        ("path,label", {"image_column": "pth"}, r"unknown column 'pth'; did you mean path\?"),
        ("path,label", {"label_column": "labels"}, r"unknown column 'labels'; did you mean label\?"),
        ("path,task", {"task_column": "x"}, r"unknown column 'x'; known: path, task"),
        ("path,path", {}, r"has 2 columns named 'path'"),
    ],
)
def test_columns_that_cannot_be_found(tmp_path, header, columns, message):
    (tmp_path / "t.csv").write_text(f"{header}\n1,2\n")
    with pytest.raises(UsageError, match=message) as problem:
        TableSource(tmp_path / "t.csv", **columns)
    assert "\n" not in str(problem.value)


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(UsageError, match="no table"):
        TableSource(tmp_path / "t.csv")
    with pytest.raises(UsageError, match=r"unknown kind of table '\.xlsx'; known: \.arrow, \.csv"):
        TableSource(tmp_path / "t.xlsx")


def test_base64_is_named_and_not_repeated(tmp_path):
    text = base64.b64encode(encoded(7) * 9).decode()
    texts = [text, f"data:image/png;base64;{text}"]
    (tmp_path / "t.csv").write_text("\n".join(["image", *texts]))
    write(tmp_path, "t.parquet", pa.table({"image": texts}))
    for name in ("t.csv", "t.parquet"):
        items = list(TableSource(tmp_path / name).items())
        assert [item.source for item in items] == [str(tmp_path / name)] * 2
        assert [item.error[:40] for item in items] == ["the column image holds base64 text: imag"] * 2


@every_format
def test_paths(tmp_path, name):
    (tmp_path / "a.png").write_bytes(encoded(7))
    paths = ["a.png", None, "", "http://host/b.png", str(tmp_path / "a.png")]
    tasks = pa.array(["birds", "birds", "birds", "birds", None]).dictionary_encode()
    labels = [1.0, None, 2.5, 3.0, float("nan")]
    table = pa.table({"file_name": paths, "task": tasks, "label": labels, "heavy": [b"x" * 1000] * 5})
    items = list(TableSource(write(tmp_path, name, table, 2), "file_name", "task", "label").items())
    container = str(tmp_path / name)
    assert [item.source for item in items] == ["a.png", container, container, *paths[3:]]
    assert [item.target for item in items] == ["1", None, "2.5", "3", None]
    assert [item.task for item in items] == ["birds"] * 4 + [None]
    empty, urls = "the image cell is empty", "prompttune reads no URLs: download it first"
    assert [item.error for item in items] == [None, empty, empty, urls, "no task"]
    assert isinstance(items[0].payload, FilePayload)
    assert shade_of(items[0]) == 7


@every_format
def test_encoded_images(tmp_path, name):
    images = [encoded(index) for index in range(40)]
    images[3], images[4], images[5] = None, b"", b"no image"
    table = pa.table({"number": range(40), "picture": images, "task": [index % 3 for index in range(40)]})
    source = TableSource(write(tmp_path, name, table), None, "task")
    items = list(source.items())
    assert source.total == (None if name == "stream.arrow" else 40)
    assert [(item.source, item.row, item.task) for item in items] == [
        (str(tmp_path / name), row, str(row % 3)) for row in range(40)
    ]
    empty = "the image cell is empty"
    assert errors(source)[3:6] == [empty, empty, "not an image, or of an unknown format"]
    good = [item for item in items if item.row not in (3, 4, 5)]
    assert [shade_of(item) for item in good] == [item.row for item in good]
    assert shade_of(pickle.loads(pickle.dumps(good[-1]))) == 39


@every_format
def test_structs_of_hugging_face(tmp_path, name):
    (tmp_path / "b.png").write_bytes(encoded(200))
    images = [
        {"bytes": encoded(100), "path": "gone.png"},
        {"bytes": None, "path": "b.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "https://host/c.png"},
        {"bytes": encoded(101), "path": None},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    described = json.dumps({"info": {"features": {"label": labels}}})
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata={"huggingface": described})
    table = pa.table([pa.array(images, kind), [1, 0, -1, None, 7, 1]], schema=schema)
    source = TableSource(write(tmp_path, name, table, 2), label_column="label")
    items = list(source.items())
    assert [item.target for item in items] == ["dog", "cat", None, None, "7", "dog"]
    assert [item.source for item in items] == [str(tmp_path / name)] * 6
    assert [shade_of(items[row]) for row in (0, 1, 5)] == [100, 200, 101]
    empty = "the image cell is empty"
    assert errors(source)[1:5] == [None, empty, empty, "prompttune reads no URLs: download it first"]


def test_other_types_that_hold_images(tmp_path):
    images = [encoded(1), encoded(2), encoded(1)]
    columns = {
        "large": pa.array(images, pa.large_binary()),
        "view": pa.array(images, pa.binary_view()),
        "indexed": pa.array(images).dictionary_encode(),
        "dot.ted": pa.array(images),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "t.parquet")
    for name in columns:
        assert [shade_of(item) for item in TableSource(tmp_path / "t.parquet", name).items()] == [1, 2, 1]


def test_which_column_holds_the_images(tmp_path):
    def items(**columns):
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        return next(TableSource(tmp_path / "t.parquet").items())

    image = encoded(0)
    assert items(path=["a.png"], thumbnail=[image]).payload.column == "thumbnail"
    assert items(mask=[image], image=[image]).payload.column == "image"
    assert items(image=[3], file=["a.png"]).source == "a.png"
    with pytest.raises(UsageError, match=r"that holds the images with --image-column: mask, photo"):
        items(mask=[image], photo=[image])


def test_columns_of_a_type_that_does_not_fit(tmp_path):
    path = write(tmp_path, "t.parquet", pa.table({"path": ["a"], "n": [1], "l": [[1]]}))
    with pytest.raises(UsageError, match=r"the column 'n' of .* holds neither paths nor images; columns: path, n, l$"):
        TableSource(path, "n")
    with pytest.raises(UsageError, match=r"the column 'l' of .* holds list<.*>, not text or numbers"):
        TableSource(path, None, "l")


@every_format
def test_rows_are_found_in_any_order_and_from_many_threads(tmp_path, name, monkeypatch):
    monkeypatch.setattr(arrow, "PIECE_ROWS", range(2, 4))
    monkeypatch.setattr(arrow, "LIGHT_ROWS", 8)
    table = pa.table({"image": [encoded(index) for index in range(120)], "label": range(120)})
    items = list(TableSource(write(tmp_path, name, table, 50), label_column="label").items())
    assert [item.target for item in items] == [str(index) for index in range(120)]
    shuffled = random.Random(0).sample(items, len(items))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shade_of, items)) == list(range(120))
        assert list(pool.map(shade_of, shuffled)) == [item.row for item in shuffled]


def test_neighbours_share_a_read_and_little_is_kept(tmp_path, monkeypatch):
    read, opened = [], []

    def counting(table, column, group):
        for number, piece in enumerate(arrow.pieces(table, column, group)):
            read.append((column, group, number, len(piece)))
            yield piece

    monkeypatch.setattr(arrow, "PIECE_ROWS", range(8, 17))
    monkeypatch.setattr(cells, "pieces", counting)
    table = pa.table({"image": [encoded(index) for index in range(200)]})
    items = list(TableSource(write(tmp_path, "t.parquet", table, 100)).items())
    assert read == []  # making the items reads no image
    for item in items:
        shade_of(item)
        opened.append(sum(len(kept[2]) for kept in cells._cells(item.payload.table, "image")._kept))
    assert [sum(length for _, group, _, length in read if group == wanted) for wanted in (0, 1)] == [100, 100]
    assert len(read) == len(set(read))  # each once
    assert max(opened) <= cells.KEPT_ROWS + 2 * 16


@every_format
def test_making_items_reads_no_images(tmp_path, name, monkeypatch):
    monkeypatch.setattr(cells, "_cells", None)
    asked = []
    values = arrow._values
    monkeypatch.setattr(arrow, "_values", lambda batch, names: asked.append(list(names)) or values(batch, names))
    table = pa.table({"image": [encoded(0)] * 9, "label": range(9)})
    assert len(list(TableSource(write(tmp_path, name, table), label_column="label").items())) == 9
    assert {name for names in asked for name in names} == {"label"}


@every_format
def test_a_damaged_table_is_one_line(tmp_path, name):
    path = write(tmp_path, name, pa.table({"path": ["a.png"] * 100}))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cannot read the table") as problem:
        list(TableSource(path).items())
    assert "\n" not in str(problem.value)
    assert str(path) in str(problem.value)


def test_images_behind_damage_are_errors_and_those_before_are_not(tmp_path):
    noise = np.random.default_rng(0)
    images = []
    for _ in range(40):
        stream = io.BytesIO()
        Image.fromarray(noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(stream, "PNG")
        images.append(stream.getvalue())
    path = tmp_path / "t.parquet"
    table = pa.table({"image": images})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 64] = b"\xff" * 64
    path.write_bytes(data)
    said = errors(TableSource(path))
    assert [error is None for error in said] == [True] * 10 + [False] * 10 + [True] * 20
    assert all("cannot read the table" in error and "\n" not in error for error in said[10:20])


def test_a_table_that_was_replaced_is_read_anew(tmp_path):
    for shade in (1, 2):
        path = write(tmp_path, "t.parquet", pa.table({"image": [encoded(shade)] * (2 + shade)}))
        assert {shade_of(item) for item in TableSource(path).items()} == {shade}
    item = next(TableSource(path).items())
    path.unlink()
    with pytest.raises(OSError, match=r"cannot read the table .*No such file"):
        item.payload.open()


def test_an_empty_table_has_no_items(tmp_path):
    empty = pa.table({"path": pa.array([], pa.string())})
    for name in FORMATS:
        assert list(TableSource(write(tmp_path, name, empty)).items()) == []


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path, "t.parquet", pa.table({"path": ["a.png"]}))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow is not installed: pip install 'prompttune\[tables\]'; or"):
        TableSource(path)
    (tmp_path / "t.csv").write_text("path\na.png\n")
    assert len(list(TableSource(tmp_path / "t.csv").items())) == 1
