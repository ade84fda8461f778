"""A run goes on, or has nothing left to do, only over the inputs that it answered; outputs are written again."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prompttune.errors import DataError, PrompttuneError, UsageError
from prompttune.serve.infer import infer
from prompttune.serve.infer.running import prepared
from tests.inferring import encoded, picture, pictures, rows_of, settings
from tests.test_infer_resume import contents
from tests.videos import render

OUTPUTS = ("rows.jsonl", "rows.csv", "rows.parquet")
IMAGES = Path("in")


def job(inputs: tuple[str, ...] = ("in",), outputs: tuple[str, ...] = ("rows.jsonl",), **changes: Any) -> Any:
    return infer(settings(*inputs, outputs=outputs, **changes))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over ten images, all paths relative."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pictures(IMAGES, 10, corrupt=(5,))
        for name in ("0008.png", "0009.png"):  # what tells them apart is their content alone
            Image.new("RGB", (8, 8), "red" if name == "0008.png" else "lime").save(IMAGES / name, compress_level=0)
            os.utime(IMAGES / name, (1e9, 1e9))
        assert job(outputs=OUTPUTS).finished
    return folder


@pytest.fixture
def here(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as on another disk: inodes and times of change are others."""
    monkeypatch.chdir(shutil.copytree(done, tmp_path / "copy"))
    return Path.cwd()


def flip(path: str, place: int) -> None:
    """Another byte in a file of the same size and time."""
    data, times = bytearray(Path(path).read_bytes()), Path(path).stat()
    data[place] ^= 1
    Path(path).write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(one: str, other: str) -> None:
    Path(one).rename("aside")
    Path(other).rename(one)
    Path("aside").rename(other)


def add(path: str, text: str) -> None:
    with Path(path).open("a") as file:
        file.write(text)


