"""What ``--output`` may name, and what is in the way."""

import io
import os
from dataclasses import replace

import pytest
from PIL import Image

from prompttune.errors import UsageError
from prompttune.serve.infer import infer
from prompttune.serve.infer.rows import COLUMNS
from prompttune.serve.infer.settings import row_log_path
from prompttune.serve.infer.sinks import SINKS, Sink, SinkSettings
from prompttune.serve.infer.sinks.opening import check_outputs, open_sinks
from prompttune.serve.infer.sinks.parquet import ParquetFolder
from prompttune.serve.infer.sinks.text import CsvRows, JsonLines, StandardOutput
from prompttune.serve.infer.sinks.video import AnnotatedVideo
from prompttune.task_types import ClassificationConfig
from tests.inferring import picture, pictures, settings
from tests.sink_helpers import answer, contents

KINDS = {
    "-": StandardOutput,
    "rows.jsonl": JsonLines,
    "ROWS.NDJSON": JsonLines,
    "rows.csv": CsvRows,
    "rows/": ParquetFolder,
    "rows.parquet": ParquetFolder,
    "rows.parquet/": ParquetFolder,
    "out.mp4": AnnotatedVideo,
    "out.mov": AnnotatedVideo,
    "out.MKV": AnnotatedVideo,
    "out.webm": AnnotatedVideo,
}
VIDEOS = [f"out.{suffix}" for suffix in ("mp4", "mov", "mkv", "webm")]
FILES = ["rows.jsonl", "rows.csv", "rows.parquet", "rows/", *VIDEOS]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(outputs, *, overwrite=False, resume=False, labelled=False, stdout=None):
    names = [outputs] if isinstance(outputs, str) else outputs
    settings = SinkSettings(labelled, rows=lambda: (row for number in range(4) for row in answer(number).rows))
    check_outputs(names, ClassificationConfig(), overwrite=overwrite, resume=resume)
    files, printed = open_sinks(names, ClassificationConfig(), settings, stdout=stdout or io.StringIO(), resume=resume)
    return files + printed


def written(outputs, inputs=4, tasks=("birds",), **options):
    for sink in opened(outputs, **options):
        for number in range(inputs):
            sink.write(answer(number, tasks, Image.new("RGB", (64, 48), (number, 90, 200))))
        sink.finish()
        sink.close()


@pytest.mark.parametrize("output", KINDS)
def test_the_name_tells_the_kind(output):
    (sink,) = opened(output)
    assert type(sink) is KINDS[output]
    sink.close()


def test_several_outputs_at_once():
    stdout = io.StringIO()
    written(["rows.jsonl", "csv:-", "new/folder/rows.csv"], stdout=stdout)
    assert stdout.getvalue() == open("new/folder/rows.csv").read()  # noqa: PTH123, SIM115
    assert len(open("rows.jsonl").readlines()) == 4  # noqa: PTH123, SIM115


def test_labels_reach_the_rows(here):
    written("rows.csv", labelled=True)
    assert (here / "rows.csv").read_text().splitlines()[0] == ",".join((*COLUMNS, "target", "target_probability"))


@pytest.mark.parametrize("output", ["rows", "rows.txt", "rows.json", "rows.tsv", ".csv"])
def test_an_unknown_kind_lists_those_that_are_known(output):
    with pytest.raises(UsageError) as caught:
        opened(output)
    assert str(caught.value).startswith(f"cannot tell what to write to {output!r}")
    assert all(name in str(caught.value) for name in (".jsonl", ".csv", ".parquet", ".mp4", "csv:-"))
    assert (output[-5:] == ".json") == ("for one object a line write .jsonl" in str(caught.value))


