"""Jobs over frames: videos, streams that break, folders that fill; each frame is accounted for."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
from dataclasses import replace

import pytest

from prompttune.errors import EngineError
from prompttune.serve.infer import job as jobs
from prompttune.serve.infer.running import prepared
from tests.inferring import TELLING, command, encoded, invoked, pictures, rows_of, run, settings
from tests.videos import broken_stream, clip, render

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'prompttune[stream]'")

FRAMES = 30


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "numbers.mp4"
    render(path, range(FRAMES), rate=10)
    return path


def test_every_frame_has_a_row(video, tmp_path):
    summary, rows = run(video, output=tmp_path / "rows.jsonl", tasks=("task0", "task1"))
    assert [(row.frame, row.task) for row in rows] == [
        (frame, task) for frame in range(FRAMES) for task in ("task0", "task1")
    ]
    assert [row.timestamp for row in rows[::2]] == pytest.approx([frame / 10 for frame in range(FRAMES)])
    assert summary.counts["frames"] == summary.inputs == FRAMES
    assert summary.latency is None


def test_smoothing_goes_on_after_an_interruption(video, tmp_path, monkeypatch):
    plain, rough = run(video, output=tmp_path / "plain.jsonl")
    once, smooth = run(video, output=tmp_path / "once.jsonl", smooth=0.5)
    assert [row.probability for row in smooth] != [row.probability for row in rough]
    assert travelled(smooth) < travelled(rough)

    def check(self):
        if self._progress.inputs >= 12:
            raise EngineError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.InferJob, "_check_errors", check)
        with pytest.raises(EngineError, match="rows of 12 inputs are safe"):
            run(video, output=tmp_path / "twice.jsonl", smooth=0.5)
    run(video, output=tmp_path / "twice.jsonl", smooth=0.5, resume=True)
    assert (tmp_path / "twice.jsonl").read_bytes() == (tmp_path / "once.jsonl").read_bytes()
    assert (plain.inputs, once.inputs) == (FRAMES, FRAMES)


def travelled(rows):
    """How far the probability of the first class goes up and down."""
    shares = [next(score.probability for score in row.top_k if score.label == "0") for row in rows]
    return sum(abs(one - other) for one, other in itertools.pairwise(shares))


def test_the_command_draws_a_video(video, tmp_path):
    outputs = ["-o", tmp_path / "rows.jsonl", "-o", tmp_path / "drawn.mp4"]
    done = invoked(video, "--task", "task0", "--stride", 3, *outputs)
    assert done.exit_code == 0, done.output
    assert "20 skipped" in done.stderr
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [row.frame for row in rows] == list(range(0, FRAMES, 3))
    with av.open(str(tmp_path / "drawn.mp4")) as drawn:
        times = [frame.time for frame in drawn.decode(video=0)]
    assert times == pytest.approx([row.timestamp for row in rows], abs=0.01)
    again = invoked(video, "--task", "task0", *outputs, "--resume")
    assert again.exit_code == 2
    assert "cannot be resumed" in again.stderr


@pytest.mark.slow
def test_a_stream_that_breaks_three_times(tmp_path):
    """Every frame that arrives is a row or counted; Ctrl-C is the normal end of a stream."""
    parts = [clip(range(start, start + 10)) for start in range(0, 40, 10)]
    output = tmp_path / "rows.jsonl"
    with broken_stream([*parts, b""]) as address:
        words = [address, "--task", "task0", "--drop", "none", "-o", output, "--json"]
        with subprocess.Popen(
            command(*words, setup=TELLING), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            seen = 0
            log = []
            while seen < 40:
                line = process.stderr.readline()
                assert line, log
                log.append(line)
                seen += int(line.split()[1]) if line.startswith("wrote") else 0
            process.send_signal(signal.SIGINT)
            summary = json.loads(process.stdout.read())
            assert process.wait(120) == 0
    rows = rows_of(output)
    assert [row.frame for row in rows] == list(range(40))
    assert all(row.source == address for row in rows)
    assert summary["finished"]
    counts = summary["counts"]
    assert counts["frames"] == 40 + counts.get("skipped", 0) + counts.get("dropped", 0)
    assert counts["reconnects"] >= 4
    assert summary["latency"]["p99_ms"] >= summary["latency"]["p50_ms"] > 0


def test_a_watched_folder_is_answered_once_over_two_runs(tmp_path):
    folder = pictures(tmp_path / "inbox", 3)
    output = tmp_path / "rows.jsonl"
    job = settings(folder, outputs=(str(output),), watch=True)

    def watch(job, expected):
        def progressed(progress):
            if progress.inputs == 3:  # one more arrives while the folder is watched
                (folder / ".new.png").write_bytes(encoded(3))
                (folder / ".new.png").rename(folder / "0003.png")
            if progress.inputs == expected:
                ready.job.stop()

        with prepared(job, stdin=None, stdout=None, on_progress=progressed) as ready:
            assert ready.live
            assert ready.job.run().finished

    watch(job, 4)
    (folder / "0004.png").write_bytes(encoded(4))
    (folder / "0001.png").write_bytes(encoded(9))  # while nobody watches
    (folder / "0002.png").touch()
    watch(replace(job, resume=True), 6)
    names = [row.source.rsplit("/", 1)[1] for row in rows_of(output)]
    assert names[:4] == [f"{index:04}.png" for index in range(4)]
    assert sorted(names[4:]) == ["0001.png", "0004.png"]
    assert all(row.error is None for row in rows_of(output))
