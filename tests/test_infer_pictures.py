"""Answers drawn over pictures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw

from prompttune.fonts import Face
from prompttune.serve.infer.rows import Row
from prompttune.serve.infer.sinks.drawing import annotate, caption, contained, shortened

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
    assert caption(BAD, FACE, 300) == "cats: unknown task 'cats'"


def test_pictures_are_made_smaller_never_larger():
    assert contained(plain(size=(400, 100)), 100, 100).size == (100, 25)
    assert contained(plain(size=(1, 5000)), 100, 100).size == (1, 100)
    assert contained(plain(size=(10, 20)), 100, 100).size == (10, 20)
