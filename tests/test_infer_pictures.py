"""Answers in pictures: drawn over them, and on contact sheets."""

import json
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw

from prompttune.errors import DataError
from prompttune.fonts import Face
from prompttune.serve.infer.rows import Answer, Row
from prompttune.serve.infer.sinks.drawing import annotate, caption, contained, shortened, wrapped
from prompttune.serve.infer.sinks.sheet import ContactSheet, clear, is_page, page_file, pages
from tests.sink_helpers import STEPS, answer, contents, crash_at, full_disk, run

GOOD = Row("a.png", "birds", "v", label="owl", probability=0.5)
BAD = Row("a.png", "cats", None, error="unknown task 'cats'")
FACE = Face(12)


def plain(colour="white", size=(320, 240)):
    return Image.new("RGB", size, colour)


def changed(before, after):
    """Where two pictures differ: left, upper, right, lower."""
    return ImageChops.difference(before, after).getbbox()


# Overlays


@pytest.mark.parametrize("colour", ["black", "white", "#777", "red"])
def test_an_overlay_can_be_read_on_any_ground(colour):
    picture = plain(colour)
    drawn = annotate(picture, [GOOD])
    _, _, right, lower = changed(picture, drawn)
    grey = np.asarray(drawn.convert("L"))[:lower, :right]
    assert int(grey.max()) - int(grey.min()) > 150
    assert lower < 60
    assert changed(picture, plain(colour)) is None  # the picture itself stays


def test_each_task_has_a_line_and_errors_another_colour():
    two, three = annotate(plain(), [GOOD, GOOD]), annotate(plain(), [GOOD, GOOD, BAD])
    assert changed(plain(), three)[3] > changed(plain(), two)[3]
    pixels = np.asarray(three).astype(int)
    assert ((pixels[..., 0] - pixels[..., 1]) > 60).any()
    pixels = np.asarray(two).astype(int)
    assert (pixels[..., 0] == pixels[..., 1]).all()


def test_more_rows_than_there_is_room_for_are_counted():
    few, many = annotate(plain(size=(200, 40)), [GOOD] * 50), annotate(plain(size=(200, 40)), [GOOD] * 60)
    assert changed(few, many) is not None


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (64, 48)])
@pytest.mark.parametrize("rows", [[], [GOOD], [BAD] * 9])
def test_no_size_is_too_small(size, rows):
    assert annotate(plain(size=size), rows).size == size


def test_other_scripts_are_not_boxes():
    def drawn(letter):
        image = plain(size=(20, 20))
        FACE.draw(ImageDraw.Draw(image), (0, 0), letter, (0, 0, 0))
        return image.tobytes()

    assert not {drawn(letter) for letter in "éßΩЖع"} & {drawn("\U0010fffe"), drawn(" ")}


@given(text=st.text(max_size=60), width=st.integers(0, 200))
def test_a_shortened_text_fits_and_says_so(text, width):
    short = shortened(text, FACE, width)
    assert not short or FACE.getlength(short) <= width
    assert "\n" not in short
    whole = shortened(text, FACE, 10_000)
    assert short in ("", whole) or (short.endswith("…") and whole.startswith(short[:-1]))


def test_a_long_label_keeps_its_probability():
    row = Row("a", "t" * 99, "v", label="l" * 99, probability=0.987)
    line = caption(row, FACE, 200)
    assert FACE.getlength(line) <= 200
    assert line.endswith("… 98.7 %")
    assert line.startswith("ttt")
    assert caption(GOOD, FACE, 200, named=False) == "owl 50.0 %"
    assert caption(BAD, FACE, 300) == "cats: unknown task 'cats'"


def test_text_is_wrapped_between_words():
    text = "cannot identify this picture since it is damaged somewhere"
    lines = wrapped(text, FACE, 120, 9)
    assert " ".join(lines) == text
    assert len(lines) > 2
    assert all(FACE.getlength(line) <= 120 for line in lines)
    cut = wrapped(text, FACE, 120, 2)
    assert cut[0] == lines[0]
    assert cut[1].endswith("…")
    assert wrapped("", FACE, 100, 3) == []


def test_pictures_are_made_smaller_never_larger():
    assert contained(plain(size=(400, 100)), 100, 100).size == (100, 25)
    assert contained(plain(size=(1, 5000)), 100, 100).size == (1, 100)
    assert contained(plain(size=(10, 20)), 100, 100).size == (10, 20)


# Contact sheets

COLOURS = ["#e33", "#3e3", "#33e", "#ee3"]
ANSWERS = [answer(number, picture=plain(COLOURS[number % 4], (30, 20 + number))) for number in range(11)]


def sheet(path, state, **options):
    return ContactSheet(path, state, **{"columns": 2, "rows_per_page": 2, "side": 40, **options})


