"""Contact sheets: pages of thumbnails with their answers."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from prompttune.errors import DataError
from prompttune.files import replacing
from prompttune.fonts import Face
from prompttune.serve.infer.rows import Answer
from prompttune.serve.infer.sinks.appended import PARTS, Part, Taking, gone, state_number, whole_file
from prompttune.serve.infer.sinks.drawing import caption, centred, contained, shortened, wrapped

MARK = "prompttune contact sheet"
"""Marker in the metadata of every page, which tells pages from other pictures."""
CAPTION_LINES = 3
"""Number of lines below a thumbnail: its name and two answers."""
JPEG_QUALITY = 90
_TEXT, _STEP, _MARGIN = 12, 15, 6
_PAPER, _INK, _ERROR_INK = (255, 255, 255), (20, 20, 20), (170, 20, 20)
_MAT, _CROSS = (225, 225, 225), (190, 190, 190)


def page_file(path: Path, number: int) -> Path:
    """The file of page ``number``, counted from 0: the path itself, then ``sheet-002.png`` and so on."""
    return path if number == 0 else path.with_name(f"{path.stem}-{number + 1:03}{path.suffix}")


def pages(path: Path) -> Iterator[Path]:
    """Existing files with the name of a page."""
    further = re.compile(rf"{re.escape(path.stem)}-\d{{3,}}{re.escape(path.suffix)}")
    if path.parent.is_dir():
        yield from sorted(one for one in path.parent.iterdir() if one == path or further.fullmatch(one.name))


def is_page(file: Path) -> bool:
    """Whether a picture is a page of a contact sheet, by its :data:`MARK`."""
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == MARK or image.info.get("comment") == MARK.encode()
    except OSError:
        return False


def clear(path: Path) -> None:
    """Remove the pages of an earlier sheet and the files that it kept for resuming."""
    for page in list(pages(path)):
        if is_page(page):
            page.unlink()
    _remove_halves(path)
    shutil.rmtree(unfinished_folder(path), ignore_errors=True)


def _remove_halves(path: Path) -> None:
    """Remove unfinished files that a crash left."""
    half = re.compile(rf"\.{re.escape(path.stem)}(-\d{{3,}})?{re.escape(path.suffix)}\.\w{{8}}")
    for file in path.parent.glob(".*"):
        if half.fullmatch(file.name) and file.is_file():
            file.unlink()


def unfinished_folder(path: Path) -> Path:
    """Hidden folder of the incomplete page; it exists until the sink is closed."""
    return path.with_name(f".{path.name}.unfinished")


class ContactSheet:
    """Pages of thumbnails, in the order of the inputs; a page appears when it is full.

    An unreadable input is a crossed grey field with the reason. Each commit keeps the incomplete page without loss, and
    also the one of the commit before; a PNG sheet can also be resumed from the page that replaced it.

    Args:
        path: path of the first page, ``.png``, ``.jpg`` or ``.jpeg``; see :func:`page_file` for the others.
        state: an earlier :meth:`commit` to resume from; None starts anew.
        columns: thumbnails in a row.
        rows_per_page: rows of thumbnails on a page.
        side: side of a thumbnail, in pixels.

    Raises:
        DataError: the pages were changed after that commit.
        OSError: a page cannot be written.
    """

    def __init__(
        self,
        path: Path,
        state: Mapping[str, Any] | None,
        columns: int = 6,
        rows_per_page: int = 5,
        side: int = 160,
    ) -> None:
        self.picture_side: int | None = side
        self._path = path
        self._taking = Taking(path)
        self._columns, self._places, self._side = columns, columns * rows_per_page, side
        self._width, self._height = side + 2 * _MARGIN, side + CAPTION_LINES * _STEP + 2 * _MARGIN
        self._canvas = self._blank(columns, rows_per_page)
        self._pages = self._tiles = 0
        self._committed = (0, 0)
        self._files: list[Part] = []
        self._finished = False
        path.parent.mkdir(parents=True, exist_ok=True)
        if state is not None:
            self._restore(state_number(state, "pages"), state_number(state, "tiles"))

    def _blank(self, columns: int, rows: int) -> Image.Image:
        return Image.new("RGB", (columns * self._width, rows * self._height), _PAPER)

    def _restore(self, number: int, tiles: int) -> None:
        for one in range(number):
            if not page_file(self._path, one).exists():
                raise gone(page_file(self._path, one))
        self._pages, self._tiles = number, tiles
        self._committed = (number, tiles)
        if tiles:
            self._take_up(number, tiles)
            self._keep()
        kept = {page_file(self._path, one) for one in range(number)}
        for page in pages(self._path):
            if page not in kept and is_page(page):
                page.unlink()
        _remove_halves(self._path)

    def _take_up(self, number: int, tiles: int) -> None:
        """Draw the first tiles of an incomplete page on the canvas."""
        kept, page = self._unfinished(number), page_file(self._path, number)
        source = page if not kept.exists() and self._path.suffix.lower() == ".png" else kept
        try:
            with Image.open(source) as image:
                found = image.convert("RGB")
        except FileNotFoundError:
            raise gone(kept) from None
        except OSError as problem:
            raise DataError(f"{source} was changed: {problem}; begin again with --overwrite") from None
        for index in range(tiles):
            box = self._box(index)
            if box[2] > found.width or box[3] > found.height:
                raise DataError(f"{source} was changed: it has another size; begin again with --overwrite")
            self._canvas.paste(found.crop(box), box)

    def _unfinished(self, number: int) -> Path:
        return unfinished_folder(self._path) / f"{number:05}.png"

    def _box(self, index: int) -> tuple[int, int, int, int]:
        left, top = index % self._columns * self._width, index // self._columns * self._height
        return left, top, left + self._width, top + self._height

    def write(self, answer: Answer) -> None:
        """Add a thumbnail."""
        with self._taking:
            self._canvas.paste(self._tile(answer), self._box(self._tiles))
            self._tiles += 1
            if self._tiles == self._places:
                self._save(self._canvas)
                self._pages, self._tiles = self._pages + 1, 0
                self._canvas.paste(_PAPER, (0, 0, *self._canvas.size))

    def _save(self, page: Image.Image) -> None:
        path = page_file(self._path, self._pages)
        with replacing(path) as temporary:
            if path.suffix.lower() == ".png":
                mark = PngInfo()
                mark.add_text("Software", MARK)
                page.save(temporary, format="PNG", pnginfo=mark)
            else:
                page.save(temporary, format="JPEG", quality=JPEG_QUALITY, comment=MARK.encode())
        self._files.append(whole_file(path))

    def _tile(self, answer: Answer) -> Image.Image:
        tile = Image.new("RGB", (self._width, self._height), _PAPER)
        error = next((row.error for row in answer.rows if row.error is not None), None)
        if answer.picture is None:
            field = self._crossed(error or "no picture")
        else:
            field = centred(contained(answer.picture, self._side, self._side), self._side, self._side, _MAT)
        tile.paste(field, (_MARGIN, _MARGIN))
        draw, face = ImageDraw.Draw(tile), Face(_TEXT)
        for number, (line, ink) in enumerate(self._caption(answer)):
            face.draw(draw, (_MARGIN, _MARGIN + self._side + 1 + number * _STEP), line, ink)
        return tile

    def _crossed(self, reason: str) -> Image.Image:
        field = Image.new("RGB", (self._side, self._side), _MAT)
        draw, face, end = ImageDraw.Draw(field), Face(_TEXT), self._side - 1
        draw.line((0, 0, end, end), fill=_CROSS, width=2)
        draw.line((0, end, end, 0), fill=_CROSS, width=2)
        lines = wrapped(reason, face, self._side - 2 * _MARGIN, max(1, self._side // _STEP - 1))
        for number, line in enumerate(lines):
            face.draw(draw, (_MARGIN, _MARGIN + number * _STEP), line, _ERROR_INK)
        return field

    def _caption(self, answer: Answer) -> list[tuple[str, tuple[int, int, int]]]:
        rows, face = answer.rows, Face(_TEXT)
        if not rows:
            return []
        lines = [(shortened(_name(answer), face, self._side), _INK)]
        if answer.picture is None:
            return lines  # the field already shows the reason
        fitting = CAPTION_LINES - 1
        shown = rows if len(rows) <= fitting else rows[: fitting - 1]
        for row in shown:
            line = caption(row, face, self._side, named=len(rows) > 1)
            lines.append((line, _INK if row.error is None else _ERROR_INK))
        if len(shown) < len(rows):
            lines.append((shortened(f"+ {len(rows) - len(shown)} more tasks", face, self._side), _INK))
        return lines

    def commit(self) -> Mapping[str, Any]:
        """Write the incomplete page to the disk; return the number of ``pages`` and of the ``tiles`` after them.

        Raises:
            DataError: an error occurred in the middle of an input.
        """
        self._taking.check()
        if (self._pages, self._tiles) != self._committed:
            if self._tiles:
                self._keep()
            needed = (self._unfinished(self._pages), self._unfinished(self._committed[0]))
            for file in unfinished_folder(self._path).glob("*.png"):
                if file not in needed:
                    file.unlink()
            self._committed = (self._pages, self._tiles)
        files, self._files = self._files, []
        return {"pages": self._pages, "tiles": self._tiles, PARTS: files}

    def _keep(self) -> None:
        with replacing(self._unfinished(self._pages)) as temporary:
            self._canvas.save(temporary, format="PNG", compress_level=1)

    def finish(self) -> None:
        """Write the last page, cropped to its thumbnails."""
        self._taking.check()
        if self._tiles:
            used = self._blank(min(self._tiles, self._columns), math.ceil(self._tiles / self._columns))
            used.paste(self._canvas)
            self._save(used)
            self._pages, self._tiles = self._pages + 1, 0
        self._finished = True

    def close(self) -> None:
        """After :meth:`finish`, remove the files kept for resuming; otherwise keep them."""
        if self._finished:
            shutil.rmtree(unfinished_folder(self._path), ignore_errors=True)


def _name(answer: Answer) -> str:
    row = answer.rows[0]
    number = row.frame if row.frame is not None else row.row
    name = PurePath(row.source).name or row.source
    return name if number is None else f"{name} #{number}"
