"""The row log: what counts after a crash, and whose run may be resumed."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.items import FilePayload, Item
from prompttune.serve.infer.row_log import RowLog, RunProgress
from prompttune.serve.infer.rows import InputAnswer
from prompttune.serve.infer.traces import Trace
from tests.sink_helpers import answer, full_disk, rows

SETTINGS = {"engine": "engines/a", "tasks": ["birds"], "top_k": 5, "stride": None}
PROGRESS = RunProgress(7, 14, 1, counts={"skipped": 3}, smoothing={"birds": [0.5, 1 / 3]})
ANSWERS = [answer(number, ("birds", "digits")) for number in range(9)]
ROWS = [row for one in ANSWERS for row in one.rows]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "rows.jsonl.rowlog"


def begun(path, answers=()):
    log = RowLog(path)
    log.begin(SETTINGS)
    if answers:
        log.append(answers)
        log.commit(RunProgress(len(answers)))
    return log


def resumed(path):
    log = RowLog(path)
    log.read(SETTINGS)
    log.resume()
    return log


def test_progress_comes_back_as_it_was(path):
    begun(path)
    assert RowLog(path).read(SETTINGS) == RunProgress()
    resumed(path).commit(PROGRESS)
    assert RowLog(path).read({**SETTINGS, "tasks": ("birds",), "later": None}) == PROGRESS


@given(data=st.data())
def test_every_row_comes_back_exactly(data):
    given_rows = data.draw(st.lists(rows(labelled=True), max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        log = begun(Path(folder) / "log", [InputAnswer(tuple(given_rows))])
        assert list(log.rows()) == given_rows


def test_a_name_that_is_no_unicode_comes_back(path):
    item = Item("f\udcff.png", FilePayload(Path("f\udcff.png")))
    log = RowLog(path)
    log.begin({"sources": [item.source]})
    log.read({"sources": [item.source]})
    log.append([InputAnswer((ROWS[0],), trace=Trace.of(item)), ANSWERS[1]])
    log.commit(RunProgress(2))
    assert [trace.same(item) for trace in log.traces()] == [True]


def test_a_crash_at_any_byte_loses_what_was_not_committed_alone(path):
    log, counted = begun(path), {path.stat().st_size: 0}
    for number in range(4):
        log.append(ANSWERS[2 * number : 2 * number + 2])
        log.commit(RunProgress(2 * number + 2))
        counted[path.stat().st_size] = 2 * number + 2
    whole = path.read_bytes()
    for size in [
        *range(min(counted), len(whole) + 1, 211),
        *counted,
        *(end - 1 for end in counted if end > min(counted)),
    ]:
        path.write_bytes(whole[:size])
        again = resumed(path)
        safe = max(inputs for end, inputs in counted.items() if end <= size)
        assert again.progress.inputs == safe
        assert list(again.rows()) == ROWS[: 2 * safe]
        again.append(ANSWERS[safe:8])
        again.commit(RunProgress(8))
        assert list(again.rows()) == ROWS[:16]


def test_a_changed_byte_ends_what_counts(path):
    log = begun(path, ANSWERS[:2])
    log.append(ANSWERS[2:4])
    log.commit(RunProgress(4))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"2.png", b"3.png", 1))
    assert RowLog(path).read(SETTINGS).inputs == 2


def test_a_commit_is_on_the_disk_before_it_counts(path, monkeypatch):
    log, synced = begun(path), []

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, path.read_bytes().count(b"\n"), log.progress.inputs))

    monkeypatch.setattr(os, "fsync", fsync)
    log.append(ANSWERS[:2])
    log.commit(RunProgress(2))
    # the file with its header, two inputs and the commit, while the commit before still counts
    assert synced == [(path.stat().st_ino, 4, 0)]
    assert log.progress.inputs == 2


def test_a_full_disk_leaves_the_commit_before(path):
    log = begun(path, ANSWERS[:2])
    log.append(ANSWERS[2:])
    with full_disk(path.stat().st_size + 50), pytest.raises(OSError, match="File too large"):
        log.commit(RunProgress(9))
    assert log.progress.inputs == 2
    assert RowLog(path).read(SETTINGS).inputs == 2
    log.commit(RunProgress(9))  # there is room again
    assert list(resumed(path).rows()) == ROWS


def test_a_finished_run_that_is_resumed_is_not_finished(path):
    begun(path).commit(RunProgress(7, finished=True))
    assert RowLog(path).read(SETTINGS).finished
    resumed(path)
    assert RowLog(path).read(SETTINGS) == RunProgress(7)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"top_k": 3, "tasks": ["cats"]}, 'tasks was ["birds"] and is ["cats"] now'),
        ({"stride": 2}, "stride was not given and is 2 now"),
        ({"engine": None}, 'engine was "engines/a" and is not given now'),
        ({"labels": "folder"}, 'labels was not given and is "folder" now'),
    ],
)
def test_another_setting_is_named_with_both_values(path, changed, line):
    begun(path)
    with pytest.raises(UsageError) as caught:
        RowLog(path).read({**SETTINGS, **changed})
    assert str(caught.value) == (
        f"cannot resume with other settings: {line}; give the same, or begin again with --overwrite"
    )


def test_without_a_log_there_is_nothing_to_resume(path):
    with pytest.raises(UsageError, match=r"to resume: .* does not exist; .*--resume$"):
        RowLog(path).read(SETTINGS)


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [
        ("{", DataError, "is damaged"),
        ("[]", DataError, "is damaged"),
        ('{"format": 3}', DataError, "is damaged"),
        ('{"format": 99, "settings": {}}', UsageError, r"another version of prompttune wrote .* \(format 99\): finish"),
    ],
)
def test_a_damaged_log_is_one_line(tmp_path, text, error, line):
    path = tmp_path / "rows.rowlog"
    path.write_text(text)
    with pytest.raises(error, match=line) as caught:
        RowLog(path).read(SETTINGS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"source": "b"}, {"row": 2}, {"row": None}, {"frame": 1}, {"task": "birds"}, {"target": "owl"}]
)
def test_a_trace_tells_inputs_apart(change):
    before = Trace.of(Item("a", None, row=1))
    assert Trace(*json.loads(json.dumps(before))) == before
    assert before.same(Item("a", None, row=1))
    assert not before.same(Item(**{"source": "a", "row": 1, **change}))
