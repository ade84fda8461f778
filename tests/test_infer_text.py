"""Rows as JSON lines and CSV: read back exactly, and byte for byte the same after a crash."""

import csv
import io
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompttune.errors import DataError, UsageError
from prompttune.serve.answers import Score
from prompttune.serve.infer.rows import COLUMNS, LABELLED_COLUMNS, Answer, Row
from prompttune.serve.infer.running import prepared
from prompttune.serve.infer.sinks.appended import AppendedFile
from prompttune.serve.infer.sinks.text import CsvRows, JsonLines, StandardOutput
from prompttune.serve.infer.sources.labels import Labels
from prompttune.serve.infer.sources.tables import TableSource
from prompttune.spreadsheets import guarded, restored, write_table
from tests.inferring import pictures, settings
from tests.sink_helpers import STEPS, answer, full_disk, rows, run, texts

SINKS = {"jsonl": JsonLines, "csv": CsvRows}
ANSWERS = [answer(number, ("birds", "digits")) for number in range(12)]


@pytest.fixture(params=SINKS)
def kind(request):
    return SINKS[request.param]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "rows.out"


def write(sink, given_rows):
    sink.write(Answer(tuple(given_rows)))
    sink.commit()


@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("labelled", [False, True])
@given(data=st.data())
def test_every_row_reads_back_exactly(name, labelled, data):
    given_rows = data.draw(st.lists(rows(labelled), max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        sink = SINKS[name](Path(folder) / "rows.out", labelled, None)
        write(sink, given_rows)
        assert list(sink.rows()) == given_rows


def test_json_has_the_columns_in_order_and_plain_letters(path):
    sink = JsonLines(path, True, None)
    write(sink, answer(0).rows)
    text = path.read_text(encoding="utf-8")
    assert list(json.loads(text)) == list(LABELLED_COLUMNS)
    assert "Küste 0" in text
    assert text.endswith("\n")


def test_csv_has_a_header_even_without_rows_and_json_in_top_k(path):
    sink = CsvRows(path, False, None)
    sink.commit()
    assert path.read_text() == ",".join(COLUMNS) + "\n"
    write(sink, answer(0).rows)
    with path.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert json.loads(row["top_k"])[1] == {"label": "other", "probability": 1 - 1 / 9}
    assert row["error"] == row["frame"] == ""


def test_a_file_name_that_is_no_unicode_costs_no_row(path):
    bad = Row("f\udcff.png", "birds", "v", error="broken")
    sink = JsonLines(path, False, None)
    write(sink, [bad])
    assert list(sink.rows()) == [bad]
    assert path.read_bytes().isascii()
    sink = CsvRows(path, False, None)
    write(sink, [bad])
    assert next(iter(sink.rows())).source == "f\\udcff.png"


@pytest.mark.parametrize("name", SINKS)
@given(steps=STEPS)
def test_crashes_leave_no_trace(name, steps):
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        run(lambda state: SINKS[name](whole, False, state), ANSWERS)
        sink = run(lambda state: SINKS[name](broken, False, state), ANSWERS, steps)
        assert broken.read_bytes() == whole.read_bytes()
        assert len(list(sink.rows())) == 24


def test_what_was_written_after_a_commit_is_cut_off(kind, path):
    sink = kind(path, False, None)
    write(sink, ANSWERS[0].rows)
    state, committed = sink.commit(), path.read_bytes()
    with path.open("ab") as stream:
        stream.write(b'{"source": "hal')
    again = kind(path, False, state)
    assert path.read_bytes() == committed
    assert list(again.rows()) == list(ANSWERS[0].rows)
    assert again.commit() == state


def test_rows_are_those_of_the_last_commit(kind, path):
    sink = kind(path, False, None)
    write(sink, ANSWERS[0].rows)
    sink.write(ANSWERS[1])
    assert list(sink.rows()) == list(ANSWERS[0].rows)
    sink.commit()
    assert len(list(sink.rows())) == 4


@pytest.mark.parametrize("damage", ["gone", "shorter", "edited"])
def test_a_changed_file_is_not_gone_on_with(kind, path, damage):
    sink = kind(path, False, None)
    write(sink, ANSWERS[0].rows)
    state = sink.commit()
    if damage == "gone":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path.write_bytes(b"x" * 2 * state["bytes"])
    with pytest.raises(DataError, match=r"^[^\n]*rows\.out [^\n]*--overwrite$"):
        kind(path, False, state)


def test_a_damaged_state_is_one_line(kind, path):
    with pytest.raises(DataError, match="the record of the interrupted run is damaged"):
        kind(path, False, {"rows": 3})


def test_a_line_that_is_no_row_names_its_number(kind, path):
    sink = kind(path, False, None)
    write(sink, ANSWERS[0].rows)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[-1] = b"x" * (len(lines[-1]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=f"line {len(lines)} "):
        list(sink.rows())


def test_a_full_disk_loses_nothing_that_was_committed(kind, path):
    whole = path.with_name("whole")
    run(lambda state: kind(whole, False, state), ANSWERS)
    sink = kind(path, False, None)
    sink.write(ANSWERS[0])
    state = sink.commit()
    with full_disk(state["bytes"] + 100):
        for one in ANSWERS[1:5]:
            sink.write(one)
        with pytest.raises(OSError, match="File too large"):
            sink.commit()
        assert path.stat().st_size == state["bytes"] + 100
    again = kind(path, False, state)
    for one in ANSWERS[1:]:
        again.write(one)
    again.finish()
    assert path.read_bytes() == whole.read_bytes()


def test_a_commit_that_failed_can_be_tried_again(path):
    file = AppendedFile(path)
    file.append(b"first\n")
    with full_disk(3), pytest.raises(OSError, match="File too large"):
        file.sync()
    file.append(b"second\n")
    assert file.sync() == 13
    assert path.read_bytes() == b"first\nsecond\n"


def test_half_an_input_is_never_committed(kind, path, monkeypatch):
    sink = kind(path, False, None)
    write(sink, ANSWERS[0].rows)
    monkeypatch.setattr(Row, "to_dict", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sink.write(ANSWERS[1])
    with pytest.raises(DataError, match=r"rows\.out was stopped in the middle of an input: run again with --resume"):
        sink.commit()


def test_a_commit_is_on_the_disk_and_says_no_more_than_that(path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    file = AppendedFile(path, buffer=10)
    monkeypatch.setattr(os, "fsync", fsync)
    for line in (b"longer than the buffer\n", b"short\n", b"longer than the buffer\n"):
        file.append(line)
        file.sync()
    assert synced == 3 * [path.stat().st_ino, path.parent.stat().st_ino]
    file.sync()
    assert len(synced) == 6  # nothing new: nothing to do


def test_a_large_run_is_not_held_in_memory(path):
    file = AppendedFile(path, buffer=100)
    for _ in range(30):
        file.append(b"0123456789\n")
    assert path.stat().st_size >= 300
    assert file.size == 330


class Recorded(io.StringIO):
    flushed = ""

    def flush(self):
        self.flushed = self.getvalue()


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_standard_output_is_flushed_at_each_commit(form, tmp_path):
    stream = Recorded()
    sink = StandardOutput(stream, False, form)
    sink.write(ANSWERS[0])
    assert stream.flushed == ""
    assert sink.commit() == {}
    file = SINKS[form](tmp_path / "rows", False, None)
    write(file, ANSWERS[0].rows)
    assert stream.flushed == (tmp_path / "rows").read_text()
    sink.write(ANSWERS[1])
    sink.finish()
    assert stream.flushed == stream.getvalue()
    sink.close()
    assert not stream.closed


def test_standard_output_without_rows():
    for form, expected in (("jsonl", ""), ("csv", ",".join(COLUMNS) + "\n")):
        stream = io.StringIO()
        StandardOutput(stream, False, form).finish()
        assert stream.getvalue() == expected


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_terminal_of_few_letters_takes_every_row(form):
    data = io.BytesIO()
    row = Row("日𝛾\udcff.png", "birds", "v", error="Käse")
    sink = StandardOutput(io.TextIOWrapper(data, encoding="ascii", newline=""), False, form)
    sink.write(Answer((row,)))
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

    sink = StandardOutput(Gone(), False)
    sink.write(ANSWERS[0])
    with pytest.raises(BrokenPipeError):
        sink.commit()
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
    sink = CsvRows(path, True, None)
    write(sink, [row, Row(text, text, None, error=text)])
    with path.open(encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    for cells, names in ((first, ("source", "task", "task_version", "label", "target")), (second, ("source", "error"))):
        assert {cells[name] for name in names} == {guarded(text)}
    assert guarded(text)[0] == "'"
    assert (first["row"], first["probability"], first["top_k"][0]) == ("-3", "0.5", "[")
    assert next(iter(sink.rows())) == row


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
    assert len(list(CsvRows(tmp_path / "rows.csv", False, {"bytes": len(written), "rows": 2}).rows())) == 2
    with prepared(
        settings(images, outputs=outputs, csv_bom=True, overwrite=True), stdin=None, stdout=io.StringIO()
    ) as ready:
        ready.job.run()  # it is known for one of ours
    with pytest.raises(UsageError, match="--csv-bom is for CSV"):
        settings(images, outputs=("rows.jsonl",), csv_bom=True)
