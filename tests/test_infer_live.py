"""The queue between a reader and the pipeline, and live streams that break off."""

from __future__ import annotations

import functools
import http.server
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.sources.live import LiveSource, backoff, is_stream, masked
from prompttune.serve.infer.sources.waiting import BoundedQueue, Unbounded
from tests.videos import PATIENCE_S, Pulled, broken_stream, clip, number_in, render


def at_once(attempt: int) -> float:
    return 0.0


def shown(items: Sequence[Item]) -> list[int]:
    return [number_in(item.payload.open()) for item in items]


# --- the queue


@given(st.integers(1, 4), st.lists(st.one_of(st.just("put"), st.integers(1, 5)), max_size=60), st.booleans())
def test_the_newest_items_stay_in_order_and_all_are_counted(size: int, steps: list[str | int], drain: bool) -> None:
    waiting: BoundedQueue[int] = BoundedQueue(size, "oldest")
    model: list[int] = []
    put = taken = 0
    for step in steps:
        if step == "put":
            dropped = waiting.put(put)
            assert dropped == (len(model) == size)
            model = [*model, put][-size:]
            put += 1
        elif model:
            assert waiting.take(step) == model[:step]
            taken += len(model[:step])
            model = model[step:]
        assert waiting.received == put == taken + len(model) + waiting.dropped
    if drain:
        waiting.close()
        assert (waiting.take(100) if model else []) == model
        taken += len(model)
    else:
        waiting.discard()
    assert waiting.take(1) == []
    assert waiting.put(put) == 1
    assert waiting.received == put + 1 == taken + waiting.dropped


def test_a_full_queue_holds_its_reader_back_and_loses_nothing() -> None:
    waiting: BoundedQueue[int] = BoundedQueue(2, "none")
    reader = threading.Thread(target=lambda: ([waiting.put(number) for number in range(500)], waiting.close()))
    reader.start()
    found: list[int] = []
    while chunk := waiting.take(3):
        assert len(chunk) <= 2
        found += chunk
    reader.join(PATIENCE_S)
    assert found == list(range(500))
    assert (waiting.received, waiting.dropped) == (500, 0)


def test_discarding_wakes_a_reader_that_waits_for_room() -> None:
    waiting: BoundedQueue[int] = BoundedQueue(1, "none")
    waiting.put(0)
    reader = Pulled(waiting.put(1) for _ in range(1))
    waiting.discard()
    assert reader.rest() == [1]
    assert (waiting.received, waiting.dropped) == (2, 2)


def test_an_error_comes_after_what_waits() -> None:
    waiting: BoundedQueue[int] = BoundedQueue(4, "none")
    waiting.put(0)
    waiting.fail(DataError("broken"))
    assert waiting.take(4) == [0]
    with pytest.raises(DataError, match="broken"):
        waiting.take(4)


class Counting(Unbounded):
    """Gives numbers; tells when all of them wait."""

    def __init__(self, numbers: int, limit: int | None = None, error: Exception | None = None) -> None:
        super().__init__(numbers or 1, "none", limit)
        self.numbers, self.error, self.ready = numbers, error, threading.Event()

    def _read(self) -> None:
        for number in range(self.numbers):
            self._waiting.put(Item("count", row=number))
        self.ready.set()
        if self.error:
            raise self.error


def test_chunks_are_what_waits() -> None:
    source = Counting(10, limit=9)
    chunks = source.chunks(4)
    first = next(chunks)
    assert 1 <= len(first) <= 4
    assert source.ready.wait(PATIENCE_S)
    second = next(chunks)
    assert len(second) == 4  # all wait: none is waited for, no more than asked for are taken
    rows = [item.row for chunk in (first, second, *chunks) for item in chunk]
    assert rows == list(range(9))
    assert source.counts() == {"dropped": 1}
    assert (source.bounded, source.total) == (False, None)


def test_any_error_of_the_reading_thread_reaches_the_consumer() -> None:
    pulled = Pulled(Counting(1, error=ZeroDivisionError("a bug")).items())
    assert pulled.next().row == 0
    with pytest.raises(ZeroDivisionError):
        pulled.next()


# --- streams


def test_every_frame_of_a_breaking_stream_is_accounted_for(caplog: pytest.LogCaptureFixture) -> None:
    parts = [range(0, 10), range(10, 15), range(15, 27)]
    with broken_stream([clip(part) for part in parts]) as address, caplog.at_level(logging.WARNING, "prompttune.infer"):
        source = LiveSource(address, drop="none", reconnects=2, delay=at_once)
        pulled = Pulled(source.items())
        items = [pulled.next() for _ in range(27)]
        with pytest.raises(DataError, match=r"broke off and did not come back: Connection refused") as caught:
            pulled.next()
    assert "\n" not in str(caught.value)
    assert shown(items) == [item.frame for item in items] == list(range(27))
    assert {item.source for item in items} == {address}
    stamps = [item.timestamp for item in items]
    assert stamps == sorted(stamps)
    assert stamps[0] > 1e9
    assert [item.arrived for item in items] == sorted(item.arrived for item in items)
    # two that brought frames, and two after the server had gone
    assert source.counts() == {"frames": 27, "skipped": 0, "dropped": 0, "reconnects": 4, "damaged": 0}
    assert len(caplog.messages) == 4
    assert caplog.messages[0] == f"{address}: the stream ended; attempt 1 of 2 in 0.0 s"


