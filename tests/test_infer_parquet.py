"""Rows as Parquet files: what other readers find, and the same bytes whatever interrupted the writing."""

import builtins
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompttune.errors import DataError, MissingExtraError
from prompttune.serve.infer.rows import COLUMNS, LABELLED_COLUMNS, Answer, Row
from prompttune.serve.infer.sinks import parquet
from prompttune.serve.infer.sinks.parquet import COLUMN_TYPES, OTHER, ParquetParts, arrow_schema
from prompttune.serve.infer.sinks.parquet_folder import clear
from tests.sink_helpers import STEPS, Crash, answer, contents, crash_at, full_disk, rows, run

TASKS = ("birds", "digits")
ANSWERS = [answer(number, TASKS if number % 3 else TASKS[:1]) for number in range(11)]
ROWS = [row for one in ANSWERS for row in one.rows]


def maker(folder, rows_per_file=3):
    def make(state):
        if state is None and folder.exists():
            clear(folder)
        return ParquetParts(folder, False, state, rows_per_file)

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "rows"
    run(maker(folder), ANSWERS)
    return contents(folder)


def write_all(sink, answers):
    for one in answers:
        sink.write(one)


def of_task(all_rows, task):
    return [row for row in all_rows if row.task == task]


def by_task(all_rows):
    return [row for task in dict.fromkeys(row.task for row in all_rows) for row in of_task(all_rows, task)]


@pytest.mark.parametrize("labelled", [False, True])
@settings(max_examples=25)
@given(data=st.data())
def test_every_row_reads_back_exactly(labelled, data):
    given_rows = data.draw(st.lists(rows(labelled), max_size=6))
    with tempfile.TemporaryDirectory() as folder:
        sink = ParquetParts(Path(folder), labelled, None, 2)
        sink.write(Answer(tuple(given_rows)))
        sink.commit()
        assert list(sink.rows()) == by_task(given_rows)
        sink.finish()
        assert list(sink.rows()) == by_task(given_rows)


def test_files_are_as_full_as_can_be(whole, tmp_path):
    run(maker(tmp_path / "rows"), ANSWERS)
    counts = {str(file.relative_to(tmp_path)): pq.read_metadata(file).num_rows for file in tmp_path.rglob("*.parquet")}
    assert counts == {
        **{f"rows/task=birds/part-0000{number}.parquet": rows for number, rows in enumerate((3, 3, 3, 2))},
        **{f"rows/task=digits/part-0000{number}.parquet": rows for number, rows in enumerate((3, 3, 1))},
    }
    assert set(contents(tmp_path)) == set(counts)
    assert len(whole) == len(counts)


def test_row_groups_bound_what_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", 4)
    run(maker(tmp_path, rows_per_file=10), ANSWERS)
    file = pq.ParquetFile(tmp_path / "task=birds" / "part-00000.parquet")
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [4, 4, 2]


@pytest.mark.parametrize("reader", ["pandas", "pyarrow", "dataset"])
def test_other_readers_find_each_column_once(tmp_path, reader):
    run(maker(tmp_path), ANSWERS)
    if reader == "pandas":
        table = pd.read_parquet(tmp_path)
        names, found = list(table.columns), table.astype({"task": str}).to_dict("records")
    else:
        table = pq.read_table(tmp_path) if reader == "pyarrow" else ds.dataset(tmp_path, partitioning="hive").to_table()
        names, found = table.column_names, table.to_pylist()
    assert sorted(names) == sorted(COLUMNS)
    expected = sorted((row.source, row.task, row.label) for row in ROWS if row.label)
    assert sorted((one["source"], one["task"], one["label"]) for one in found if not pd.isna(one["label"])) == expected
    assert list(found[0]["top_k"]) == [score._asdict() for score in ROWS[0].top_k]


def test_readers_of_an_unfinished_folder_see_whole_files_alone(tmp_path):
    sink = ParquetParts(tmp_path, False, None, 3)
    for one in ANSWERS:
        sink.write(one)
    sink.commit()
    assert pq.read_table(tmp_path).num_rows == 9 + 6
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == ["task=birds", "task=digits"]


@pytest.mark.parametrize("labelled", [False, True])
def test_the_schema_is_what_its_documentation_says(labelled):
    schema = arrow_schema(labelled)
    names = [name for name in (LABELLED_COLUMNS if labelled else COLUMNS) if name != "task"]
    assert schema.names == names
    plain = {"double": "float64"}
    for name in names:
        written = COLUMN_TYPES[name]
        if written.startswith("list"):
            assert schema.field(name).type == pa.list_(
                pa.struct([("label", pa.string()), ("probability", pa.float64())])
            )
        else:
            assert plain.get(str(schema.field(name).type), str(schema.field(name).type)) == written


@settings(max_examples=40)
@given(steps=STEPS)
def test_crashes_leave_no_trace(whole, steps):
    with tempfile.TemporaryDirectory() as folder:
        sink = run(maker(Path(folder) / "rows"), ANSWERS, steps)
        assert contents(Path(folder) / "rows") == whole
        assert list(sink.rows()) == by_task(ROWS)