CHANGES: dict[str, tuple[Callable[[], object], str]] = {
    "new in front": (lambda: picture(50).save("in/000.png"), "in/000.png is new and comes before answered ones"),
    "new between": (lambda: picture(50).save("in/0003a.png"), "in/0003a.png is new and comes before"),
    "renamed": (lambda: Path("in/0009.png").rename("in/0009a.png"), "in/0009a.png is new and comes before"),
    "first gone": (lambda: Path("in/0000.png").unlink(), "the first input is gone"),
    "one gone": (lambda: Path("in/0004.png").unlink(), "the input after in/0003.png is gone"),
    "last gone": (lambda: Path("in/0009.png").unlink(), "the input after in/0008.png is gone"),
    "swapped": (lambda: swap("in/0001.png", "in/0002.png"), "in/0001.png is not what it was when it was answered"),
    "swapped, alike": (lambda: swap("in/0008.png", "in/0009.png"), "in/0008.png is not what it was"),
    "edited": (lambda: flip("in/0006.png", -20), "in/0006.png is not what it was .* file has changed"),
    "healed": (lambda: picture(5).save("in/0005.png"), "in/0005.png is not what it was"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_after_the_end_is_named(change: str, here: Path) -> None:
    act, message = CHANGES[change]
    act()
    before = contents(here)
    with pytest.raises(DataError, match=message) as caught:
        job(outputs=OUTPUTS, resume=True)
    assert "again with --overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(here) == before


def test_a_copy_and_a_touch_are_no_change(here: Path) -> None:
    for image in IMAGES.iterdir():
        if image.name != "0005.png":  # which could not be read, so that only its size and time are known
            image.touch()
    before = contents(here)
    assert job(outputs=OUTPUTS, resume=True).finished
    assert contents(here) == before


def test_inputs_that_came_at_the_end_are_answered(here: Path) -> None:
    for number in (10, 11, 12):
        picture(number).save(IMAGES / f"{number:04}.png")
    checked: list[tuple[int, int]] = []
    given = settings("in", outputs=OUTPUTS, resume=True)
    with prepared(given, stdin=None, stdout=None, on_check=lambda *told: checked.append(told)) as ready:
        assert (ready.total, ready.before.inputs) == (13, 10)
        summary = ready.job.run()
    assert checked[-1][0] == checked[-1][1]
    assert (summary.inputs, summary.rows, summary.errors, summary.finished) == (13, 13, 1, True)
    fresh = Path("fresh")
    fresh.mkdir()
    job(outputs=tuple(f"fresh/{name}" for name in OUTPUTS))
    sources = [row.source for row in rows_of(Path("fresh/rows.jsonl"))]
    assert [row.source for row in rows_of(Path("rows.jsonl"))] == sources
    assert pq.read_table("rows.parquet").column("source").to_pylist() == sources
    assert len(Path("rows.csv").read_text().splitlines()) == 14
    assert job(outputs=OUTPUTS, resume=True).inputs == 13
    flip("in/0011.png", -20)
    with pytest.raises(DataError, match=r"in/0011\.png is not what"):
        job(outputs=OUTPUTS, resume=True)


def stop_after(inputs: int, outputs: tuple[str, ...], **changes: Any) -> None:
    """A run that Ctrl-C ends."""
    given = settings("in", outputs=outputs, **changes)

    def progressed(progress: Any) -> None:
        if progress.inputs >= inputs:
            ready.job.stop()

    with prepared(given, stdin=None, stdout=None, on_progress=progressed) as ready:
        assert not ready.job.run().finished


def test_an_interrupted_run_is_checked_as_far_as_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(IMAGES, 80)
    stop_after(4, OUTPUTS)
    answered = len(rows_of(Path("rows.jsonl")))
    assert 4 <= answered < 79
    (IMAGES / "0079.png").unlink()  # nobody has asked for it yet
    picture(99).save(IMAGES / "0002.png")
    with pytest.raises(DataError, match=r"in/0002\.png is not what it was"):
        job(outputs=OUTPUTS, resume=True)
    picture(2).save(IMAGES / "0002.png")
    assert job(outputs=OUTPUTS, resume=True).inputs == 79


DAMAGES: dict[str, Callable[[], object]] = {
    "cut": lambda: os.truncate("rows.jsonl", 700),
    "emptied": lambda: os.truncate("rows.csv", 0),
    "rows added": lambda: add("rows.csv", "more\n"),
    "deleted": lambda: Path("rows.csv").unlink(),
    "part gone": lambda: Path("rows.parquet/task=task0/part-0.parquet").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_outputs_are_written_again_from_the_row_log(damage: str, here: Path) -> None:
    before = contents(here)
    DAMAGES[damage]()
    picture(10).save(IMAGES / "0010.png")
    assert job(outputs=OUTPUTS, resume=True).inputs == 11
    for name in ("rows.jsonl", "rows.csv"):
        assert (here / name).read_bytes().startswith(before[name])
    assert pq.read_table("rows.parquet").num_rows == 11


def test_an_output_that_is_gone_comes_back_without_new_inputs(here: Path) -> None:
    before = contents(here)
    Path("rows.csv").unlink()
    assert job(outputs=OUTPUTS, resume=True).inputs == 10
    assert contents(here) == before


def test_an_output_of_somebody_else_stays(here: Path) -> None:
    Path("rows.csv").write_text("path,label\n")
    with pytest.raises(UsageError, match=r"rows\.csv was not written by prompttune, so --resume leaves it"):
        job(outputs=OUTPUTS, resume=True)
    assert Path("rows.csv").read_text() == "path,label\n"


# Inputs inside of other files


def table(*seeds: int) -> None:
    pq.write_table(pa.table({"image": pa.array([encoded(seed) for seed in seeds], pa.binary())}), "in.parquet")


def shard(*seeds: int, mode: str = "w") -> None:
    with tarfile.open(f"in.tar{mode.partition(':')[2] and '.gz'}", mode) as archive:
        for seed in seeds:
            member, data = tarfile.TarInfo(f"{seed:03}.png"), encoded(seed)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def listed(*seeds: int) -> None:
    pictures(IMAGES, 5)
    Path("in.csv").write_text("path\n" + "".join(f"in/{seed:04}.png\n" for seed in seeds))


KINDS: dict[str, tuple[Callable[..., None], str]] = {
    "in.parquet": (table, r"in\.parquet \(row 1\) is not what it was"),
    "in.tar": (shard, r"in\.tar/004\.png \(row 1\) is new"),
    "in.tar.gz": (lambda *seeds: shard(*seeds, mode="w:gz"), r"in\.tar\.gz/004\.png \(row 1\) is new"),
    "in.csv": (listed, r"in/0004\.png \(row 1\) is new"),
}


@pytest.mark.parametrize("name", KINDS)
def test_rows_and_samples_are_compared_one_by_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = KINDS[name]
    make(0, 1)
    job((name,))
    make(0, 1)  # written anew with the same content
    assert job((name,), resume=True).inputs == 2
    make(0, 1, 2)
    assert job((name,), resume=True).inputs == 3
    make(0, 4, 2)
    with pytest.raises(DataError, match=message):
        job((name,), resume=True)
    make(0)
    with pytest.raises(DataError, match=r"the input after .* is gone"):
        job((name,), resume=True)


def test_further_files_may_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shard(0, 1)
    pictures(IMAGES, 1)
    job(("in.tar",))
    assert job(("in.tar", "in"), resume=True).inputs == 3
    with pytest.raises(DataError, match="the first input is gone or has moved"):
        job(("in", "in.tar"), resume=True)


def test_a_video_that_was_replaced_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    render(Path("in.mp4"), range(6))
    job(("in.mp4",))
    assert job(("in.mp4",), resume=True).inputs == 6
    render(Path("in.mp4"), range(1, 8))
    with pytest.raises(PrompttuneError, match=r"in\.mp4 \(frame 0\) is not what it was"):
        job(("in.mp4",), resume=True)


def test_another_label_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(IMAGES, 3)
    for labels in ("012", "010"):
        rows = [f"in/{index:04}.png,{label}" for index, label in enumerate(labels)]
        Path("labels.csv").write_text("\n".join(["path,label", *rows]))
        if labels == "012":
            job(labels="labels.csv")
    with pytest.raises(DataError, match=r"in/0002\.png is not what it was .* another task or true label"):
        job(labels="labels.csv", resume=True)