def test_the_oldest_frames_go_when_nobody_takes_them() -> None:
    with broken_stream([clip(range(20)), b""]) as address:
        read = threading.Event()  # the first connection, to its end
        source = LiveSource(address, buffer=4, stride=2, delay=lambda attempt: read.set() or 0.0)
        items = source.items()
        first = next(items)
        assert read.wait(PATIENCE_S)
        waiting = []
        while not waiting or waiting[-1].frame < 18:
            waiting.append(next(items))
        source.close()
        assert list(items) == []
    assert [item.frame for item in waiting] == [12, 14, 16, 18][-len(waiting) :]
    assert len(waiting) >= 3  # four, or the first was one of them
    assert shown([first, *waiting]) == [item.frame for item in (first, *waiting)]
    counts = source.counts()
    assert counts["frames"] == 20 == 1 + len(waiting) + counts["skipped"] + counts["dropped"]
    assert counts["skipped"] == 10


def test_what_waits_when_it_is_closed_counts_as_dropped() -> None:
    with broken_stream([clip(range(6)), b""]) as address:
        connected = threading.Event()
        source = LiveSource(address, delay=lambda attempt: connected.set() or 0.0)
        items = source.items()
        next(items)
        assert connected.wait(PATIENCE_S)
        source.close()
        assert list(items) == []
    assert source.counts() == {"frames": 6, "skipped": 0, "dropped": 5, "reconnects": 1, "damaged": 0}


def test_closing_does_not_wait_for_a_silent_stream() -> None:
    with broken_stream([b""]) as address:
        source = LiveSource(address, open_timeout_s=10 * PATIENCE_S, read_timeout_s=10 * PATIENCE_S)
        pulled = Pulled(source.items())
        source.close()
        assert pulled.rest() == []


def test_a_silent_stream_counts_as_broken() -> None:
    with broken_stream([b"", b""]) as address:
        source = LiveSource(address, open_timeout_s=0.2, reconnects=0)
        with pytest.raises(DataError, match=r"no frame from tcp://127.0.0.1:\d+: no data within 0.2 s"):
            Pulled(source.items()).next()


def test_without_reconnects_a_stream_ends_where_the_server_ends_it() -> None:
    with broken_stream([clip(range(5))]) as address:
        assert shown(Pulled(LiveSource(address, reconnects=0).items()).rest()) == list(range(5))


def test_a_limit_ends_a_stream() -> None:
    with broken_stream([clip(range(5)), clip(range(5, 9)), b""]) as address:
        source = LiveSource(address, drop="none", limit=7, delay=at_once)
        assert shown(Pulled(source.items()).rest()) == list(range(7))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(PATIENCE_S)


def test_a_video_over_http_ends_at_its_end_and_loses_nothing(web: str, tmp_path: Path) -> None:
    render(tmp_path / "a.mp4", range(30))
    source = LiveSource(f"{web}/a.mp4", buffer=1, drop="oldest", fps=5)
    items = Pulled(source.items()).rest()
    assert shown(items) == [item.frame for item in items] == list(range(0, 30, 2))
    assert [item.timestamp for item in items] == pytest.approx([frame / 10 for frame in range(0, 30, 2)])
    assert source.counts() == {"frames": 30, "skipped": 15, "dropped": 0, "reconnects": 0, "damaged": 0}


def test_a_wrong_address_is_not_tried_again(web: str) -> None:
    for address, words in ((f"{web}/none.mp4", "404"), ("/dev/video987", "No such file")):
        source = LiveSource(address, delay=lambda attempt: pytest.fail("tried again"))
        with pytest.raises(DataError, match=f"no frame from {address}: .*{words}"):
            Pulled(source.items()).next()


def test_secrets_never_show(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    source = LiveSource(f"rtsp://admin:geheim@127.0.0.1:{port}/live?password=geheim", reconnects=1, delay=at_once)
    with caplog.at_level(logging.WARNING, "prompttune.infer"), pytest.raises(DataError) as caught:
        Pulled(source.items()).next()
    shown_name = f"rtsp://***@127.0.0.1:{port}/live?password=***"
    assert str(caught.value) == f"no frame from {shown_name}: Connection refused"
    assert caplog.messages == [f"{shown_name}: Connection refused; attempt 1 of 1 in 0.0 s"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("rtsp://u:p@ss@cam/1", "rtsp://***@cam/1"),
        ("http://cam/mjpg?a=1&Token=x&b=2#t", "http://cam/mjpg?a=1&Token=***&b=2#t"),
        ("srt://cam:1?passphrase=x", "srt://cam:1?passphrase=***"),
        ("http://cam/@user", "http://cam/@user"),
        ("/dev/video0", "/dev/video0"),
    ],
)
def test_masking(address: str, expected: str) -> None:
    assert masked(address) == expected


def test_streams_by_name() -> None:
    streams = (
        "rtsp://a",
        "RTSPS://a",
        "rtmp://a",
        "http://a",
        "https://a",
        "udp://@:1",
        "tcp://a:1",
        "srt://a",
        "rtp://a",
    )
    assert all(is_stream(text) for text in (*streams, "/dev/video0", "camera:12"))
    assert not any(
        is_stream(text) for text in ("a.mp4", "/dev/video", "camera:x", "file:///a", "-", "s3://a/b", "/http://a")
    )


@given(st.integers(1, 10_000))
def test_waiting_grows_and_has_an_end(attempt: int) -> None:
    longest = min(30.0, 0.5 * 2.0 ** min(attempt - 1, 10))
    assert longest / 2 <= backoff(attempt) <= longest


@pytest.mark.parametrize(
    "settings", [{"buffer": 0}, {"reconnects": -1}, {"limit": 0}, {"stride": 0}, {"fps": -1.0}, {"read_timeout_s": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"must be|must hold|cannot be"):
        LiveSource("tcp://127.0.0.1:1", **settings)
