"""What an explanation wrote, and the figures behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prompttune.explanation import drawing
from prompttune.files import replacing

PAGE_FILE, VALUES_FILE = "explanation.html", "explanation.json"


@dataclass(frozen=True)
class Drawn:
    """One picture."""

    section: str
    """Headline that it stands under."""
    title: str
    file: str
    """Its name in the folder."""
    png: bytes


@dataclass
class Explanation:
    """What was written, and the figures behind it."""

    folder: Path
    pictures: list[Drawn] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """Figures, ready for JSON."""
    corrupt: list[str] = field(default_factory=list)
    """One line for each image that could not be read."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def files(self) -> list[Path]:
        """All files written: the page first."""
        return [self.folder / name for name in (PAGE_FILE, VALUES_FILE, *(one.file for one in self.pictures))]

    def draw(self, section: str, title: str, name: str, figure: Figure) -> None:
        """Add a figure and write its PNG file."""
        file = f"{name}.png"
        png = drawing.compact_png(figure)
        with replacing(self.folder / file) as temporary:
            temporary.write_bytes(png)
        self.pictures.append(Drawn(section, title, file, png))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "output": str(self.folder),
            "files": [str(file) for file in self.files],
            **self.values,
            "corrupt": self.corrupt,
            "notes": self.notes,
        }
