"""Texts of every script in pictures: found in the fonts that are installed, told once where none has them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw, ImageFont

from prompttune import fonts
from prompttune.evaluation.plots import draw_confusion, png_bytes
from prompttune.explanation.drawing import compact_png, values_figure
from prompttune.serve.infer.rows import Row
from prompttune.serve.infer.sinks.drawing import annotate, shortened
from prompttune.serve.infer.sinks.overlays import legend
from tests.inferring import picture

CAT, DOG = "猫", "犬"
CACHES = (fonts._font_of, fonts._installed, fonts._letters, fonts._family)


def block_font(path: Path, letters: str) -> str:
    """A font whose letters are solid squares."""
    pen = TTGlyphPen(None)
    for number, corner in enumerate([(100, -100), (100, 800), (900, 800), (900, -100)]):
        (pen.lineTo if number else pen.moveTo)(corner)
    pen.closePath()
    names = [f"uni{ord(letter):04X}" for letter in letters]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names, strict=True)})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), **dict.fromkeys(names, pen.glyph())})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (1000, 0)))
    builder.setupHorizontalHeader(ascent=880, descent=-120)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Says which font files a machine has."""

    def install(*paths: str) -> None:
        monkeypatch.setattr(fonts, "findSystemFonts", lambda: list(paths))
        for cache in CACHES:
            cache.cache_clear()
        fonts._told.clear()

    yield install
    for cache in CACHES:
        cache.cache_clear()


def drawn(text: str, size: int = 20) -> np.ndarray:
    image = Image.new("L", (200, 40), 0)
    fonts.Face(size).draw(ImageDraw.Draw(image), (5, 5), text, 255)
    return np.asarray(image)


def test_letters_come_from_the_font_that_has_them(tmp_path: Path, installed) -> None:
    installed(block_font(tmp_path / "Dogs.ttf", DOG), block_font(tmp_path / "Cats-Bold.ttf", CAT + DOG))
    assert [Path(path).stem for path, _ in fonts.runs(f"a {CAT}{DOG}")] == ["DejaVuSans", "Cats-Bold", "Dogs"]
    solid = drawn(CAT) == 255
    assert solid.sum() > 14 * 16
    assert (drawn(f"{CAT} cat") == 255)[:, :30].sum() >= solid.sum()
    assert fonts.Face(20).getlength(CAT + DOG) == pytest.approx(40)
    assert shortened(CAT * 9, fonts.Face(20), 90) == CAT * 3 + "…"


def test_latin_looks_as_it_did() -> None:
    image = Image.new("L", (200, 40), 0)
    ImageDraw.Draw(image).text((5, 5), "Straße, кот, قطة", fill=255, font=ImageFont.truetype(fonts.DEJAVU, 20))
    assert np.array_equal(drawn("Straße, кот, قطة"), np.asarray(image))


def test_marks_stay_with_their_letter(tmp_path: Path, installed) -> None:
    installed(block_font(tmp_path / "Hindi.ttf", "बलि"))
    assert [part for _, part in fonts.runs("a बि\u200dल b")] == ["a ", "बि\u200dल", " b"]


def test_plots_and_pictures_use_them_and_differ_from_boxes(tmp_path: Path, installed, caplog) -> None:
    def pictures() -> list[bytes]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib's of each letter
            return [
                png_bytes(draw_confusion(np.eye(2, dtype=np.int64) * 5, [CAT, DOG])),
                compact_png(values_figure({"share": {CAT: {0: 0.5, 1: 0.7}}})),
                annotate(picture(0), [Row("a.png", "birds", "v", label=CAT, probability=0.5)], size=14).tobytes(),
                legend((CAT, DOG)).tobytes(),
            ]

    with caplog.at_level(logging.WARNING, "prompttune"):
        installed()
        boxes = pictures() + pictures()
        (told,) = caplog.messages
        assert told.startswith(f"no installed font has the letters {CAT}{DOG}: pictures show boxes")
        assert told.endswith("apt install fonts-noto-cjk")
        caplog.clear()
        installed(block_font(tmp_path / "Block.ttf", CAT + DOG))
        assert all(one != other for one, other in zip(pictures(), boxes, strict=False))
        assert not caplog.messages


@pytest.mark.parametrize(
    ("letter", "package"), [("ก", "fonts-noto-core"), ("한", "fonts-noto-cjk"), ("🫠", "fonts-symbola")]
)
def test_the_warning_names_the_package(installed, caplog, letter: str, package: str) -> None:
    installed()
    with caplog.at_level(logging.WARNING, "prompttune"):
        drawn(letter)
    assert caplog.messages[0].endswith(f"apt install {package}")


def test_damaged_fonts_and_fonts_of_boxes_are_passed_over(tmp_path: Path, installed) -> None:
    (tmp_path / "Broken.ttf").write_bytes(b"no font")
    boxes = block_font(tmp_path / "LastResort.ttf", CAT)
    installed(str(tmp_path / "Broken.ttf"), boxes, str(tmp_path / "gone.ttf"))
    assert fonts.fonts_of(CAT) == {}
