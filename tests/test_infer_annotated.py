"""Annotated videos: a frame for each input at its time, and playable whatever interrupts them."""

import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from prompttune.errors import MissingExtraError
from prompttune.serve.infer.rows import InputAnswer, Row
from prompttune.serve.infer.sinks import SinkSettings, video
from prompttune.serve.infer.sinks.video import CONTAINERS, AnnotatedVideo
from tests.sink_helpers import full_disk

GOOD = Row("a.png", "birds", "v", label="owl", probability=0.5)


def plain(colour, size):
    return Image.new("RGB", size, colour)


def frame_of(number, colour="#2a6", size=(160, 120), timestamp=None, source="v.mp4"):
    row = Row(source, "birds", "v", frame=number, timestamp=timestamp, label="owl", probability=0.5)
    return InputAnswer((row,), None if colour is None else plain(colour, size))


def error_of(number, timestamp=None):
    return InputAnswer((Row("v.mp4", "birds", "v", frame=number, timestamp=timestamp, error="damaged"),))


def record(path, answers, rate=None):
    sink = AnnotatedVideo(path, SinkSettings(rate=rate))
    for one in answers:
        sink.write(one)
    sink.finish()
    sink.close()
    return frames(path)


def frames(path):
    """Time in seconds and picture of each frame."""
    with av.open(str(path)) as container:
        return [(round(float(one.time), 3), one.to_image()) for one in container.decode(video=0)]


def near(picture, place, colour):
    return max(abs(np.array(picture.getpixel(place)) - np.array(colour))) < 12


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_a_video_has_a_frame_for_each_answer(tmp_path, suffix):
    path = tmp_path / "new" / f"out{suffix}"
    colours = [(200, 30, 60), (20, 90, 200), (240, 240, 240)]
    found = record(path, [frame_of(index, colours[index % 3]) for index in range(30)], rate=10)
    assert len(found) == 30
    for index, (_, picture) in enumerate(found):
        assert picture.size == (160, 120)
        assert near(picture, (80, 100), colours[index % 3])
        assert not near(picture, (1, 3), colours[index % 3])  # the overlay's panel
    assert AnnotatedVideo.foreign_file(path) is None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == ("vp9" if suffix == ".webm" else "h264")
        assert stream.codec_context.pix_fmt == "yuv420p"


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize("start", [0.0, 1.7e9])
def test_frames_stand_where_their_timestamps_say(tmp_path, suffix, start):
    times = [0, 0.04, 0.2, 0.36, 5.0]
    found = record(tmp_path / f"out{suffix}", [frame_of(n, timestamp=start + time) for n, time in enumerate(times)])
    assert [time for time, _ in found] == pytest.approx(times, abs=0.0011)


def test_without_timestamps_the_rate_tells(tmp_path):
    path = tmp_path / "out.mp4"
    assert [time for time, _ in record(path, [frame_of(n) for n in range(3)])] == [0, 0.04, 0.08]
    assert [time for time, _ in record(path, [frame_of(n) for n in range(3)], Fraction(1, 2))] == [0, 2, 4]
    assert [time for time, _ in record(path, [frame_of(n) for n in range(3)], 30000 / 1001)] == [0, 0.033, 0.067]


def test_times_that_go_back_or_stand_still_go_on(tmp_path):
    sources = [("a", 3.0), ("a", 3.5), ("b", 0.0), ("b", 0.5), ("b", 0.5), ("b", 0.2), ("b", 0.4)]
    answers = [frame_of(0, timestamp=time, source=source) for source, time in sources]
    times = [time for time, _ in record(tmp_path / "out.mkv", answers, rate=10)]
    assert times == pytest.approx([0, 0.5, 0.6, 1.1, 1.101, 1.2, 1.4], abs=0.0004)


def test_an_error_repeats_the_picture_before_it(tmp_path):
    answers = [frame_of(0, (20, 90, 200)), error_of(1), frame_of(2, (200, 30, 60))]
    found = [picture for _, picture in record(tmp_path / "out.mp4", answers)]
    assert near(found[1], (80, 100), (20, 90, 200))
    panel = np.asarray(found[1])[:16, :100].astype(int)
    assert ((panel[..., 0] - panel[..., 1]) > 50).any()  # the error's colour
    assert near(found[2], (80, 100), (200, 30, 60))


def test_the_first_picture_gives_the_size(tmp_path):
    sizes = [(161, 121), (400, 50), (9, 9)]
    answers = [error_of(0), *(frame_of(number, "white", size) for number, size in enumerate(sizes, 1))]
    found = [picture for _, picture in record(tmp_path / "out.mp4", answers)]
    assert [picture.size for picture in found] == [(162, 122)] * 4
    assert near(found[0], (80, 100), (0, 0, 0))
    assert near(found[1], (80, 100), (255, 255, 255))
    assert near(found[2], (80, 100), (0, 0, 0))  # 162 x 20 in the middle
    assert near(found[2], (150, 61), (255, 255, 255))
    assert near(found[3], (81, 61), (255, 255, 255))
    assert near(found[3], (81, 90), (0, 0, 0))


def test_errors_alone_are_a_video_too(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "HELD_BACK", 4)
    for number in (2, 9):
        found = record(tmp_path / f"{number}.mp4", [error_of(n) for n in range(number)])
        assert [picture.size for _, picture in found] == [video.SIZE_WITHOUT_PICTURES] * number


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_what_a_crash_leaves_can_be_played(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    sink = AnnotatedVideo(path, SinkSettings())
    for number in range(200):  # eight seconds
        sink.write(frame_of(number, (number, 90, 200)))
    sink.flush()
    left = tmp_path / f"left{suffix}"
    left.write_bytes(path.read_bytes())
    sink.close()
    found = frames(left)
    assert 150 <= len(found) <= 200
    assert near(found[100][1], (80, 100), (100, 90, 200))
    assert AnnotatedVideo.foreign_file(left) is None
    assert len(frames(path)) == 200  # closing gave it an end


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_a_full_disk_is_the_systems_error(tmp_path, suffix):
    sink = AnnotatedVideo(tmp_path / f"out{suffix}", SinkSettings())
    noise = Image.effect_noise((160, 120), 90).convert("RGB")
    with full_disk(2000):
        with pytest.raises(OSError, match="File too large"):
            [sink.write(InputAnswer((GOOD,), noise)) for _ in range(60)]
        for after in (sink.flush, sink.finish):
            with pytest.raises(OSError, match="File too large"):
                after()
        sink.close()
    sink.close()


def test_without_pyav_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'prompttune\[stream\]'"):
        AnnotatedVideo(tmp_path / "out.mp4", SinkSettings())
    assert not (tmp_path / "out.mp4").exists()
