"""What is committed stays: after any end, --resume gives the rows of a run that was never interrupted."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from prompttune.errors import DataError, EngineError, UsageError
from prompttune.files import locked
from prompttune.serve.infer import job as jobs
from prompttune.serve.infer.running import prepared
from prompttune.serve.infer.sinks.text import CsvRows
from tests.inferring import TELLING, command, invoked, pictures, rows_of, run, settings
from tests.sink_helpers import full_disk

COUNT = 60
CHUNKS = -(-COUNT // 8)
OFTEN = "import prompttune.serve.infer.job as job; job.COMMIT_S = 0.0\n"
IN_STEP = """
told = job.InferJob._write
def in_step(self, answers):
    told(self, answers)
    os.read(0, 1)
job.InferJob._write = in_step
"""
"""Set-up of a command that tells of each chunk and waits for a byte before the next, so it never ends unasked."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("resume") / "images", COUNT, corrupt=(5, 17, 40))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The rows of a run that is not interrupted, in the forms that can be resumed."""
    folder = tmp_path_factory.mktemp("whole")
    job = settings(images, outputs=outputs(folder), tasks=("task0", "task1"), batch_size=8)
    with prepared(job, stdin=None, stdout=None) as ready:
        summary = ready.job.run()
    assert (summary.inputs, summary.rows, summary.errors) == (COUNT, 2 * COUNT, 3)
    return folder


