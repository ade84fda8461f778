"""Jobs of inference: one row for each input and task, in order, whatever the inputs are like."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import subprocess
import threading

import numpy as np
import pytest
from click.testing import CliRunner

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import DataError, UsageError
from prompttune.export.runtimes.onnxruntime import OnnxRuntime
from prompttune.serve.infer import decoding
from prompttune.serve.infer.items import FilePayload, Item
from prompttune.serve.infer.local import run_locally
from prompttune.serve.infer.rows import COLUMNS, LABELLED_COLUMNS
from prompttune.serve.infer.settings import Decoding, Shard
from prompttune.serve.infer.work import Work, facts_of
from tests.engines import exported
from tests.inferring import command, encoded, picture, pictures, rows_of, run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven images in nested folders, the fourth in order corrupt; and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(11):
        below = folder / ("a" if index < 6 else "b/c")
        below.mkdir(parents=True, exist_ok=True)
        path = below / f"{index:02}.{'jpg' if index % 2 else 'PNG'}"
        picture(index).save(path)
        if index == 3:
            path.write_bytes(path.read_bytes()[:200])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def engine():
    return pt.Engine(exported("linear"))


def invoke(*arguments):
    return CliRunner().invoke(cli, ["infer", str(exported("linear")), *map(str, arguments)])


@pytest.mark.parametrize(
    ("kind", "batch_size"),
    [*(("threads", size) for size in (1, 3, 64)), pytest.param("processes", 3, marks=pytest.mark.slow)],
)
def test_rows_come_in_order_and_errors_are_rows(engine, photos, tmp_path, batch_size, kind):
    summary, rows = run(
        photos, output=tmp_path / "rows.jsonl", tasks=("task1", "task0"), batch_size=batch_size,
        decoding=Decoding(2, kind),
    )  # fmt: skip
    names = [f"{index:02}" for index in range(11)]
    assert [(row.source.rsplit("/", 1)[1][:2], row.task) for row in rows] == [
        (name, task) for name in names for task in ("task1", "task0")
    ]
    assert (summary.inputs, summary.rows, summary.errors, summary.finished) == (11, 22, 1, True)
    assert [index for index, row in enumerate(rows) if row.error] == [6, 7]
    for row in rows:
        assert row.task_version == engine.version(row.task)
        if row.error is None:
            alone = engine.predict([row.source], row.task)[0]
            assert row.label == alone.label
            assert row.probability == pytest.approx(alone.probability, abs=1e-5)
            assert [score.label for score in row.top_k] == [score.label for score in alone.top_k]


def test_an_image_is_decoded_once_for_all_tasks(photos, tmp_path, monkeypatch):
    read, count = decoding.read_image, []
    monkeypatch.setattr(decoding, "read_image", lambda file: count.append(file.name) or read(file))
    summary, rows = run(photos / "a", output=tmp_path / "rows.jsonl", tasks=("task0", "task1"))
    assert (summary.inputs, len(rows)) == (6, 12)
    assert len(count) == len(set(count)) == 6


def test_more_tasks_than_rows_of_a_call(photos, tmp_path):
    _, rows = run(photos / "a", output=tmp_path / "one.jsonl", tasks=("task0", "task1"), batch_size=1)
    _, more = run(photos / "a", output=tmp_path / "two.jsonl", tasks=("task0", "task1"), batch_size=8)
    assert [(row.source, row.task, row.label) for row in rows] == [(row.source, row.task, row.label) for row in more]


def test_all_tasks_share_one_pass_over_an_image(photos, tmp_path, monkeypatch):
    shapes, runtime_run = [], OnnxRuntime.run

    def seen(self, inputs, bank):
        shapes.append((inputs["image"].shape[0], inputs["task_index"].shape))
        return runtime_run(self, inputs, bank)

    monkeypatch.setattr(OnnxRuntime, "run", seen)
    readable = 5  # of six
    _, rows = run(photos / "a", output=tmp_path / "all.jsonl", tasks=("all",), batch_size=8)
    assert shapes == [(readable, (readable, 2))]
    assert [row.task for row in rows[:2]] == ["task0", "task1"]
    for task in ("task0", "task1"):
        _, alone = run(photos / "a", output=tmp_path / f"{task}.jsonl", tasks=(task,), batch_size=8)
        mixed = [row for row in rows if row.task == task]
        for one, other in zip(mixed, alone, strict=True):
            assert (one.source, one.label, one.error) == (other.source, other.label, other.error)
            assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_decoding_does_not_run_away(engine, photos, monkeypatch):
    """Whoever takes no answers stops the decoders a few chunks ahead, not at the end of the inputs."""
    read, count, many = decoding.read_image, [], threading.Event()

    def counted(path):
        count.append(path)
        if len(count) > 40:
            many.set()
        return read(path)

    monkeypatch.setattr(decoding, "read_image", counted)
    work = Work(exported("linear"), ("task0",), facts_of(engine.folder), engine.image_size, batch_size=4)
    chunk = [Item("x", FilePayload(photos / "a" / "00.PNG"))] * 4
    answers = run_locally(iter([chunk] * 1000), engine, work, Decoding(2))
    next(answers)
    assert not many.wait(1.0)
    answers.close()


def test_a_task_for_each_row(tmp_path):
    pictures(tmp_path / "images", 4)
    table = tmp_path / "table.csv"
    lines = ["path,task", "images/0000.png,task1", "images/0001.png,task0", "images/0002.png,tusk", "images/0003.png,"]
    table.write_text("\n".join(lines) + "\n")
    _, rows = run(table, output=tmp_path / "rows.jsonl", tasks=(), task_column="task")
    assert [(row.task, row.row) for row in rows] == [("task1", 0), ("task0", 1), ("tusk", 2), ("", 3)]
    assert [row.error for row in rows] == [None, None, "the engine has no task 'tusk'", "no task"]
    assert [len(row.top_k) for row in rows] == [3, 2, 0, 0]


@pytest.mark.parametrize("count", [2, 3])
def test_shards_are_the_whole(photos, tmp_path, count):
    _, whole = run(photos, output=tmp_path / "whole.jsonl", batch_size=2)
    parts = [
        run(photos, output=tmp_path / f"{index}.jsonl", batch_size=2, shard=Shard(index, count))[1]
        for index in range(count)
    ]
    assert sorted(row.source for part in parts for row in part) == [row.source for row in whole]
    assert {row.source: row for part in parts for row in part} == {row.source: row for row in whole}


def test_labels_are_evaluated(engine, tmp_path):
    """Accuracy of a job is what its rows say."""
    for index in range(12):
        folder = tmp_path / "images" / engine.labels("task1")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(index).save(folder / f"{index}.png")
    (tmp_path / "images" / "unheard").mkdir()
    picture(1).save(tmp_path / "images" / "unheard" / "x.png")
    output = tmp_path / "rows.jsonl"
    summary, rows = run(tmp_path / "images", output=output, tasks=("task1",), labels="folder", top_k=2)
    assert [list(json.loads(line)) for line in output.read_text().splitlines()] == [list(LABELLED_COLUMNS)] * 13
    scored = [row for row in rows if row.target != "unheard"]
    assert len(scored) == 12
    found = summary.evaluation["task1"]
    assert (found.evaluation.n, found.unknown) == (13, 1)
    assert found.evaluation.top1 == np.mean([row.label == row.target for row in rows])
    assert found.evaluation.loss == pytest.approx(np.mean([-np.log(row.target_probability) for row in scored]))
    report = invoke(tmp_path / "images", "--task", "task1", "--labels", "folder", "--report", tmp_path / "report")
    assert report.exit_code == 0, report.stderr
    assert f"{found.evaluation.top1:.2%}" in report.stderr
    assert "1 true labels are not among its classes, such as unheard; they are counted as wrong" in report.stderr
    figures = json.loads((tmp_path / "report" / "evaluation.json").read_text())["tasks"]["task1"]
    assert figures["top1"] == found.evaluation.top1
    assert (tmp_path / "report" / "confusion-task1.png").stat().st_size > 1000


@pytest.mark.slow
def test_standard_input_as_json_lines(tmp_path):
    import base64

    objects = [
        {"id": "a", "image": base64.b64encode(encoded(1)).decode(), "task": "task1"},
        {"id": "b", "image": "no"},
        {"path": str(tmp_path / "none.png")},
    ]
    text = "\n".join(map(json.dumps, objects)) + "\nnonsense\n"
    arguments = command("-", "--stdin", "jsonl", "--task", "task0")
    done = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["source"], row["task"], row["error"] is None) for row in rows] == [
        ("a", "task1", True),
        ("b", "task0", False),
        (str(tmp_path / "none.png"), "task0", False),
        ("-", "task0", False),
    ]


# ---------------------------------------------------------------- command line


def test_command_writes_json_lines(photos, tmp_path):
    output = tmp_path / "out" / "rows.jsonl"
    result = invoke(photos, "--task", "task1", "-o", output, "--top-k", 2, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 11
    assert all(list(row) == list(COLUMNS) for row in rows)
    assert [row["error"] is not None for row in rows] == [index == 3 for index in range(11)]
    assert (rows[3]["label"], rows[3]["top_k"]) == (None, [])
    assert len(rows[0]["top_k"]) == 2
    assert rows[0]["top_k"][0] == {"label": rows[0]["label"], "probability": rows[0]["probability"]}
    assert result.stdout == ""
    assert "11 images, 1 task, 1 could not be read" in result.stderr
    again = invoke(photos, "--task", "task1", "-o", output)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert invoke(photos / "a", "--task", "task1", "-o", output, "--overwrite").exit_code == 0
    assert len(output.read_text().splitlines()) == 6


def test_command_to_standard_output(photos):
    result = invoke(photos / "a", "--task", "task0", "--task", "task1", "--json")
    assert result.exit_code == 0
    assert [json.loads(line)["task"] for line in result.stdout.splitlines()] == ["task0", "task1"] * 6
    assert json.loads(result.stderr)["rows"] == 12
    table = invoke(photos / "a", "--task", "task0", "-o", "csv:-")
    assert [row["task"] for row in csv.DictReader(io.StringIO(table.stdout))] == ["task0"] * 6


def test_several_outputs_hold_the_same(photos, tmp_path):
    result = invoke(
        photos, "--task", "task1", "-o", tmp_path / "rows.jsonl", "-o", tmp_path / "rows.csv",
        "-o", tmp_path / "rows.parquet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    rows = rows_of(tmp_path / "rows.jsonl")
    with (tmp_path / "rows.csv").open(newline="") as stream:
        assert [line["label"] for line in csv.DictReader(stream)] == [row.label or "" for row in rows]
    import pyarrow.dataset as ds

    table = ds.dataset(tmp_path / "rows.parquet", partitioning="hive").to_table()
    assert table["label"].to_pylist() == [row.label for row in rows]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{photos}"], 2, "name a task with --task; the engine has: task0, task1"),
        (["{photos}", "--task", "tusk"], 2, "unknown task 'tusk'"),
        (["{photos}/none.jpg", "--task", "task0"], 2, "no file or folder"),
        (["{photos}/*.webp", "--task", "task0"], 2, "nothing matches"),
        (["{photos}", "--task", "task0", "--top-k", "0"], 2, "Invalid value for '--top-k'"),
        (["{photos}", "--task", "task0", "--device", "tpu"], 2, "unknown device"),
        (["{photos}", "--task", "task0", "--shards", "4/4"], 2, "counted from 0 to 3"),
        (["{photos}", "--task", "task0", "--shards", "one"], 2, "written i/n"),
        (["{photos}", "--task", "task0", "--resume"], 2, "--resume needs an output"),
        (["{photos}", "--task", "task0", "-o", "x.jsonl", "--resume", "--overwrite"], 2, "contradict"),
        (["{photos}", "--task", "task0", "-o", "rows.json"], 2, ".jsonl"),
        (["{photos}", "--task", "task0", "--smooth", "1"], 2, "--smooth needs frames"),
        (["{photos}", "--task", "task0", "--task-column", "x"], 2, "has no columns"),
        (["{photos}", "--task", "task0", "--labels", "column"], 2, "has no columns"),
        (["{photos}", "--task", "task0", "--task", "task1", "--labels", "folder"], 2, "belong to one task"),
        (["{photos}", "--task", "task0", "--report", "r"], 2, "--labels"),
        (["{photos}", "-", "--task", "task0"], 2, "as the only input"),
        (["-", "--task", "task0", "--shards", "0/2"], 2, "only be read once"),
        (["{photos}/notes.txt", "--task", "task0", "--drop", "oldest"], 2, "is for streams"),
        (["{photos}", "--watch", "--task", "task0", "--executor", "ray"], 2, "answered where it arrives"),
    ],
)
def test_wrong_usage_is_one_line(photos, arguments, code, message):
    result = invoke(*[one.replace("{photos}", str(photos)) for one in arguments])
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.slow
def test_a_list_on_standard_input_and_a_reader_that_leaves(photos):
    """``cat list | prompttune infer engine - | head -2``: both ends are clean."""
    paths = "\n".join(str(path) for path in sorted(photos.rglob("*.PNG"))) + "\n"
    with subprocess.Popen(
        command("-", "--task", "task0", "--batch-size", 1),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        # The rows come while the list is still open, and the process ends although nobody closes it.
        process.stdin.write(paths)
        process.stdin.flush()
        first = json.loads(process.stdout.readline())
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # it may have left before the whole list was read
            os.write(process.stdin.fileno(), (paths * 200).encode())
        assert process.wait(120) == 0
        assert process.stderr.read() == ""
    assert first["source"] == paths.splitlines()[0]


def test_too_many_errors_end_the_job(photos, tmp_path):
    output = tmp_path / "rows.jsonl"
    result = invoke(photos, "--task", "task0", "--batch-size", 2, "-o", output, "--max-errors", 0)
    assert result.exit_code == 1
    assert "1 of 4 inputs have errors, more than the 0 that --max-errors allows; the rows of 4 inputs" in result.stderr
    assert len(rows_of(output)) == 4
    again = invoke(photos, "--task", "task0", "--batch-size", 2, "-o", output, "--max-errors", 1, "--resume")
    assert again.exit_code == 0, again.stderr
    _, whole = run(photos, output=tmp_path / "whole.jsonl", batch_size=2)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole) == 11


def test_a_job_that_cannot_begin_leaves_nothing(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images below"):
        run(tmp_path / "empty", output=tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match="name a task"):
        run(photos, output=tmp_path / "rows.jsonl", tasks=())
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_help_has_sections_and_examples():
    result = CliRunner().invoke(cli, ["infer", "--help"])
    for text in ("Inputs:", "Video and streams:", "Cluster:", "Examples:", "--resume", "rtsp://"):
        assert text in result.output


@pytest.mark.slow
def test_the_module_needs_no_extra(tmp_path):
    """Files and JSON lines work where neither PyAV nor pyarrow nor Ray is installed."""
    pictures(tmp_path / "images", 2)
    block = "import sys\nfor name in ('av', 'pyarrow', 'ray', 'watchfiles', 'pandas'): sys.modules[name] = None\n"
    (tmp_path / "x.mp4").touch()
    *_, video = command(tmp_path / "x.mp4", "--task", "task0", setup=block)
    setup = f"try:\n    exec({video!r})\nexcept SystemExit as end:\n    assert end.code == 1"
    done = subprocess.run(
        command(tmp_path / "images", "--task", "task0", setup=setup),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "prompttune[stream]" in done.stderr
    assert len(done.stdout.splitlines()) == 2
