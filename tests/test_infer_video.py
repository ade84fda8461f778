"""Video files: numbers, times, damage."""

from __future__ import annotations

import pickle
import sys
import wave
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

from prompttune.errors import DataError, MissingExtraError, UsageError
from prompttune.serve.infer.items import ArrayPayload, Item
from prompttune.serve.infer.settings import SourceSettings
from prompttune.serve.infer.sources.frames import Selection
from prompttune.serve.infer.sources.video import VideoSource
from tests.inferring import run
from tests.videos import HEIGHT, WIDTH, number_in, picture, render, wreck

FRAMES = 30


def shown(items: Sequence[Item]) -> list[int]:
    return [number_in(item.payload.open()) for item in items if item.payload]


@pytest.mark.parametrize(
    ("name", "codec", "total"),
    [
        ("a.mp4", "libx264", FRAMES),
        ("a.mkv", "libx264", None),
        ("a.ts", "libx264", None),
        ("a.avi", "mpeg4", FRAMES),
        ("a.webm", "libvpx", None),
        ("a.mjpeg", "mjpeg", None),
    ],
)
def test_every_frame_has_its_number_and_time(name: str, codec: str, total: int | None, tmp_path: Path) -> None:
    path = tmp_path / name
    render(path, range(FRAMES), codec=codec)
    source = VideoSource(path)
    items = list(source.items())
    assert shown(items) == [item.frame for item in items] == list(range(FRAMES))
    assert source.rate is not None
    # a time in Matroska is a whole number of milliseconds; raw MJPEG has none but the rate's
    assert [item.timestamp for item in items] == pytest.approx([frame / float(source.rate) for frame in range(FRAMES)])
    assert {item.source for item in items} == {str(path)}
    assert source.counts() == {"frames": FRAMES, "skipped": 0, "damaged": 0}
    assert (source.bounded, source.total) == (True, total)


