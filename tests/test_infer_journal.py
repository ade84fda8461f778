"""The record of a run: what it says after a crash, who may write it, and whose run may go on."""

import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompttune import files as module
from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.items import FilePayload, Item
from prompttune.serve.infer.journal import Journal, Progress, Record
from prompttune.serve.infer.ledger import Trace
from prompttune.serve.infer.sinks.appended import PARTS
from prompttune.serve.infer.sinks.parquet import ParquetParts
from prompttune.serve.infer.sinks.parquet_folder import clear
from prompttune.serve.infer.sinks.text import CsvRows, JsonLines
from tests.sink_helpers import Crash, answer, contents, crash_at

SETTINGS = {"engine": "engines/a", "tasks": ["birds"], "top_k": 5, "stride": None}
PROGRESS = Progress(
    7, 2, 14, 1, sinks=({"bytes": 10, "rows": 14}, {}), counts={"skipped": 3}, smoothing={"birds": [0.5, 1 / 3]}
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "rows.jsonl.journal.json"


def test_a_record_comes_back_as_it_was(path):
    with Journal(path) as journal:
        assert journal.read() is None
        journal.begin(SETTINGS)
        assert Journal(path).read() == Record(SETTINGS)
        journal.write(PROGRESS)
        assert Journal(path).read() == Record(SETTINGS, PROGRESS)
        journal.end(replace(PROGRESS, ended=7), True, {"rows": 14})
        assert Journal(path).read() == Record(SETTINGS, replace(PROGRESS, ended=7), True, {"rows": 14})
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, "rows.jsonl.journal.ledger"]


def test_a_run_goes_on_under_the_settings_that_it_had(path):
    with Journal(path) as journal:
        journal.begin({**SETTINGS, "tasks": ("birds",)})
        journal.write(PROGRESS)
    with Journal(path) as journal:
        assert journal.resume(SETTINGS).progress == PROGRESS
        journal.go_on()
        journal.note(b"a line\n")
        journal.write(Progress(9))
    assert Journal(path).read() == Record(SETTINGS, Progress(9, ledger=7))


def test_lines_of_the_ledger_that_no_record_counts_are_cut_off(path):
    with Journal(path) as journal:
        journal.begin(SETTINGS)
        journal.note(b"one\n")
        journal.write(Progress(1))
        journal.note(b"two\n")
        assert journal.sync() == 8  # and a crash
    with Journal(path) as journal:
        journal.resume(SETTINGS)
        journal.go_on()
        journal.note(b"three\n")
        journal.write(Progress(2))
        assert journal.ledger.read_bytes() == b"one\nthree\n"


def test_what_ended_has_not_ended_once_it_goes_on(path):
    with Journal(path) as journal:
        journal.begin(SETTINGS)
        journal.end(replace(PROGRESS, ended=0), True, {})
        journal.resume(SETTINGS)
        journal.go_on()
    assert Journal(path).read() == Record(SETTINGS, PROGRESS)


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
    with Journal(path) as journal:
        journal.begin(SETTINGS)
        with pytest.raises(UsageError) as caught:
            journal.resume({**SETTINGS, **changed})
    assert str(caught.value) == (
        f"cannot resume with other settings: {line}; give the same, or begin again with --overwrite"
    )


def test_a_setting_that_says_nothing_is_no_difference():
    Record(SETTINGS).check({**SETTINGS, "later": None})


def test_names_that_are_no_unicode_are_recorded(path):
    given_settings = {"sources": ["f\udcff.png"]}
    with Journal(path) as journal:
        journal.begin(given_settings)
        journal.resume(given_settings)