@pytest.mark.parametrize(
    ("outputs", "line"),
    [
        (["-", "csv:-"], "standard output is given twice"),
        (["rows.csv", "new/../rows.csv"], "given twice"),
        (["rows.parquet", "rows.parquet/"], "given twice"),
        (["rows/more.csv", "rows/"], "rows/more.csv is inside the output rows/"),
        (["more.jsonl", "rows.txt"], "cannot tell"),
    ],
)
def test_outputs_in_each_others_way_leave_nothing_behind(here, outputs, line):
    with pytest.raises(UsageError, match=line):
        opened(outputs)
    assert contents(here) == {}


@pytest.mark.parametrize("output", FILES)
def test_what_is_there_is_kept_unless_it_may_be_replaced(here, output):
    written(output, inputs=40, tasks=("birds", "digits"))
    before = contents(here)
    with pytest.raises(UsageError) as caught:
        opened(["first.csv", output])
    assert str(caught.value) == f"{output} exists: choose another output, or give --overwrite or --resume"
    assert contents(here) == before
    written(output, overwrite=True)
    after = contents(here)
    fresh = here / "fresh"
    fresh.mkdir()
    os.chdir(fresh)
    written(output)
    assert contents(fresh) == after


@pytest.mark.parametrize("output", FILES)
def test_what_a_crash_left_can_be_replaced(here, output):
    (sink,) = opened(output)
    for number in range(4):
        sink.write(answer(number, picture=Image.new("RGB", (64, 48))))
    sink.flush()
    written(output, overwrite=True)
    assert not [name for name in contents(here) if name.startswith(".")]


@pytest.mark.parametrize(
    ("output", "foreign", "data"),
    [
        ("rows.csv", "rows.csv", b"path,label\na.png,owl\n"),
        ("rows.jsonl", "rows.jsonl", b'{"path": "a.png"}\n'),
        ("rows.jsonl", "rows.jsonl", b"\xff\xfe\x00"),
        ("rows/", "rows/notes.txt", b"mine"),
        ("rows/", "rows/task=birds/part-0.parquet", b"damaged, or of another program"),
        ("rows/", "rows/task=birds/part-x.parquet", b"PAR1"),
        ("out.mp4", "out.mp4", b"a video of somebody"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_wrote_is_never_replaced(here, output, foreign, data, overwrite):
    file = here / foreign
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        opened(output, overwrite=overwrite)
    if overwrite:
        assert str(caught.value) == (
            f"{foreign} was not written by prompttune, so --overwrite leaves it: choose another output"
        )
    assert contents(here) == {foreign: data}


def test_a_row_log_alone_is_kept_unless_it_may_be_replaced(here):
    """Parquet files come at the end, so a run that was killed has nothing but its row log."""
    job = settings(pictures(here / "in", 6), outputs=("rows/",))
    (here / "rows").mkdir()
    (here / "rows.rowlog").write_text("rows of hours")
    with pytest.raises(UsageError, match=r"^rows\.rowlog exists: choose another output, or give --overwrite or --resu"):
        infer(job)
    assert (here / "rows.rowlog").read_text() == "rows of hours"
    infer(replace(job, overwrite=True))


@pytest.mark.parametrize("given", ["resume", "overwrite"])
def test_parquet_files_that_a_crash_has_cut_are_replaced(here, given):
    written("rows/", inputs=2)
    cut = here / "rows/.unfinished/task=birds/part-0.parquet"
    cut.parent.mkdir(parents=True)
    cut.write_bytes(b"PAR1")
    written("rows/", **{given: True})
    assert list(contents(here)) == ["rows/task=birds/part-0.parquet"]


def test_clearing_a_folder_of_parquet_files_takes_its_own_alone(here):
    written("rows/", tasks=("birds", "digits"))
    for name in ("rows/task=birds/mine.csv", "rows/.unfinished/mine", "rows/task=digits/part-1.parquet"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("")
    ParquetFolder.clear(here / "rows")
    assert list(contents(here)) == ["rows/.unfinished/mine", "rows/task=birds/mine.csv"]
    assert not (here / "rows/task=digits").exists()


def test_neither_is_a_video_that_can_be_played(here):
    import av

    with av.open("out.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width = stream.height = 64
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64)))))
        container.mux(stream.encode(None))
    before = contents(here)
    with pytest.raises(UsageError, match="was not written by prompttune"):
        opened("out.mp4", overwrite=True)
    assert contents(here) == before


