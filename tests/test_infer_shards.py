"""Images of tar shards: how members become samples, where labels stand, and what damage leaves."""

import io
import json
import pickle
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from prompttune.data.tars import expand_braces, is_shard
from prompttune.errors import UsageError
from prompttune.serve.infer.items import BytesPayload
from prompttune.serve.infer.sources.shards import MemberPayload, ShardSource

MODES = {"s.tar": "w", "s.tar.gz": "w:gz", "s.tgz": "w:gz", "s.tar.bz2": "w:bz2", "s.tar.xz": "w:xz"}
every_compression = pytest.mark.parametrize("name", MODES)


def encoded(shade, side=6):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, side, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def shade_of(item):
    return item.payload.open().getpixel((0, 0))[0]


def write(path, members, **options):
    """A shard of (name, content); a content that is text is the target of a symbolic link, None is a folder."""
    with tarfile.open(path, MODES.get(path.name, "w"), **options) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                header.size = len(content)
            else:
                header.type = tarfile.DIRTYPE if content is None else tarfile.SYMTYPE
                header.linkname = content or ""
            archive.addfile(header, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


@pytest.fixture
def members():
    """Ten samples of an image, its class and JSON; long names, so that headers take several blocks."""
    found = [("train", None)]
    for index in range(10):
        key = f"train/{'x' * 120}{index:02}"
        found += [
            (f"{key}.JPG" if index == 4 else f"{key}.png", encoded(index)),
            (f"{key}.cls", f"{index % 3}\n".encode()),
            (f"{key}.json", json.dumps({"task": ["birds", "cars"][index % 2], "n": index}).encode()),
        ]
    return found


@every_compression
def test_samples(tmp_path, members, name):
    path = write(tmp_path / name, members)
    source = ShardSource(path, "cls", "json:task")
    items = list(source.items())
    assert [item.row for item in items] == list(range(10))
    images = [name for name, _ in members if name.endswith((".png", ".JPG"))]
    assert [item.source for item in items] == [f"{path}/{image}" for image in images]
    assert [item.target for item in items] == [str(index % 3) for index in range(10)]
    assert [item.task for item in items] == ["birds", "cars"] * 5
    assert [item.error for item in items] == [None] * 10
    kind = MemberPayload if name == "s.tar" else BytesPayload
    assert {type(item.payload) for item in items} == {kind}
    assert [shade_of(item) for item in pickle.loads(pickle.dumps(items))] == list(range(10))
    assert list(ShardSource(path, "cls", "json:task").items()) == items
    assert source.counts() == {}
    assert source.total is None


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tar(tmp_path, form):
    path = write(tmp_path / "s.tar", [(f"é/{index}.png", encoded(index)) for index in range(3)], format=form)
    items = list(ShardSource(path).items())
    assert [item.source for item in items] == [f"{path}/é/{index}.png" for index in range(3)]
    assert [shade_of(item) for item in items] == [0, 1, 2]


def test_the_image_of_a_sample(tmp_path):
    path = write(
        tmp_path / "s.tar",
        [
            ("a/1.mask.png", encoded(9)),
            ("a/1.png", encoded(1)),
            ("a/1.jpg", encoded(9)),
            ("b/1.left.png", encoded(2)),
            ("b/1.right.png", encoded(9)),
            ("c.d/1.png", encoded(3)),
        ],
    )
    source = ShardSource(path)
    items = list(source.items())
    assert [item.source.removeprefix(f"{path}/") for item in items] == ["a/1.png", "b/1.left.png", "c.d/1.png"]
    assert [shade_of(item) for item in items] == [1, 2, 3]
    assert source.counts() == {"further_images": 3}


def test_samples_without_an_image_are_errors(tmp_path):
    path = write(
        tmp_path / "s.tar",
        [
            ("README", b"no sample"),
            ("._1.png", b"neither"),
            ("1.cls", b"3"),
            ("1.txt", b"x"),
            ("2.png", "1.png"),
            ("3.png", b"no image"),
            ("4.png", encoded(4)),
        ],
    )
    items = list(ShardSource(path, "cls").items())
    assert [item.error for item in items] == [
        "the sample has no image; its members: cls, txt",
        "the image is a link inside the shard: store it as a file",
        None,
        None,
    ]
    assert (items[0].source, items[0].row, items[0].target) == (f"{path}/1", 0, "3")
    with pytest.raises(OSError, match="not an image"):
        items[2].payload.open()
    assert shade_of(items[3]) == 4


@pytest.mark.parametrize(
    ("key", "targets"),
    [
        ("cls", ["7", None, None]),
        (".TXT", ["a cat", None, None]),
        ("json:n", ["3", "2", None]),
        ("json:s", ["é", None, None]),
        ("json:list", [None, None, None]),
        (None, [None, None, None]),
    ],
)
def test_where_a_label_stands(tmp_path, key, targets):
    members = [
        *(("1.txt", b" a cat\n"), ("1.png", encoded(0)), ("1.cls", b"7\n")),
        ("1.json", json.dumps({"n": 3, "s": "é", "list": [1]}).encode()),
        *(("2.png", encoded(0)), ("2.json", b'{"n": 2.0, "s": null}')),
        *(("3.png", encoded(0)), ("3.json", b"{broken"), ("3.txt", b"\xff")),
    ]
    items = list(ShardSource(write(tmp_path / "s.tar", members), key).items())
    assert [item.target for item in items] == targets
    assert [item.error for item in items] == [None] * 3


def test_a_sample_without_its_task_is_an_error(tmp_path):
    path = write(tmp_path / "s.tar", [("1.png", encoded(0)), ("1.task", b"birds"), ("2.png", encoded(0))])
    assert [(item.task, item.error) for item in ShardSource(path, None, "task").items()] == [
        ("birds", None),
        (None, "no task"),
    ]


def test_keys_and_files_that_cannot_be(tmp_path):
    path = write(tmp_path / "s.tar", [])
    for key in ("", "json:"):
        with pytest.raises(UsageError, match=r"names no member of a sample; give one such as cls, or json:FIELD"):
            ShardSource(path, key)
    with pytest.raises(UsageError, match=r"no shard .*gone\.tar"):
        ShardSource(tmp_path / "gone.tar")
    assert list(ShardSource(path).items()) == []


@every_compression
def test_a_shard_cut_anywhere_loses_nothing_in_silence(tmp_path, members, name):
    whole = write(tmp_path / name, members).read_bytes()
    full = list(ShardSource(tmp_path / name, "cls").items())
    places = [*random.Random(0).sample(range(len(whole) - 1), 40), 0, 1, 511, 512, 1024, len(whole) // 2]
    if name == "s.tar":
        with tarfile.open(tmp_path / name) as archive:
            end = max(member.offset_data + -(-member.size // 512) * 512 for member in archive)
        places = [place for place in places if place < end] + [end, end - 512, end - 1024]
    for place in places:
        (tmp_path / name).write_bytes(whole[:place])
        items = list(ShardSource(tmp_path / name, "cls").items())
        if name != "s.tar" and [item.source for item in items] == [item.source for item in full]:
            continue  # cut behind the mark of the end
        *before, last = items
        assert last.error.startswith("the shard is "), place
        assert "\n" not in last.error
        assert (last.source, last.row) == (str(tmp_path / name), len(before))
        assert [item.source for item in before[:-1]] == [item.source for item in full[: max(len(before) - 1, 0)]]
        assert [item.target for item in before[:-1]] == [item.target for item in full[: max(len(before) - 1, 0)]]


def test_a_member_cut_short_is_an_error(tmp_path):
    noise = np.random.default_rng(0).bytes(5000)
    path = write(tmp_path / "s.tar", [("1.png", encoded(1)), ("2.png", encoded(2)[:-12] + noise)])
    path.write_bytes(path.read_bytes()[:4000])
    first, second, last = ShardSource(path).items()
    assert shade_of(first) == 1
    with pytest.raises(OSError, match=r"^the shard is cut short inside this member$"):
        second.payload.open()
    assert last.error == "the shard is damaged after sample 1: unexpected end of data"
    path.unlink()
    with pytest.raises(OSError, match=r"^cannot read the shard: No such file or directory$"):
        first.payload.open()


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write(tmp_path / "s.tar", [(f"{index}.png", encoded(index)) for index in range(4)])
    with tarfile.open(path) as archive:
        offset = archive.getmember("2.png").offset
    data = bytearray(path.read_bytes())
    data[offset + 10] ^= 0xFF
    path.write_bytes(data)
    items = list(ShardSource(path).items())
    assert [item.error for item in items] == [
        None,
        None,
        "the shard is damaged after sample 1: the header of a member is damaged",
    ]


def test_what_is_no_shard_is_one_error(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"no tar at all" * 100)
    (item,) = ShardSource(tmp_path / "s.tar").items()
    assert item.error.startswith("the shard is not a tar file, or damaged at its beginning: ")
    assert (item.source, item.row) == (str(tmp_path / "s.tar"), 0)


def test_headers_are_not_held(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar", [(f"{index}.png", b"") for index in range(50)])
    held = []
    following = tarfile.TarFile.next

    def counted(archive):
        held.append(len(archive.members))
        return following(archive)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    assert len(list(ShardSource(path).items())) == 50
    assert max(held) <= 1


def test_a_closed_source_ends(tmp_path):
    source = ShardSource(write(tmp_path / "s.tar", [(f"{index}.png", encoded(0)) for index in range(9)]))
    items = source.items()
    next(items)
    source.close()
    assert list(items) == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("s.tar", ["s.tar"]),
        ("s-{008..011}.tar", ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("{train-{0..1},val}.tar", ["train-0.tar", "train-1.tar", "val.tar"]),
        ("x{,y}", ["x", "xy"]),
        ("{a}", ["{a}"]),
        ("{a{1..2}}", ["{a1}", "{a2}"]),
        ("{a,b", ["{a,b"]),
        ("{{a,b}", ["{a", "{b"]),
        ("{a,b{1..2}", ["{a,b1", "{a,b2"]),
        ("{{1..2}..3}", ["{1..3}", "{2..3}"]),
        ("{-1..01}", ["-1", "00", "01"]),
        ("{a,a}", ["a", "a"]),
        ("a}b{1..2}", ["a}b1", "a}b2"]),
        ("{}", ["{}"]),
    ],
)
def test_braces(text, names):
    assert expand_braces(text) == names


@pytest.mark.parametrize("text", ["{0..99999999}", "{0..9999}{0..9999}"])
def test_braces_that_stand_for_too_much(text):
    with pytest.raises(UsageError, match="more than 1000000 names"):
        expand_braces(text)


def test_which_files_are_shards():
    assert [is_shard(name) for name in ("a.tar", "A.TAR.GZ", "b.tgz", "c.zip", "tar")] == [True] * 3 + [False] * 2