def outputs(folder: Path) -> tuple[str, ...]:
    return tuple(str(folder / name) for name in ("rows.jsonl", "rows.csv", "rows.parquet"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its row log, which holds times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".rowlog"
    }


def arguments(images: Path, folder: Path) -> list[object]:
    places = [word for output in outputs(folder) for word in ("-o", output)]
    return [images, "--task", "task0", "--task", "task1", "--batch-size", 8, *places]


@pytest.mark.slow
def test_killed_at_random_moments(images, whole, tmp_path):
    """SIGKILL four times, each after one more chunk or two; then an end."""
    draws = random.Random(0)
    for attempt in range(CHUNKS // 2):
        setup = TELLING + OFTEN + IN_STEP
        words = [*arguments(images, tmp_path), *(["--resume"] if attempt else [])]
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command(*words, setup=setup), **pipes) as process:
            assert process.stderr.readline().startswith("wrote"), process.stderr.read()
            process.stdin.write(".")
            process.stdin.flush()
            time.sleep(draws.uniform(0, 0.05))  # it commits and answers the next chunk, not more, meanwhile
            process.kill()
        assert process.returncode == -signal.SIGKILL
    done = invoked(*arguments(images, tmp_path), "--resume")
    assert done.exit_code == 0, done.stderr
    assert "of them in this run" in done.stderr
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("after", range(1, CHUNKS, 3))
def test_an_engine_that_fails_in_the_middle(images, whole, tmp_path, monkeypatch, after):
    from prompttune.serve.engine import Engine

    answer, calls = Engine.answer, []

    def failing(self, batch, tasks):
        calls.append(len(tasks))
        if len(calls) == after:
            raise EngineError("the device is gone")
        return answer(self, batch, tasks)

    job = settings(images, outputs=outputs(tmp_path), tasks=("task0", "task1"), batch_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "answer", failing)
        with prepared(job, stdin=None, stdout=None) as ready, pytest.raises(EngineError) as caught:
            ready.job.run()
    assert f"the device is gone; the rows of {8 * (after - 1)} inputs are safe: run again with --resume" in str(
        caught.value
    )
    finish(job)
    assert contents(tmp_path) == contents(whole)


def finish(job, stdout=None):
    with prepared(dataclasses.replace(job, resume=True), stdin=None, stdout=stdout) as ready:
        return ready.job.run()


def test_a_sink_that_fails_in_the_middle(images, tmp_path, monkeypatch):
    """Log, files and standard output of both runs together have every row once."""
    job = settings(images, outputs=(str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.csv"), "-"))
    write, stdout = CsvRows.write, io.StringIO()

    def failing(self, answer):
        if answer.rows[0].source.endswith("0026.png"):  # the third input of the seventh chunk
            raise OSError(errno.EIO, "Input/output error")
        write(self, answer)

    with monkeypatch.context() as patch:
        patch.setattr(CsvRows, "write", failing)
        with prepared(job, stdin=None, stdout=stdout) as ready, pytest.raises(DataError, match="of 24 inputs are safe"):
            ready.job.run()
    assert stdout.getvalue().count("\n") == 24
    finish(job, stdout)
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [Path(row.source).name for row in rows] == [f"{number:04}.png" for number in range(COUNT)]
    assert stdout.getvalue() == (tmp_path / "rows.jsonl").read_text()


@pytest.mark.parametrize("resumable", [True, False])
def test_resuming_is_advised_where_it_is_possible(images, tmp_path, monkeypatch, resumable):
    outputs = [str(tmp_path / name) for name in (["rows.jsonl"] if resumable else ["rows.jsonl", "out.mp4"])]
    with monkeypatch.context() as patch:
        patch.setattr(jobs.InferJob, "_check_errors", fail_after(patch, 4))
        with prepared(settings(images, outputs=outputs), stdin=None, stdout=None) as ready:
            assert ready.resumable == resumable
            with pytest.raises(EngineError) as caught:
                ready.job.run()
    advice = "; the rows of 4 inputs are safe: run again with --resume"
    assert str(caught.value) == "enough" + advice * resumable
    with prepared(
        settings("-", outputs=(str(tmp_path / "list.jsonl"),)), stdin=lambda: io.BytesIO(), stdout=None
    ) as ready:
        assert not ready.resumable


def test_stopped_and_gone_on_with(images, whole, tmp_path):
    """What Ctrl-C does: what is under way is written, the rest is not begun."""
    job = settings(images, outputs=outputs(tmp_path), tasks=("task0", "task1"), batch_size=8)
    stop = threading.Event()

    def progressed(progress):
        if progress.inputs >= 8 and not stop.is_set():
            stop.set()
            ready.job.stop()

    with prepared(job, stdin=None, stdout=None, on_progress=progressed) as ready:
        summary = ready.job.run()
    assert not summary.finished
    assert 8 <= summary.inputs < COUNT
    assert len(rows_of(tmp_path / "rows.jsonl")) == summary.rows == 2 * summary.inputs
    end = finish(job)
    assert (end.finished, end.inputs, end.errors) == (True, COUNT, 3)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_cleanly(images, tmp_path, monkeypatch, number, code):
    output, write = tmp_path / "rows.jsonl", jobs.InferJob._write

    def written(self, answers):
        write(self, answers)
        if self._progress.inputs == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(jobs.InferJob, "_write", written)
    done = invoked(images, "--task", "task0", "--batch-size", 1, "-o", output)
    assert done.exit_code == code, done.output
    assert "stopping: running inputs are written" in done.stderr
    assert "run again with --resume" in done.stderr
    assert 3 <= len(rows_of(output)) < COUNT


def test_a_full_disk(images, whole, tmp_path, monkeypatch):
    """The file system refuses to let a file grow: one line, and the next run goes on."""
    limit = (whole / "rows.jsonl").stat().st_size // 2
    size = max(limit, 4096)
    words = [images, "--task", "task0", "--task", "task1", "--batch-size", 8, "-o", tmp_path / "rows.jsonl"]
    monkeypatch.setattr(jobs, "COMMIT_S", 0.0)
    with full_disk(size):
        full = invoked(*words)
    assert full.exit_code == 1
    assert "cannot be written: File too large" in full.stderr
    assert "--resume" in full.stderr
    safe = int(re.search(r"the rows of (\d+) inputs are safe", full.stderr)[1])
    assert 0 < safe < COUNT
    again = invoked(*words, "--resume")
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "rows.jsonl").read_bytes() == (whole / "rows.jsonl").read_bytes()


def test_labels_of_all_runs_are_evaluated(images, tmp_path, monkeypatch):
    table = tmp_path / "labels.csv"
    rows = [f"{path},{index % 3}" for index, path in enumerate(sorted(images.iterdir()))]
    table.write_text("\n".join(["path,label", *rows]) + "\n")
    once, _ = run(images, output=tmp_path / "once.jsonl", tasks=("task1",), labels=str(table))
    monkeypatch.setattr(jobs.InferJob, "_check_errors", fail_after(monkeypatch, 24))
    with pytest.raises(EngineError, match="enough"):
        run(images, output=tmp_path / "twice.jsonl", tasks=("task1",), labels=str(table))
    monkeypatch.undo()
    twice, _ = run(images, output=tmp_path / "twice.jsonl", tasks=("task1",), labels=str(table), resume=True)
    assert twice.evaluation["task1"].to_dict() == once.evaluation["task1"].to_dict()
    assert once.evaluation["task1"].evaluation.n == COUNT - 3


def fail_after(monkeypatch, inputs):
    def check(self):
        if self._progress.inputs >= inputs:
            raise EngineError("enough")

    return check


def test_other_inputs_are_not_gone_on_with(images, tmp_path, monkeypatch):
    copy = shutil.copytree(images, tmp_path / "images")
    monkeypatch.setattr(jobs.InferJob, "_check_errors", fail_after(monkeypatch, 24))
    with pytest.raises(EngineError):
        run(copy, output=tmp_path / "rows.jsonl")
    monkeypatch.undo()
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(UsageError, match="top-k was 5 and is 1 now"):
        run(copy, output=tmp_path / "rows.jsonl", resume=True, top_k=1)
    with pytest.raises(UsageError, match="batch-size was 4 and is 8 now"):
        run(copy, output=tmp_path / "rows.jsonl", resume=True, batch_size=8)
    (copy / "0003.png").rename(copy / "0003a.png")
    with pytest.raises(DataError, match=r"0003a\.png is new and comes before"):
        run(copy, output=tmp_path / "rows.jsonl", resume=True)
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    for path in sorted(copy.iterdir())[20:]:
        path.unlink()
    with pytest.raises(DataError, match=r"0003a\.png is new"):
        run(copy, output=tmp_path / "rows.jsonl", resume=True)


def test_a_finished_run_has_nothing_left(images, tmp_path):
    first, _ = run(images, output=tmp_path / "rows.jsonl")
    before = (tmp_path / "rows.jsonl").read_bytes()
    again, _ = run(images, output=tmp_path / "rows.jsonl", resume=True)
    assert (again.inputs, again.finished) == (first.inputs, True)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_two_runs_do_not_share_an_output(images, tmp_path):
    output = tmp_path / "rows.jsonl"
    with locked(output), pytest.raises(UsageError, match="another run writes"):
        run(images, output=output)
    assert not output.exists()
    with pytest.raises(UsageError, match="nothing to resume"):
        run(images, output=output, resume=True)


def test_a_shard_goes_on_as_itself(images, tmp_path, monkeypatch):
    from prompttune.serve.infer.settings import Shard

    _, whole_part = run(images, output=tmp_path / "whole.jsonl", shard=Shard(1, 3))
    monkeypatch.setattr(jobs.InferJob, "_check_errors", fail_after(monkeypatch, 8))
    with pytest.raises(EngineError):
        run(images, output=tmp_path / "part.jsonl", shard=Shard(1, 3))
    monkeypatch.undo()
    run(images, output=tmp_path / "part.jsonl", shard=Shard(1, 3), resume=True)
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole_part) == 20