def test_a_video_without_times_takes_them_from_its_rate(tmp_path: Path) -> None:
    render(tmp_path / "a.h264", range(FRAMES))
    source = VideoSource(tmp_path / "a.h264")
    items = list(source.items())
    assert shown(items) == list(range(FRAMES))
    assert [item.timestamp for item in items] == pytest.approx([frame / float(source.rate) for frame in range(FRAMES)])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stride": 7}, [0, 7, 14, 21, 28]),
        ({"fps": 2.5}, [0, 4, 8, 12, 16, 20, 24, 28]),
        ({"fps": 3}, [0, 4, 7, 10, 14, 17, 20, 24, 27]),  # ticks at thirds of a second, frames at tenths
        ({"fps": 100}, list(range(FRAMES))),
    ],
)
def test_chosen_frames_keep_their_numbers(settings: dict[str, float], expected: list[int], tmp_path: Path) -> None:
    render(tmp_path / "a.mp4", range(FRAMES))
    source = VideoSource(tmp_path / "a.mp4", **settings)
    items = list(source.items())
    assert shown(items) == [item.frame for item in items] == expected
    assert source.total == (None if "fps" in settings else len(expected))
    counts = source.counts()
    assert counts["frames"] == len(items) + counts["skipped"]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_pictures_are_upright(rotation: int, tmp_path: Path) -> None:
    corner = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    corner[: HEIGHT // 2, : WIDTH // 2] = 255
    render(tmp_path / "a.mp4", range(2), rotation=rotation, draw=lambda _: corner)
    source = VideoSource(tmp_path / "a.mp4")
    item = next(iter(source.items()))
    found = np.asarray(item.payload.open())
    expected = np.rot90(corner, rotation // 90)  # both turn counter-clockwise
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 8
    sent = pickle.loads(pickle.dumps(item.payload))
    assert isinstance(sent, ArrayPayload)
    np.testing.assert_array_equal(np.asarray(sent.open()), found)


@pytest.mark.parametrize(
    ("codec", "packets"),
    [
        ("libx264", [0]),  # the only key frame: what follows is decoded in part until references return
        ("libx264", [12]),
        ("mpeg4", [12, 13]),
    ],
)
def test_a_frame_that_cannot_be_decoded_is_a_row_with_an_error(codec: str, packets: list[int], tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    render(path, range(FRAMES), codec=codec)
    wreck(path, packets)
    source = VideoSource(path)
    items = list(source.items())
    assert [item.frame for item in items] == list(range(len(items)))
    errors = [item.error for item in items if item.payload is None]
    assert errors
    assert set(errors) <= {"this frame cannot be decoded", "this frame is damaged"}
    assert source.counts() == {"frames": len(items), "skipped": 0, "damaged": len(errors)}
    assert [(item.frame, item.error) for item in VideoSource(path).items()] == [
        (item.frame, item.error) for item in items
    ]


@pytest.mark.parametrize("settings", [{"stride": 1000}, {"fps": 0.001}])
def test_a_video_that_breaks_off_says_so_whatever_frames_are_kept(
    settings: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    render(path, range(FRAMES))
    source = VideoSource(path, **settings)
    opened = source._opened

    class Breaking:
        def __enter__(self) -> object:
            self._container = opened()
            return self

        def __exit__(self, *_: object) -> None:
            self._container.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self._container, name)

        def demux(self, stream: object) -> Iterator[object]:
            yield from islice(self._container.demux(stream), 12)
            raise av.error.InvalidDataError(1, "Invalid data found")

    monkeypatch.setattr(source, "_opened", Breaking)
    first, last = source.items()
    assert (first.frame, first.error) == (0, None)
    assert last.error == "the rest of the video cannot be read: Invalid data found"
    assert source.counts()["frames"] == source.counts()["skipped"] + 2


def segment(path: Path, first: int, step: int, form: str, options: dict[str, str] | None = None) -> None:
    """Two seconds that begin elsewhere than at 0, of a frame every ``step`` ms, as a recorder cuts them."""
    with av.open(str(path), "w", format=form, options=options or {}) as output:
        stream = output.add_stream("libx264", rate=round(1000 / step) or 1, options={"tune": "zerolatency"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = first + step * number, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


@pytest.mark.parametrize(
    ("form", "options", "step"),
    [
        ("matroska", {}, 100),
        ("matroska", {}, 30_000),  # a time lapse: what the last frame lasts is more than a second
        ("mpegts", {}, 100),
        ("mp4", {}, 100),
        ("mp4", {"movflags": "frag_keyframe+empty_moov"}, 100),
    ],
)
def test_a_segment_that_begins_late_is_whole(form: str, options: dict[str, str], step: int, tmp_path: Path) -> None:
    segment(tmp_path / "a.vid", 60_000, step, form, options)
    items = list(VideoSource(tmp_path / "a.vid").items())
    assert [item.error for item in items] == [None] * 20
    assert [item.timestamp for item in items] == pytest.approx([step * number / 1000 for number in range(20)])


def test_an_interlaced_video_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    render(path, range(FRAMES), interlaced=True)
    source = VideoSource(path)
    items = list(source.items())
    assert items[0].payload.frame.interlaced_frame
    assert shown(items) == list(range(FRAMES))
    assert source.counts()["damaged"] == 0


def test_closing_ends_a_video(tmp_path: Path) -> None:
    render(tmp_path / "a.mp4", range(FRAMES))
    source = VideoSource(tmp_path / "a.mp4")
    items = source.items()
    next(items)
    source.close()
    assert list(items) == []


def sound(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))


def test_what_is_no_video_is_refused_in_one_line(tmp_path: Path) -> None:
    text, wav, empty = tmp_path / "a.mp4", tmp_path / "a.wav", tmp_path / "empty.mp4"
    text.write_text("no video\n" * 100)
    empty.write_bytes(b"")
    sound(wav)
    for path, words in ((text, "Invalid data"), (empty, "Invalid data"), (wav, "no video stream")):
        source = VideoSource(path)
        (item,) = source.items()
        assert words in item.error
        assert str(path) in item.error
        assert "\n" not in item.error
        assert (source.total, source.counts()) == (1, {"frames": 1, "skipped": 0, "damaged": 1})
    with pytest.raises(UsageError, match=r"no video file .*none\.mp4"):
        VideoSource(tmp_path / "none.mp4")


def test_a_video_that_goes_away_is_a_row(tmp_path: Path) -> None:
    render(tmp_path / "a.mp4", range(FRAMES))
    source = VideoSource(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").unlink()
    assert ["No such file" in item.error for item in source.items()] == [True]


def test_unreadable_videos_among_good_ones_are_rows(tmp_path: Path) -> None:
    good, cut, empty, other = (tmp_path / name for name in ("a.mp4", "cut.mp4", "empty.mkv", "b.mp4"))
    render(good, range(4))
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])  # without its index
    empty.write_bytes(b"")
    render(other, range(3))
    summary, rows = run(cut, good, empty, other, output=tmp_path / "rows.jsonl", max_errors=2)
    assert (summary.inputs, summary.errors) == (9, 2)
    assert [(Path(row.source).name, row.frame, row.error is None) for row in rows] == [
        ("cut.mp4", 0, False),
        *(("a.mp4", number, True) for number in range(4)),
        ("empty.mkv", 0, False),
        *(("b.mp4", number, True) for number in range(3)),
    ]
    with pytest.raises(DataError, match=r"2 of .* inputs have errors, more than the 1"):
        run(cut, good, empty, other, output=tmp_path / "few.jsonl", max_errors=1)


@pytest.mark.parametrize("settings", [{"stride": 0}, {"fps": 0}, {"fps": float("nan")}])
def test_settings_out_of_range_are_refused(settings: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must be (at least 1|a positive number)"):
        VideoSource(tmp_path / "a.mp4", **settings)


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"prompttune\[stream\]"):
        VideoSource(tmp_path / "a.mp4")


def test_every_tick_has_its_frame() -> None:
    selection = Selection(fps=100)
    assert all(selection.takes(number, number / 100) for number in range(1000))  # 0.29 * 100 is less than 29


def test_a_clock_that_starts_again_starts_the_ticks_again() -> None:
    selection = Selection(fps=1)
    taken = [selection.takes(number, seconds) for number, seconds in enumerate([0.0, 0.5, 1.0, 50.0, 0.0, 0.5, 1.0])]
    assert taken == [True, False, True, True, True, False, True]


def test_videos_by_name() -> None:
    settings = SourceSettings()
    assert VideoSource.takes("a.MP4", settings)
    assert not VideoSource.takes("a.jpg", settings)
