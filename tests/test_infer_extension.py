"""A source and a data set of another package: one class or function, one registration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompttune.checkpoints.importing.run import LAYOUTS
from prompttune.data import load_data
from prompttune.data.base import Parts
from prompttune.data.builtin import ArraySource
from prompttune.data.registry import DATA_SETS
from prompttune.errors import UsageError
from prompttune.export import FORMATS, RUNTIMES
from prompttune.registry import Registry
from prompttune.serve.infer.items import ArrayPayload, Item
from prompttune.serve.infer.sinks import SINKS
from prompttune.serve.infer.sources.base import Bounded, SourceContext
from prompttune.serve.infer.sources.registry import SOURCES
from tests.inferring import run


class GreySource(Bounded):
    """A text file with a grey level on each line, of which each is an image of one colour."""

    suffixes = (".greys",)

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._levels = path.read_text().split()
        self.total = len(self._levels)

    @classmethod
    def open(cls, name: str, context: SourceContext) -> GreySource:
        return cls(Path(name))

    def _items(self) -> Iterator[Item]:
        for row, level in enumerate(self._levels):
            yield Item(str(self._path), ArrayPayload(np.full((8, 8, 3), int(level), np.uint8)), row)


def load_greys(name: str, root: str | None) -> Parts:
    levels = np.linspace(0, 255, int(name)).astype(np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (len(levels), 8, 8, 3))
    return Parts({"all": ArraySource(images, [int(level > 127) for level in levels], ["dark", "light"], "greys")}, name)


@pytest.mark.parametrize(
    ("registry", "name", "part", "message"),
    [
        (FORMATS, "odd", GreySource, "the format 'odd' must be a subclass of Format, not <class .*GreySource'>"),
        (RUNTIMES, "odd", FORMATS["onnx"], "the runtime 'odd' must be a subclass of Runtime"),
        (RUNTIMES, "odd", "tests.test_infer_extension:load_greys", "the runtime 'odd' must be a subclass of Runtime"),
        (SOURCES, "odd", load_greys, "the input format 'odd' must be a subclass of Source"),
        (SINKS, "odd", GreySource, "the sink 'odd' must be a subclass of Sink"),
        (LAYOUTS, "odd", GreySource, "the layout 'odd' must be an instance of a subclass of Layout"),
        (DATA_SETS, "Odd", load_greys, "registered by a name in lower case and a function, not by 'Odd'"),
    ],
)
def test_what_is_not_of_the_kind_is_refused(
    registry: Registry[Any], name: str, part: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    with pytest.raises(UsageError, match=message):
        registry[registry.add(name, part) or name]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (SOURCES, DATA_SETS):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    SOURCES.add("greys", GreySource)
    DATA_SETS.add("greys", load_greys)


@pytest.mark.usefixtures("registered")
def test_a_source_is_added_by_one_class_and_one_registration(tmp_path: Path) -> None:
    (tmp_path / "a.greys").write_text("0\n128\n255\n")
    summary, rows = run(tmp_path / "a.greys", output=tmp_path / "rows.jsonl")
    assert (summary.inputs, summary.errors) == (3, 0)
    assert [row.row for row in rows] == [0, 1, 2]
    (tmp_path / "b.txt").write_text("7\n")
    _, rows = run(tmp_path / "b.txt", output=tmp_path / "b.jsonl", input_format="greys")
    assert [(row.source, row.error) for row in rows] == [(str(tmp_path / "b.txt"), None)]


@pytest.mark.usefixtures("registered")
def test_a_data_set_is_added_by_one_function_and_one_registration() -> None:
    data = load_data("greys/20")
    assert data.classes == ["dark", "light"]
    assert len(data.train) + len(data.val) == 20
