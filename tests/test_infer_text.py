"""Rows as JSON lines and CSV: read back exactly."""

import contextlib
import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompttune.errors import UsageError
from prompttune.serve.answers import Score
from prompttune.serve.infer.rows import COLUMNS, LABELLED_COLUMNS, InputAnswer, Row
from prompttune.serve.infer.running import prepared
from prompttune.serve.infer.sinks import SinkSettings
from prompttune.serve.infer.sinks.text import CsvRows, JsonLines, StandardOutput
from prompttune.serve.infer.sources.labels import Labels
from prompttune.serve.infer.sources.tables import TableSource
from prompttune.spreadsheets import guarded, restored, write_table
from tests.inferring import pictures, settings
from tests.sink_helpers import answer, full_disk, rows, texts, write

SINKS = {"jsonl": JsonLines, "csv": CsvRows}
ANSWERS = [answer(number, ("birds", "digits")) for number in range(12)]


@pytest.fixture(params=SINKS)
def kind(request):
    return SINKS[request.param]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "rows.out"


@pytest.mark.parametrize("labelled", [False, True])
@given(data=st.data())
def test_every_row_reads_back_exactly_from_json_lines(labelled, data):
    given_rows = data.draw(st.lists(rows(labelled), max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.out"
        write(JsonLines(path, SinkSettings(labelled)), [InputAnswer(tuple(given_rows))])
        lines = path.read_text(encoding="utf-8").removesuffix("\n")
        assert [Row.from_dict(json.loads(line)) for line in lines.split("\n") if line] == given_rows


@given(data=st.data())
def test_every_cell_reads_back_exactly_from_csv(data):
    given_rows = data.draw(st.lists(rows(True), max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.out"
        write(CsvRows(path, SinkSettings(labelled=True)), [InputAnswer(tuple(given_rows))])
        with path.open(encoding="utf-8", newline="") as stream:
            found = [{name: restored(cell) for name, cell in cells.items()} for cells in csv.DictReader(stream)]
    for cells, row in zip(found, given_rows, strict=True):
        values = row.to_dict(labelled=True)
        assert json.loads(cells.pop("top_k")) == values.pop("top_k")
        assert cells == {name: "" if value is None else str(value) for name, value in values.items()}


def test_json_has_the_columns_in_order_and_plain_letters(path):
    write(JsonLines(path, SinkSettings(labelled=True)), ANSWERS[:1])
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert list(json.loads(first)) == list(LABELLED_COLUMNS)
    assert "Küste 0" in second


def test_csv_has_a_header_even_without_rows_and_json_in_top_k(path):
    write(CsvRows(path, SinkSettings()), [])
    assert path.read_text() == ",".join(COLUMNS) + "\n"
    write(CsvRows(path, SinkSettings()), [answer(0)])
    with path.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert json.loads(row["top_k"])[1] == {"label": "other", "probability": 1 - 1 / 9}
    assert row["error"] == row["frame"] == ""


def test_a_file_name_that_is_no_unicode_costs_no_row(path):
    bad = Row("f\udcff.png", "birds", "v", error="broken")
    write(JsonLines(path, SinkSettings()), [InputAnswer((bad,))])
    assert Row.from_dict(json.loads(path.read_text())) == bad
    assert path.read_bytes().isascii()
    write(CsvRows(path, SinkSettings()), [InputAnswer((bad,))])
    assert path.read_text().splitlines()[1].startswith("f\\udcff.png,")


def test_a_full_disk_is_the_systems_error(kind, path):
    sink = kind(path, SinkSettings())
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        write(sink, ANSWERS)
    with contextlib.suppress(OSError):
        sink.close()
    sink.close()


def test_readers_see_the_rows_at_each_flush(kind, path):
    sink = kind(path, SinkSettings())
    sink.write(ANSWERS[0])
    sink.flush()
    assert path.read_text().count("Küste 0") == 4
    sink.close()


class Recorded(io.StringIO):
    flushed = ""

    def flush(self):
        self.flushed = self.getvalue()


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_standard_output_is_seen_at_each_flush(form, tmp_path):
    stream = Recorded()
    sink = StandardOutput(stream, SinkSettings(), form)
    sink.write(ANSWERS[0])
    assert stream.flushed == ""
    sink.flush()
    write(SINKS[form](tmp_path / "rows", SinkSettings()), ANSWERS[:1])
    assert stream.flushed == (tmp_path / "rows").read_text()
    sink.write(ANSWERS[1])
    sink.finish()
    assert stream.flushed == stream.getvalue()
    sink.close()
    assert not stream.closed


def test_standard_output_without_rows():
    for form, expected in (("jsonl", ""), ("csv", ",".join(COLUMNS) + "\n")):
        stream = io.StringIO()
        StandardOutput(stream, SinkSettings(), form).finish()
        assert stream.getvalue() == expected


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_terminal_of_few_letters_takes_every_row(form):
    data = io.BytesIO()
    row = Row("日𝛾\udcff.png", "birds", "v", error="Käse")
    sink = StandardOutput(io.TextIOWrapper(data, encoding="ascii", newline=""), SinkSettings(), form)
    sink.write(InputAnswer((row,)))
    sink.finish()
    text = data.getvalue().decode("ascii")
    if form == "jsonl":
        assert Row.from_dict(json.loads(text)) == row
    else:
        assert "K\\xe4se" in text


def test_a_reader_that_has_gone_is_told_to_the_caller():
    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    sink = StandardOutput(Gone(), SinkSettings())
    sink.write(ANSWERS[0])
    with pytest.raises(BrokenPipeError):
        sink.flush()
    sink.close()


# Text that looks like a formula

FORMULAS = (
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1",
    "＋1",
    "－1",
    "＠a",
    " =1",
    "'=1",
    "\ufeff=1",
    "﹦1",
)


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_csv_is_a_formula(text, path):
    row = Row(text, text, text, row=-3, label=text, probability=0.5, top_k=(Score(text, 0.5),), target=text)
    write(CsvRows(path, SinkSettings(labelled=True)), [InputAnswer((row, Row(text, text, None, error=text)))])
    with path.open(encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    for cells, names in ((first, ("source", "task", "task_version", "label", "target")), (second, ("source", "error"))):
        assert {cells[name] for name in names} == {guarded(text)}
    assert guarded(text)[0] == "'"
    assert (first["row"], first["probability"], first["top_k"][0]) == ("-3", "0.5", "[")


def test_text_behind_what_some_spreadsheets_take_for_the_end_of_a_cell():
    assert guarded("a;=1\t@b;c=d") == "a;'=1\t'@b;c=d"
    assert guarded("a=b, -c; d") == "a=b, -c; d"
    assert [guarded(value) for value in (-1, -0.5, None)] == [-1, -0.5, None]


@given(texts() | st.sampled_from(FORMULAS))
def test_the_quote_mark_is_taken_away_again(text):
    assert restored(guarded(text)) == text


def test_every_table_is_guarded(tmp_path):
    write_table(tmp_path / "t.csv", [{"task": "=1", "top1": -0.5}, {"task": "b", "error": "@c"}])
    assert (tmp_path / "t.csv").read_text().splitlines() == ["task,top1,error", "'=1,-0.5,", "b,,'@c"]


def test_labels_and_tables_take_the_quote_mark_away(tmp_path):
    write_table(tmp_path / "l.csv", [{"path": "=1.png", "label": "-1"}])
    assert Labels.parse(str(tmp_path / "l.csv")).of(tmp_path / "=1.png") == "-1"
    (item,) = TableSource(tmp_path / "l.csv", label_column="label").items()
    assert (item.source, item.target) == ("=1.png", "-1")


def test_a_byte_order_mark_for_excel(tmp_path):
    images = pictures(tmp_path / "in", 2)
    outputs = (str(tmp_path / "rows.csv"), "csv:-")
    printed = io.StringIO()
    with prepared(settings(images, outputs=outputs, csv_bom=True), stdin=None, stdout=printed) as ready:
        ready.job.run()
    written = (tmp_path / "rows.csv").read_bytes()
    assert written.startswith(b"\xef\xbb\xbfsource,row,")
    assert printed.getvalue().startswith("\ufeffsource,row,")
    assert len(written.splitlines()) == 3
    with prepared(
        settings(images, outputs=outputs, csv_bom=True, overwrite=True), stdin=None, stdout=io.StringIO()
    ) as ready:
        ready.job.run()  # it is known for one of ours
    with pytest.raises(UsageError, match="--csv-bom is for CSV"):
        settings(images, outputs=("rows.jsonl",), csv_bom=True)
