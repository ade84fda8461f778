"""What ``--output`` may name, and what is in the way."""

import io
import os

import pytest
from PIL import Image

from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.rows import COLUMNS
from prompttune.serve.infer.sinks.drawing import annotate
from prompttune.serve.infer.sinks.opening import check_outputs, journal_path, open_sinks
from prompttune.serve.infer.sinks.parquet import ParquetParts
from prompttune.serve.infer.sinks.sheet import ContactSheet
from prompttune.serve.infer.sinks.text import CsvRows, JsonLines, StandardOutput
from prompttune.serve.infer.sinks.video import AnnotatedVideo
from tests.sink_helpers import answer, contents

KINDS = {
    "-": StandardOutput,
    "rows.jsonl": JsonLines,
    "ROWS.NDJSON": JsonLines,
    "rows.csv": CsvRows,
    "rows/": ParquetParts,
    "rows.parquet": ParquetParts,
    "rows.parquet/": ParquetParts,
    "out.mp4": AnnotatedVideo,
    "out.mov": AnnotatedVideo,
    "out.MKV": AnnotatedVideo,
    "out.avi": AnnotatedVideo,
    "out.webm": AnnotatedVideo,
    "sheet.png": ContactSheet,
    "sheet.jpg": ContactSheet,
    "sheet.jpeg": ContactSheet,
}
VIDEOS = [f"out.{suffix}" for suffix in ("mp4", "mov", "mkv", "avi", "webm")]
FILES = ["rows.jsonl", "rows.csv", "rows.parquet", "rows/", *VIDEOS, "sheet.png", "sheet.jpg"]
RESUMABLE = ["rows.jsonl", "rows.csv", "rows/", "sheet.png"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(outputs, *, overwrite=False, states=None, labelled=False, stdout=None):
    return open_sinks(
        [outputs] if isinstance(outputs, str) else outputs,
        labelled=labelled,
        overwrite=overwrite,
        states=states,
        stdout=stdout or io.StringIO(),
    )


def written(outputs, inputs=4, tasks=("birds",), **options):
    sinks = opened(outputs, **options)
    for sink in sinks:
        for number in range(inputs):
            sink.write(answer(number, tasks, Image.new("RGB", (64, 48), (number, 90, 200))))
        sink.finish()
    states = [sink.commit() for sink in sinks]
    for sink in sinks:
        sink.close()
    return states


@pytest.mark.parametrize("output", KINDS)
def test_the_name_tells_the_kind(output):
    (sink,) = opened(output)
    assert type(sink) is KINDS[output]
    sink.close()


def test_several_outputs_at_once():
    stdout = io.StringIO()
    written(["rows.jsonl", "csv:-", "new/folder/rows.csv", "sheet.png"], stdout=stdout)
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
    assert all(name in str(caught.value) for name in (".jsonl", ".csv", ".parquet", ".mp4", ".png", "csv:-"))
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
    written(output, inputs=40, tasks=("birds", "digits"))  # more pages and more folders than are there later
    before = contents(here)
    with pytest.raises(UsageError) as caught:
        opened(["first.csv", output])
    assert str(caught.value) == f"{output} exists: choose another output, or give --overwrite or --resume"
    assert contents(here) == before
    written(output, overwrite=True)
    assert contents(here) != before
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
    sink.commit()
    written(output, overwrite=True)
    assert not [name for name in contents(here) if name.startswith(".")]


@pytest.mark.parametrize(
    ("output", "foreign", "data"),
    [
        ("rows.csv", "rows.csv", b"path,label\na.png,owl\n"),
        ("rows.jsonl", "rows.jsonl", b'{"path": "a.png"}\n'),
        ("rows.jsonl", "rows.jsonl", b"\xff\xfe\x00"),
        ("rows/", "rows/notes.txt", b"mine"),
        ("rows/", "rows/task=birds/part-00000.parquet", b"damaged, or of another program"),
        ("rows/", "rows/task=birds/part-0.parquet", b"PAR1"),
        ("out.mp4", "out.mp4", b"a video of somebody"),
        ("sheet.png", "sheet.png", b"a picture of somebody"),
        ("sheet.png", "sheet-002.png", b"a picture of somebody"),
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


def test_neither_is_a_video_or_a_picture_that_can_be_read(here):
    import av

    with av.open("out.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width = stream.height = 64
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64)))))
        container.mux(stream.encode(None))
    annotate(Image.new("RGB", (64, 64)), answer(0).rows).save("sheet.png")
    before = contents(here)
    for output in ("out.mp4", "sheet.png"):
        with pytest.raises(UsageError, match="was not written by prompttune"):
            opened(output, overwrite=True)
    assert contents(here) == before