def test_pages_hold_the_pictures_in_order(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    run(lambda state: sheet(path, state), ANSWERS)
    assert [page.name for page in pages(path)] == ["sheet-002.png", "sheet-003.png", "sheet.png"]
    assert set(contents(path.parent)) == {"sheet.png", "sheet-002.png", "sheet-003.png"}
    with Image.open(path) as page, Image.open(page_file(path, 2)) as last:
        width, height = page.width // 2, page.height // 2
        middle = (width // 2, 6 + 20)
        found = [page.getpixel((middle[0] + x * width, middle[1] + y * height)) for y in range(2) for x in range(2)]
        assert found == [(238, 51, 51), (51, 238, 51), (51, 51, 238), (238, 238, 51)]
        assert (last.width, last.height) == (page.width, page.height)  # three left: two rows
    with Image.open(page_file(path, 1)) as page:
        field = np.asarray(page)[6:46, 6:46].astype(int)  # the fifth could not be read
    assert (abs(field[..., 0] - field[..., 1]) > 60).any()  # the reason, in red
    assert field[20, 20, 0] < 220  # the cross


def test_a_last_page_is_as_large_as_it_must_be(tmp_path):
    run(lambda state: sheet(tmp_path / "one.png", state), ANSWERS[:1])
    run(lambda state: sheet(tmp_path / "four.png", state), ANSWERS[:4])
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "four.png") as four:
        assert (2 * one.width, 2 * one.height) == four.size


def test_a_sheet_of_nothing_is_no_file(tmp_path):
    run(lambda state: sheet(tmp_path / "sheet.png", state), [])
    assert contents(tmp_path) == {}


def test_pictures_of_several_tasks(tmp_path):
    row = (GOOD, BAD, GOOD)
    one, two, three = (tmp_path / f"{number}.png" for number in (1, 2, 3))
    for number, path in ((1, one), (2, two), (3, three)):
        run(lambda state, path=path: sheet(path, state, side=120), [Answer(row[:number], plain())])
    files = {path.read_bytes() for path in (one, two, three)}
    assert len(files) == 3


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@settings(max_examples=30)
@given(steps=STEPS)
def test_crashes_leave_no_trace_on_a_sheet(tmp_path_factory, suffix, steps):
    folder = tmp_path_factory.mktemp("sheets")
    for name, taken in (("whole", ()), ("broken", steps)):
        (folder / name).mkdir()
        run(lambda state, name=name: sheet(folder / name / f"s.{suffix}", state), ANSWERS, taken)
    assert contents(folder / "broken") == contents(folder / "whole")
    assert all(is_page(page) for page in pages(folder / "broken" / f"s.{suffix}"))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_crash_at_any_call_leaves_no_trace_on_a_sheet(tmp_path, suffix):
    whole = tmp_path / "whole" / f"s.{suffix}"
    run(lambda state: sheet(whole, state), ANSWERS)
    for number in count():
        path = tmp_path / str(number) / f"s.{suffix}"
        path.parent.mkdir()
        state, written = None, 0
        with crash_at(number) as done:
            sink = sheet(path, None)
            for index, one in enumerate(ANSWERS, 1):
                sink.write(one)
                if index in (2, 3, 10):
                    state, written = json.loads(json.dumps(sink.commit())), index
            sink.finish()
        if len(done) < number:
            break
        if state is None:
            clear(path)
        sink = sheet(path, state)
        for one in ANSWERS[written:]:
            sink.write(one)
        sink.finish()
        sink.close()
        assert contents(path.parent) == contents(whole.parent), number
    assert number > 10


def test_a_commit_that_was_never_recorded_takes_nothing_away(tmp_path):
    path, whole = tmp_path / "s.jpg", tmp_path / "whole" / "s.jpg"
    run(lambda state: sheet(whole, state), ANSWERS)
    sink = sheet(path, None)
    for one in ANSWERS[:3]:
        sink.write(one)
    recorded = sink.commit()
    for one in ANSWERS[3:10]:
        sink.write(one)
    assert sink.commit()["pages"] == 2
    run(lambda _: sheet(path, recorded), ANSWERS[3:])
    assert {page.name: page.read_bytes() for page in pages(path)} == contents(whole.parent)


def test_a_crash_while_going_on_leaves_no_trace_on_a_sheet(tmp_path):
    whole = tmp_path / "whole" / "s.png"
    run(lambda state: sheet(whole, state), ANSWERS)
    for number in count():
        path = tmp_path / str(number) / "s.png"
        sink = sheet(path, None)
        for one in ANSWERS[:2]:
            sink.write(one)
        state = sink.commit()
        for one in ANSWERS[2:]:
            sink.write(one)
        sink.finish()
        sink.close()  # thumbnails come back out of the page
        with crash_at(number) as done:
            sheet(path, state)
        run(lambda _, path=path, state=state: sheet(path, state), ANSWERS[2:])
        assert contents(path.parent) == contents(whole.parent), number
        if len(done) < number:
            break
    assert number > 4


def test_a_sheet_without_its_pages_is_not_gone_on_with(tmp_path):
    path = tmp_path / "s.jpg"
    sink = sheet(path, None)
    for one in ANSWERS[:6]:
        sink.write(one)
    state = sink.commit()
    kept = tmp_path / ".s.jpg.unfinished" / "00001.png"
    kept.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"^[^\n]* was changed: [^\n]*--overwrite$"):
        sheet(path, state)
    plain(size=(3, 3)).save(kept)
    with pytest.raises(DataError, match="another size"):
        sheet(path, state)
    kept.unlink()
    with pytest.raises(DataError, match=r"^[^\n]* is gone, [^\n]*--overwrite$"):
        sheet(path, state)
    path.unlink()
    with pytest.raises(DataError, match=r"s\.jpg is gone"):
        sheet(path, state)


def test_pages_of_others_stay(tmp_path):
    path = tmp_path / "s.png"
    sink = sheet(path, None)
    state = sink.commit()
    plain().save(page_file(path, 6))
    sheet(path, state)
    assert page_file(path, 6).exists()
    assert not is_page(page_file(path, 6))


def test_a_full_disk_loses_no_thumbnail(tmp_path):
    path, whole = tmp_path / "s.png", tmp_path / "whole.png"
    run(lambda state: sheet(whole, state), ANSWERS)
    sink = sheet(path, None)
    sink.write(ANSWERS[0])
    state = sink.commit()
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        [sink.write(one) for one in ANSWERS[1:4]]
    assert not path.exists()
    sink = sheet(path, state)
    for one in ANSWERS[1:]:
        sink.write(one)
    sink.finish()
    assert path.read_bytes() == whole.read_bytes()