def test_files_and_folders_are_not_mixed_up(here):
    (here / "folder.csv").mkdir()
    (here / "file.parquet").write_text("")
    with pytest.raises(UsageError, match=r"^folder\.csv is a folder; known outputs: "):
        opened("folder.csv", overwrite=True)
    with pytest.raises(UsageError, match=r"^file\.parquet is a file, and Parquet files by task need a folder"):
        opened("file.parquet", overwrite=True)
    (here / "empty").mkdir()
    opened("empty/")


def test_a_place_where_nothing_can_be_written_is_one_line(here):
    (here / "file").write_text("")
    with pytest.raises(UsageError, match=r"^cannot write file/rows\.csv: Not a directory|File exists$"):
        opened("file/rows.csv")


@pytest.mark.parametrize("output", ["./", ".", "..", "new/../", "/"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_without_a_name_of_its_own_is_one_line(output, resume):
    with pytest.raises(UsageError, match=r"has no name of its own: name a file or a new folder$"):
        settings("in", outputs=(output,), resume=resume)


def test_a_video_is_not_resumed(here):
    written("rows.jsonl")
    before = contents(here)
    with pytest.raises(UsageError, match=r"out\.mp4 cannot be resumed: a video is made in one run"):
        opened(["rows.jsonl", "out.mp4"], resume=True)
    assert contents(here) == before


def test_checking_touches_nothing(here):
    check_outputs(["new/rows.csv", "more/", "-"], ClassificationConfig())
    assert contents(here) == {}
    assert not list(here.iterdir())
    check_outputs([], ClassificationConfig())


def test_a_failure_closes_what_was_open(monkeypatch):
    closed = []
    monkeypatch.setattr(JsonLines, "close", lambda self: closed.append(self))
    monkeypatch.setattr(CsvRows, "__init__", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match=r"^cannot write rows\.csv: No space left on device$"):
        opened(["rows.jsonl", "rows.csv"])
    assert len(closed) == 1


def test_the_row_log_stands_beside_the_first_file():
    assert str(row_log_path(["-", "out/rows.jsonl", "x.csv"])) == "out/rows.jsonl.rowlog"
    assert str(row_log_path(["out/rows/"])) == "out/rows.rowlog"
    assert row_log_path(["csv:-"]) is None


# A sink of another package


class HtmlTable(Sink):
    content = "HTML table"
    suffixes = (".html",)

    def __init__(self, path, settings):
        self._path = path
        self._rows = []

    def write(self, answer):
        self._rows += [f"<tr><td>{row.source}<td>{row.label}" for row in answer.rows]

    def finish(self):
        self._path.write_text("<table>" + "".join(self._rows))

    @classmethod
    def foreign_file(cls, path):
        return None if path.read_text().startswith("<table>") else path


def test_a_sink_is_one_class_and_one_registration(here, monkeypatch):
    monkeypatch.setattr(SINKS, "_parts", dict(SINKS.items()))
    SINKS.add("html", HtmlTable)
    images = pictures(here / "in", 6)
    infer(settings(images, outputs=("rows.html",)))
    assert (here / "rows.html").read_text().count("<tr>") == 6
    with pytest.raises(UsageError, match=r"rows\.html exists"):
        infer(settings(images, outputs=("rows.html",)))
    picture(9).save(images / "9.png")
    infer(settings(images, outputs=("rows.html",), resume=True))
    assert (here / "rows.html").read_text().count("<tr>") == 7
    with pytest.raises(UsageError, match="the sink 'toy' must be a subclass of Sink, not <built-in function len>"):
        SINKS.add("toy", len)
