"""The code of ``docs/python.md`` runs as it stands, from top to bottom."""

import re
from pathlib import Path

import matplotlib as mpl
import pytest

from tests.test_plugins import as_before  # noqa: F401
from tests.training_helpers import no_pictures, one_thread  # noqa: F401

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


@pytest.mark.slow
@pytest.mark.usefixtures("as_before", "no_pictures", "one_thread")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert len(blocks) >= 6
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))  # so that a failure names the page's own line
        exec(compile("\n" * line + block.group(1), str(PAGE), "exec"), names)
    assert names["table"].features.shape == (40, 64)  # type: ignore[attr-defined]
