"""A folder of overlays: each picture with its classes in colours, its mask, and a legend per task."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from prompttune.files import replacing, visible, write_text
from prompttune.fonts import Face
from prompttune.images.masks import IGNORE_INDEX
from prompttune.serve.infer.rows import InputAnswer, Row
from prompttune.serve.infer.sinks.base import FOLDER, Sink, SinkSettings
from prompttune.serve.infer.sinks.drawing import shortened
from prompttune.serve.masks import Mask, mask_of_image, palette

MARK = "prompttune overlay"
"""Marker in the metadata of every picture, which tells overlays from other pictures."""
OPACITY = 0.5
"""Opacity of the colours over the picture."""
_TEXT, _STEP, _MARGIN, _SWATCH, _WIDTH = 14, 22, 8, 16, 280
_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_LEGENDS = re.compile(r"legend-.+\.json")
_LONGEST_NAME = 80


def is_overlay(file: Path) -> bool:
    """Whether an earlier run wrote the file."""
    if _LEGENDS.fullmatch(file.name):
        return True
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == MARK
    except OSError:
        return False


def overlaid(picture: Image.Image, mask: Mask, classes: int) -> Image.Image:
    """A copy of an RGB picture with its mask's colours over it; pixels without a class are unchanged.

    Args:
        picture: RGB picture of any size.
        mask: class index of each of its pixels, [height, width].
        classes: number of the task's classes.
    """
    pixels = np.asarray(picture, dtype=np.float32)
    known = mask != IGNORE_INDEX
    blended = pixels.copy()
    blended[known] = (1 - OPACITY) * pixels[known] + OPACITY * palette(classes)[mask[known]]
    return Image.fromarray(blended.round().astype(np.uint8))


def indexed_picture(mask: Mask, classes: int) -> Image.Image:
    """A mask as a picture whose pixels are class indices, with a palette so that viewers show its colours."""
    picture = Image.fromarray(mask).convert("P")
    picture.putdata(mask.ravel().tolist())
    colours = np.zeros((IGNORE_INDEX + 1, 3), dtype=np.uint8)
    colours[:classes] = palette(classes)
    picture.putpalette(colours.ravel().tolist())
    return picture


def legend(labels: tuple[str, ...]) -> Image.Image:
    """The colours and names of the classes, one below the other."""
    picture = Image.new("RGB", (_WIDTH, 2 * _MARGIN + _STEP * len(labels)), _PAPER)
    draw, face = ImageDraw.Draw(picture), Face(_TEXT)
    for index, (label, colour) in enumerate(zip(labels, palette(len(labels)).tolist(), strict=True)):
        top, right = _MARGIN + _STEP * index, _MARGIN + _SWATCH
        draw.rectangle((_MARGIN, top, right, top + _SWATCH), fill=tuple(colour))
        text = shortened(f"{index} {label}", face, _WIDTH - right - 2 * _MARGIN)
        face.draw(draw, (right + _MARGIN, top), text, _INK)
    return picture


class OverlayFolder(Sink):
    """Writes ``000017-street.png`` and ``000017-street.mask.png`` for input 17; with several tasks, names include the
    task.

    Both have the picture's size. An input without an answer keeps its number but has no file. ``legend-TASK.png`` and
    ``legend-TASK.json`` list the colour and the index of each class. Each file is on the disk once it is written.
    """

    content = "overlays and masks"
    suffixes = (FOLDER,)
    writes: ClassVar = ("segment",)
    picture_side = 0

    def __init__(self, path: Path, settings: SinkSettings) -> None:
        self._path = path
        self._tasks = settings.tasks
        self._inputs = 0
        path.mkdir(parents=True, exist_ok=True)
        for name, facts in self._tasks.items():
            colours = palette(len(facts.labels)).tolist()
            values = [
                {"index": index, "label": label, "colour": colour}
                for index, (label, colour) in enumerate(zip(facts.labels, colours, strict=True))
            ]
            write_text(path / f"legend-{name}.json", json.dumps(values, ensure_ascii=False, indent=1) + "\n")
            self._save(legend(facts.labels), f"legend-{name}.png")

    def write(self, answer: InputAnswer) -> None:
        """Write the pictures of one input; those of an input without a picture are already there."""
        for row in answer.rows:
            if row.mask is not None and answer.picture is not None:
                self._write(row, row.mask, answer.picture)
        self._inputs += 1

    def _write(self, row: Row, seen: Mask, picture: Image.Image) -> None:
        facts = self._tasks[row.task]
        mask = mask_of_image(seen, facts.preprocess, picture.width, picture.height)
        name, classes = self._name(row), len(facts.labels)
        self._save(overlaid(picture, mask, classes), f"{name}.png")
        self._save(indexed_picture(mask, classes), f"{name}.mask.png")

    def _name(self, row: Row) -> str:
        stem = re.sub(r"[^\w.-]", "_", PurePath(row.source).stem)[:_LONGEST_NAME] or "input"
        frame = "" if row.frame is None else f"-frame{row.frame}"
        task = f".{row.task}" if len(self._tasks) > 1 else ""
        return f"{self._inputs:06}-{stem}{frame}{task}"

    def _save(self, picture: Image.Image, name: str) -> None:
        mark = PngInfo()
        mark.add_text("Software", MARK)
        with replacing(self._path / name) as temporary:
            picture.save(temporary, format="PNG", pnginfo=mark)

    @classmethod
    def foreign_file(cls, path: Path) -> Path | None:
        """A file in the folder that prompttune did not write."""
        return next((file for file in sorted(Path(one.path) for one in visible(path)) if not is_overlay(file)), None)

    @classmethod
    def clear(cls, path: Path) -> None:
        """Remove the files of an earlier run."""
        for file in sorted(path.iterdir()) if path.is_dir() else ():
            if is_overlay(file):
                file.unlink()