def test_files_and_folders_are_not_mixed_up(here):
    (here / "folder.csv").mkdir()
    (here / "file.parquet").write_text("")
    with pytest.raises(UsageError, match=r"^folder\.csv is a folder; known outputs: "):
        opened("folder.csv", overwrite=True)
    with pytest.raises(UsageError, match=r"^file\.parquet is a file: Parquet files are written into a folder"):
        opened("file.parquet", overwrite=True)
    (here / "empty").mkdir()
    opened("empty/")


def test_a_place_where_nothing_can_be_written_is_one_line(here):
    (here / "file").write_text("")
    with pytest.raises(UsageError, match=r"^cannot write file/rows\.csv: Not a directory|File exists$"):
        opened("file/rows.csv")


def test_going_on_from_the_states_of_a_commit(here):
    stdout = io.StringIO()
    outputs = [*RESUMABLE, "-"]
    sinks = opened(outputs)
    for sink in sinks:
        for number in range(3):
            sink.write(answer(number, picture=Image.new("RGB", (64, 48))))
    states = [sink.commit() for sink in sinks]
    for sink in sinks:
        sink.write(answer(3))
    sinks = opened(outputs, states=states, stdout=stdout)
    for sink in sinks:
        sink.write(answer(4))
        sink.finish()
    assert len((here / "rows.jsonl").read_text().splitlines()) == 4
    assert len((here / "rows.csv").read_text().splitlines()) == 5
    assert len(list(sinks[2].rows())) == 4
    assert len(stdout.getvalue().splitlines()) == 1


def test_a_run_that_committed_nothing_begins_again_over_what_it_left(here):
    opened("rows.csv")[0].commit()
    (sink,) = opened("rows.csv", states=[])
    assert sink.commit()["rows"] == 0
    (here / "rows.jsonl").write_text("of somebody\n")
    with pytest.raises(UsageError, match="was not written by prompttune"):
        opened("rows.jsonl", states=[])


def test_what_cannot_be_gone_on_with_says_so(here):
    states = written(["rows.jsonl"])
    before = contents(here)
    with pytest.raises(UsageError, match=r"out\.mp4 cannot be resumed: a video is made in one run"):
        opened(["rows.jsonl", "out.mp4"], states=[*states, {}])
    with pytest.raises(UsageError, match="the interrupted run had 1 outputs, not 2"):
        opened(["rows.jsonl", "rows.csv"], states=states)
    with pytest.raises(DataError, match=r"rows\.csv is gone"):
        opened(["rows.jsonl", "rows.csv"], states=[*states, {"bytes": 9, "rows": 1}])
    assert contents(here) == before


def test_checking_touches_nothing(here):
    check_outputs(["new/rows.csv", "more/", "-"])
    assert contents(here) == {}
    assert not list(here.iterdir())
    check_outputs([])


def test_a_failure_closes_what_was_open(monkeypatch):
    closed = []
    monkeypatch.setattr(JsonLines, "close", lambda self: closed.append(self))
    monkeypatch.setattr(CsvRows, "__init__", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match=r"^cannot write rows\.csv: No space left on device$"):
        opened(["rows.jsonl", "rows.csv"])
    assert len(closed) == 1


def test_the_journal_stands_beside_the_first_file():
    assert str(journal_path(["-", "out/rows.jsonl", "x.csv"])) == "out/rows.jsonl.journal.json"
    assert str(journal_path(["out/rows/"])) == "out/rows.journal.json"
    assert journal_path(["csv:-"]) is None
