"""Answers drawn into pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from prompttune.fonts import JOINERS, Face
from prompttune.serve.infer.rows import Row

INK = (255, 255, 255)
ERROR_INK = (255, 150, 140)
"""Text colour of errors: bright on the dark panel."""
SMALLEST_TEXT = 11
"""Smallest readable height of letters, in pixels."""
_TEXTS_IN_HEIGHT = 24
_LONGEST_TEXT = 1000
"""Number of letters of a text to consider; a line cannot hold more."""
_PANEL = (0, 0, 0)
_PANEL_OPACITY = 0.75
_LONGEST_TASK = 0.4
"""Largest share of a line for a task's name, so that the label has room."""


def shortened(text: str, face: Face, width: float) -> str:
    """The text on one line, cut with … if it is wider than ``width`` pixels; ``""`` if nothing fits."""
    letters = (letter if letter.isprintable() or letter in JOINERS else " " for letter in text[:_LONGEST_TEXT])
    text = " ".join("".join(letters).split())
    if face.getlength(text) <= width:
        return text
    fits, beyond = 0, len(text)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if face.getlength(text[:middle].rstrip() + "…") <= width:
            fits = middle
        else:
            beyond = middle
    cut = text[:fits].rstrip() + "…"
    return cut if face.getlength(cut) <= width else ""


def caption(row: Row, face: Face, width: float) -> str:
    """A row on one line of ``width`` pixels: task, label and probability, or task and error.

    A label that is too long is shortened, so that the probability stays.
    """
    before = f"{shortened(row.task, face, width * _LONGEST_TASK)}: "
    after = "" if row.probability is None else f" {100 * row.probability:.1f} %"
    text = row.error if row.label is None else row.label
    room = width - face.getlength(before) - face.getlength(after)
    label = shortened(text or "", face, room)
    return f"{before}{label}{after}" if label else shortened(f"{text or ''}{after}", face, width)


def annotate(picture: Image.Image, rows: Sequence[Row], *, size: int | None = None) -> Image.Image:
    """A copy of a picture with a line for each row, on a dark panel in its upper left corner.

    The last line counts the rows that do not fit.

    Args:
        picture: RGB picture of any size; below some 60 pixels the text is hardly readable.
        rows: answers for the picture.
        size: height of the letters in pixels; None derives it from the picture's height.
    """
    drawn = picture.copy()
    size = size or max(SMALLEST_TEXT, min(drawn.size) // _TEXTS_IN_HEIGHT)
    face = Face(size)
    margin, step = size // 2, size * 5 // 4
    width = drawn.width - 2 * margin
    fitting = max(1, (drawn.height - margin) // step)
    shown = list(rows if len(rows) <= fitting else rows[: fitting - 1])
    lines = [(caption(row, face, width), INK if row.error is None else ERROR_INK) for row in shown]
    if len(shown) < len(rows):
        lines.append((shortened(f"+ {len(rows) - len(shown)} more", face, width), INK))
    if not lines:
        return drawn
    widest = max(face.getlength(line) for line, _ in lines)
    box = (0, 0, min(drawn.width, int(widest) + 2 * margin + 1), min(drawn.height, len(lines) * step + margin))
    ground = drawn.crop(box)
    drawn.paste(Image.blend(ground, Image.new("RGB", ground.size, _PANEL), _PANEL_OPACITY), box)
    draw = ImageDraw.Draw(drawn)
    for number, (line, ink) in enumerate(lines):
        face.draw(draw, (margin, margin // 2 + number * step), line, ink)
    return drawn


def contained(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture scaled to fit ``width`` x ``height`` pixels, its aspect ratio kept; a smaller one is unchanged."""
    scale = min(width / picture.width, height / picture.height)
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def centred(picture: Image.Image, width: int, height: int, ground: tuple[int, int, int]) -> Image.Image:
    """The picture centred on a ground of ``width`` x ``height`` pixels in the colour ``ground``."""
    canvas = Image.new("RGB", (width, height), ground)
    canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return canvas
