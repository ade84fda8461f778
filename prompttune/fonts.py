"""Fonts for text in pictures: matplotlib's DejaVu Sans, and installed fonts for other scripts."""

from __future__ import annotations

import contextlib
import functools
import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager, get_font
from matplotlib.text import Text
from PIL import ImageDraw, ImageFont

logger = logging.getLogger("prompttune")

DEJAVU = str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
JOINERS = "\u200c\u200d"
"""Invisible characters that shape their neighbours, for example in Hindi and Persian."""
_STYLES = ("black", "bold", "condensed", "extra", "italic", "light", "medium", "mono", "oblique", "serif", "thin")
_BOXES = ("adobeblank", "lastresort")
"""Fonts that show every letter as a box."""
_told: set[str] = set()
"""Packages that this process has already named in a warning."""


class Face:
    """Text of one size; each letter uses the first font that has it.

    Args:
        size: height of the letters in pixels.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def getlength(self, text: str) -> float:
        """Width of a line, in pixels."""
        return sum(_sized(path, self._size).getlength(part) for path, part in runs(text))

    def draw(self, on: ImageDraw.ImageDraw, place: tuple[float, float], text: str, ink: tuple[int, int, int]) -> None:
        """Draw one line with its upper left corner at ``place``."""
        left, top = place
        ascent = _sized(DEJAVU, self._size).getmetrics()[0]
        for path, part in runs(text):
            font = _sized(path, self._size)
            on.text((left, top + ascent - font.getmetrics()[0]), part, fill=ink, font=font)
            left += font.getlength(part)


def runs(text: str) -> list[tuple[str, str]]:
    """Split a text into pieces of one font: font file and piece."""
    if text.isascii():
        return [(DEJAVU, text)]
    fonts = fonts_of(text)
    found: list[tuple[str, str]] = []
    for letter in text:
        # a combining character stays with the letter before it
        follows = bool(found) and (letter in JOINERS or unicodedata.category(letter).startswith("M"))
        path = found[-1][0] if follows else fonts.get(letter, DEJAVU)
        if found and found[-1][0] == path:
            found[-1] = (path, found[-1][1] + letter)
        else:
            found.append((path, letter))
    return found


def fonts_of(letters: Iterable[str]) -> dict[str, str]:
    """Font file of each letter that DejaVu lacks; letters without a font are left out, with one warning."""
    wanted = dict.fromkeys(letter for letter in letters if not letter.isascii() and _has_picture(letter))
    found = {letter: path for letter in wanted if (path := _font_of(letter)) is not None}
    if missing := [letter for letter in wanted if letter not in found]:
        _warn(missing)
    return {letter: path for letter, path in found.items() if path != DEJAVU}


@contextlib.contextmanager
def readable(figure: Figure) -> Iterator[None]:
    """Set the fonts that a figure's texts need while it is saved."""
    for axes in figure.axes:  # tick labels are empty before the layout
        axes.get_xticklabels(), axes.get_yticklabels()
    texts = [found for found in figure.findobj(Text) if isinstance(found, Text) and not found.get_text().isascii()]
    families = [_family(path) for path in dict.fromkeys(fonts_of("".join(map(Text.get_text, texts))).values())]
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")  # one line has already been logged
        yield


def _has_picture(letter: str) -> bool:
    selector = "\ufe00" <= letter <= "\ufe0f"
    return letter.isprintable() and not selector


@functools.cache
def _font_of(letter: str) -> str | None:
    code = ord(letter)
    if code in _letters(DEJAVU):
        return DEJAVU
    return next((path for path in _installed() if code in _letters(path)), None)


@functools.cache
def _installed() -> list[str]:
    """Installed font files, plain ones first."""
    found = [path for path in findSystemFonts() if not any(name in Path(path).name.lower() for name in _BOXES)]
    return sorted(found, key=lambda path: (sum(style in Path(path).name.lower() for style in _STYLES), path))


@functools.cache
def _letters(path: str) -> frozenset[int]:
    try:
        font = get_font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):  # damaged, or of a kind that matplotlib does not read
        return frozenset()


@functools.cache
def _family(path: str) -> str:
    fontManager.addfont(path)  # matplotlib's own list may be older than the font
    return get_font(path).family_name


@functools.cache
def _sized(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _warn(missing: list[str]) -> None:
    packages = dict.fromkeys(_package(letter) for letter in missing)
    if packages.keys() <= _told:
        return
    _told.update(packages)
    logger.warning(
        "no installed font has the letters %s: pictures show boxes in their place; install a font that has them, "
        "such as apt install %s",
        "".join(missing[:12]) + ("…" if len(missing) > 12 else ""),
        " ".join(packages),
    )


def _package(letter: str) -> str:
    """Debian package of a font that has the letter."""
    script = unicodedata.name(letter, "").partition(" ")[0]
    if script in ("BOPOMOFO", "CJK", "FULLWIDTH", "HALFWIDTH", "HANGUL", "HIRAGANA", "IDEOGRAPHIC", "KATAKANA"):
        return "fonts-noto-cjk"
    return "fonts-symbola" if unicodedata.category(letter).startswith("S") else "fonts-noto-core"
