"""Rows as Parquet files: what other readers find."""

import json
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompttune.errors import MissingExtraError
from prompttune.serve.infer.rows import COLUMNS, LABELLED_COLUMNS, InputAnswer, Row
from prompttune.serve.infer.sinks import SinkSettings, parquet
from prompttune.serve.infer.sinks.parquet import OTHER, ParquetFolder, arrow_schema
from tests.sink_helpers import answer, contents, full_disk, rows, write

TASKS = ("birds", "digits")
ANSWERS = [answer(number, TASKS if number % 3 else TASKS[:1]) for number in range(11)]
ROWS = [row for one in ANSWERS for row in one.rows]
PARTITIONING = ds.partitioning(pa.schema([("task", pa.string())]), flavor="hive")


def sink(folder, given_rows=ROWS, labelled=False):
    return ParquetFolder(folder, SinkSettings(labelled, rows=lambda: iter(given_rows)))


def read(folder):
    return ds.dataset(folder, partitioning=PARTITIONING).to_table().to_pylist()


@pytest.mark.parametrize("labelled", [False, True])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_every_row_reads_back_exactly(labelled, data):
    given_rows = data.draw(st.lists(rows(labelled), max_size=6))
    with tempfile.TemporaryDirectory() as folder:
        write(sink(Path(folder), given_rows, labelled), [])
        found = [Row.from_dict(one) for one in read(folder)] if given_rows else []
    for task in {row.task for row in given_rows}:
        assert [row for row in found if row.task == task] == [row for row in given_rows if row.task == task]
    assert len(found) == len(given_rows)


def test_files_and_row_groups_have_at_most_so_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_FILE", 3)
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", 2)
    write(sink(tmp_path / "rows"), [])
    counts = {str(file.relative_to(tmp_path)): pq.read_metadata(file).num_rows for file in tmp_path.rglob("*.parquet")}
    assert counts == {
        **{f"rows/task=birds/part-{number}.parquet": rows for number, rows in enumerate((3, 3, 3, 2))},
        **{f"rows/task=digits/part-{number}.parquet": rows for number, rows in enumerate((3, 3, 1))},
    }
    assert set(contents(tmp_path)) == set(counts)
    file = pq.ParquetFile(tmp_path / "rows/task=birds/part-0.parquet")
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [2, 1]


def test_the_same_rows_are_the_same_bytes(tmp_path):
    for name in ("one", "two", "two"):  # the second time in place of the first
        write(sink(tmp_path / name), [])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("reader", ["pandas", "pyarrow", "dataset"])
def test_other_readers_find_each_column_once(tmp_path, reader):
    write(sink(tmp_path), [])
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


@pytest.mark.parametrize("labelled", [False, True])
def test_the_schema_has_the_columns_of_every_output(labelled):
    schema = arrow_schema(labelled)
    assert schema.names == list(LABELLED_COLUMNS if labelled else COLUMNS)
    scores = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
    numbers = {"row": pa.int64(), "frame": pa.int64(), "timestamp": pa.float64(), "probability": pa.float64()}
    types = {**numbers, "target_probability": pa.float64(), "top_k": scores}
    assert {name: schema.field(name).type for name in schema.names} == {
        name: types.get(name, pa.string()) for name in schema.names
    }


def test_a_full_disk_keeps_the_files_of_the_run_before(tmp_path):
    write(sink(tmp_path), [])
    before = contents(tmp_path)
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write(sink(tmp_path), [])
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")} == before
    write(sink(tmp_path), [])
    assert contents(tmp_path) == before


def test_unknown_tasks_of_any_name_cost_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MOST_PARTITIONS", 4)
    names = ["a/b ü", "..", "", "x" * 300, "=%", "one", "two", "three"]
    asked = [Row("1.png", name, None, error="unknown task") for name in names]
    write(sink(tmp_path / "rows", [*asked, *ANSWERS[0].rows]), [])
    found = read(tmp_path)
    expected = {(name, "unknown task") for name in ("a/b ü", "..", "=%", "one")}
    expected |= {(OTHER, f"task {name!r}: unknown task") for name in ("", "x" * 300, "two", "three")}
    assert {(one["task"], one["error"]) for one in found if one["error"]} == expected
    assert [one["source"] for one in found if one["task"] == "birds"] == [row.source for row in ANSWERS[0].rows]
    assert [file.name for file in tmp_path.iterdir()] == ["rows"]


def test_a_file_name_that_is_no_unicode_costs_no_row(tmp_path):
    write(sink(tmp_path, [Row("f\udcff.png", "birds", "v", error="broken")]), [InputAnswer(())])
    assert [one["source"] for one in read(tmp_path)] == ["f\\udcff.png"]
    assert json.dumps(read(tmp_path)[0]["top_k"]) == "[]"


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'prompttune\[tables\]'; or write a \.jsonl or \.csv"):
        sink(tmp_path)