@pytest.mark.parametrize("commits", [(3,), (2, 7), (11,)])
def test_a_crash_at_any_call_leaves_no_trace(whole, tmp_path, commits):
    """Before each call that makes, renames, removes or syncs a file, the last rows and the end of the run included."""
    for number in itertools.count():
        folder = tmp_path / str(number)
        make, state = maker(folder), None
        with crash_at(number) as done:
            sink = make(None)
            for index, one in enumerate(ANSWERS, 1):
                sink.write(one)
                if index in commits:
                    state, written = sink.commit(), index
            sink.finish()
        if len(done) < number:
            break
        if state is None:
            written = 0
        sink = make(state if state is None else json.loads(json.dumps(state)))
        for one in ANSWERS[written:]:
            sink.write(one)
        sink.finish()
        assert contents(folder) == whole, number
    assert number > 20


def test_a_crash_while_going_on_leaves_no_trace(whole, tmp_path):
    for number in range(12):
        folder = tmp_path / str(number)
        sink = ParquetParts(folder, False, None, 3)
        for one in ANSWERS[:2]:
            sink.write(one)
        state = sink.commit()
        for one in ANSWERS[2:]:
            sink.write(one)
        sink.finish()  # the spools are gone: rows come back out of the files that took their place
        with crash_at(number):
            ParquetParts(folder, False, state, 3)
        sink = ParquetParts(folder, False, state, 3)
        assert list(sink.rows()) == by_task([row for one in ANSWERS[:2] for row in one.rows])
        for one in ANSWERS[2:]:
            sink.write(one)
        sink.finish()
        assert contents(folder) == whole, number


def test_a_full_disk_loses_nothing_that_was_committed(whole, tmp_path):
    sink = ParquetParts(tmp_path, False, None, 3)
    for one in ANSWERS[:2]:
        sink.write(one)
    state = sink.commit()
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_all(sink, ANSWERS[2:])
    with pytest.raises(DataError, match="middle of an input: run again with --resume"):
        sink.commit()
    with pytest.raises(DataError, match="middle of an input: run again with --resume"):
        sink.finish()
    sink = ParquetParts(tmp_path, False, state, 3)
    for one in ANSWERS[2:]:
        sink.write(one)
    sink.finish()
    assert contents(tmp_path) == whole


def test_what_is_gone_is_not_gone_on_with(tmp_path):
    sink = ParquetParts(tmp_path, False, None, 3)
    for one in ANSWERS[:5]:
        sink.write(one)
    state = sink.commit()
    (tmp_path / ".spool" / "task=birds" / "00001.jsonl").unlink()
    with pytest.raises(DataError, match=r"00001\.jsonl is gone, .*--overwrite$"):
        ParquetParts(tmp_path, False, state, 3)
    (tmp_path / "task=birds" / "part-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00000\.parquet is gone, .*--overwrite$"):
        ParquetParts(tmp_path, False, state, 3)


def test_a_run_goes_on_with_the_file_size_that_it_began_with(whole, tmp_path):
    state = maker(tmp_path)(None).commit()
    run(lambda _: ParquetParts(tmp_path, False, state), ANSWERS)
    assert contents(tmp_path) == whole


def test_unknown_tasks_of_any_name_cost_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MOST_PARTITIONS", 5)
    names = ["a/b ü", "..", "", "x" * 300, "=%", "one", "two", "three"]
    asked = [Row("1.png", name, None, error="unknown task") for name in names]
    sink = ParquetParts(tmp_path / "rows", False, None, 2)
    sink.write(Answer((*asked, *ANSWERS[0].rows)))
    sink.finish()
    found = {(row.task, row.error) for row in sink.rows() if row.error}
    expected = {(name, "unknown task") for name in ("a/b ü", "..", "=%", "one")}
    expected |= {(OTHER, f"task {name!r}: unknown task") for name in ("", "x" * 300, "two", "three")}
    assert found == expected
    assert [file.name for file in tmp_path.iterdir()] == ["rows"]
    assert of_task(sink.rows(), "birds") == list(ANSWERS[0].rows)
    table = ds.dataset(tmp_path, partitioning=ds.partitioning(pa.schema([("task", pa.string())]), flavor="hive"))
    assert set(table.to_table()["task"].to_pylist()) == {name for name, _ in expected} | {"birds"}


def test_a_file_name_that_is_no_unicode_costs_no_row(tmp_path):
    bad = Row("f\udcff.png", "birds", "v", error="broken")
    sink = ParquetParts(tmp_path, False, None)
    sink.write(Answer((bad,)))
    sink.finish()
    assert list(sink.rows()) == [dataclasses.replace(bad, source="f\\udcff.png")]


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'prompttune\[tables\]'; or write a \.jsonl or \.csv"):
        ParquetParts(tmp_path, False, None)


def test_the_crash_of_these_tests_is_one(tmp_path):
    with crash_at(0):
        (tmp_path / "made").mkdir()
    assert not (tmp_path / "made").exists()
    assert issubclass(Crash, BaseException)