def test_without_a_record_there_is_nothing_to_go_on_from(path):
    with Journal(path) as journal, pytest.raises(UsageError, match=r"to resume: .* does not exist; .*--resume$"):
        journal.resume(SETTINGS)


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [
        ("{", DataError, "cannot read the record of the run"),
        ("[]", DataError, "is not a JSON object"),
        ('{"format": 2}', DataError, "is damaged"),
        ('{"format": 2, "settings": {}, "progress": {"sinks": [], "colour": 3}}', DataError, "is damaged"),
        ('{"format": 2, "settings": {}, "progress": 3}', DataError, "is damaged"),
        ('{"format": 99}', UsageError, r"a later version of prompttune wrote .* \(format 99\): finish .* with that"),
        ('{"format": 1}', UsageError, r"an earlier version of prompttune wrote .* \(format 1\): finish the run with"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, text, error, line):
    path = tmp_path / "j.json"
    path.write_text(text)
    with pytest.raises(error, match=line) as caught:
        Journal(path).read()
    assert "\n" not in str(caught.value)


def test_a_journal_is_written_by_one_run(path):
    with Journal(path) as journal:
        journal.begin(SETTINGS)
        with pytest.raises(
            UsageError, match=r"^another run writes to .*/rows\.jsonl: process \d+ on .*; wait for its end, or "
        ):
            Journal(path).__enter__()
        journal.write(PROGRESS)  # the one that was refused took nothing away
    with Journal(path) as journal:
        journal.resume(SETTINGS)


HOLD = """
import sys
from pathlib import Path
from prompttune.serve.infer.journal import Journal
with Journal(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_run_holds_nothing(path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another run writes to"):
            Journal(path).__enter__()
    finally:
        other.kill()
        other.communicate()
    with Journal(path) as journal:
        journal.begin(SETTINGS)
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, "rows.jsonl.journal.ledger"]


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(path, monkeypatch):
    lock = path.with_name(".rows.jsonl.lock")
    real, calls = module.fcntl.flock, []

    def flock(stream, how):
        calls.append(how)
        real(stream, how)
        if len(calls) == 1:
            lock.unlink()  # as if its holder ended just before the call

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with Journal(path):
        assert len(calls) == 2
        assert lock.exists()
        monkeypatch.undo()
        with pytest.raises(UsageError, match="another run writes to"):
            Journal(path).__enter__()


def test_a_file_system_without_locks_is_said_and_used(path, monkeypatch, caplog):
    monkeypatch.setattr(module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "not implemented")))
    with caplog.at_level(logging.WARNING, "prompttune.files"), Journal(path) as journal:
        journal.begin(SETTINGS)
    assert "has no locks" in caplog.text


def test_a_place_where_nothing_can_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"^cannot write to .*: (File exists|Not a directory) \(.*file\)$"):
        Journal(tmp_path / "file" / "j.json").__enter__()


def test_writing_without_the_lock_or_a_beginning_is_a_mistake(path):
    with pytest.raises(RuntimeError, match="within its with statement"):
        Journal(path).begin(SETTINGS)
    with Journal(path) as journal, pytest.raises(RuntimeError, match="comes first"):
        journal.write(PROGRESS)


def test_a_journal_that_cannot_be_replaced_stays(path):
    with Journal(path) as journal:
        journal.begin(SETTINGS)
        journal.write(PROGRESS)
        for number in range(4):  # the file on the disk, its new name, the folder
            with crash_at(number):
                journal.write(Progress(99))
            assert json.loads(path.read_text())["progress"]["inputs"] == (7 if number < 3 else 99)


# Inputs


@pytest.mark.parametrize(
    "change", [{"source": "b"}, {"row": 2}, {"row": None}, {"frame": 1}, {"task": "birds"}, {"target": "owl"}]
)
def test_a_trace_tells_inputs_apart(change):
    before = Trace.of(Item("a", None, row=1))
    assert Trace.parse(before.line) == before
    assert before.same(Item("a", None, row=1))
    assert not before.same(Item(**{"source": "a", "row": 1, **change}))


def test_a_file_name_that_is_no_unicode_has_a_trace():
    item = Item("f\udcff.png", FilePayload(Path("f\udcff.png")))
    assert Trace.parse(Trace.of(item).line).same(item)


# A whole run: sinks first, then the journal


ANSWERS = [answer(number, ("birds", "digits")) for number in range(9)]
MAKERS = (
    lambda folder, state: JsonLines(folder / "rows.jsonl", False, state),
    lambda folder, state: CsvRows(folder / "rows.csv", False, state),
    lambda folder, state: ParquetParts(folder / "rows", False, state, 4),
)


def attempt(folder, every):
    """A run as the pipeline makes it: it begins, or goes on where the journal says; may crash anywhere."""
    with Journal(folder / "rows.jsonl.journal.json") as journal:
        record = journal.read()
        states = record.progress.sinks if record else ()
        if not states:
            clear(folder / "rows")
            sinks = [make(folder, None) for make in MAKERS]
            journal.begin(SETTINGS)
        else:
            journal.resume(SETTINGS)
            journal.go_on()
            sinks = [make(folder, state) for make, state in zip(MAKERS, states, strict=True)]
        written = record.progress.inputs if record else 0
        for one in ANSWERS[written:]:
            for sink in sinks:
                sink.write(one)
            written += 1
            if written % every == 0:
                journal.write(Progress(inputs=written, sinks=tuple(map(committed, sinks))))
        for sink in sinks:
            sink.finish()
        journal.end(Progress(inputs=written, sinks=tuple(map(committed, sinks))), True)


def committed(sink):
    return {name: value for name, value in sink.commit().items() if name != PARTS}


def files(folder):
    return {name: data for name, data in contents(folder).items() if not name.endswith((".lock", ".ledger"))}


@settings(max_examples=40)
@given(crashes=st.lists(st.integers(0, 60), max_size=5), every=st.integers(1, 4))
def test_a_run_that_crashes_again_and_again_ends_as_one_that_does_not(crashes, every):
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        attempt(whole, every)
        for number in crashes:
            with crash_at(number):
                attempt(broken, every)
        attempt(broken, every)
        left = {name: data for name, data in files(broken).items() if not name.startswith(".rows.jsonl.journal")}
        assert left == files(whole)


def test_the_journal_never_says_more_than_the_sinks_hold(tmp_path):
    for number in count():
        folder = tmp_path / str(number)
        with crash_at(number) as done:
            attempt(folder, 2)
        record = Journal(folder / "rows.jsonl.journal.json").read() if folder.exists() else None
        for make, state in zip(MAKERS, record.progress.sinks if record else (), strict=False):
            assert len(list(make(folder, state).rows())) == 2 * record.progress.inputs
        if len(done) < number:
            break
    assert number > 40
    assert issubclass(Crash, BaseException)
