"""The example notebook runs from top to bottom, with a tiny backbone in its cell of parameters."""

import json
from pathlib import Path

import matplotlib as mpl

NOTEBOOK = Path(__file__).parent.parent / "examples/many_tasks.ipynb"


def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    names: dict[str, object] = {}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["metadata"].get("tags") == ["parameters"]:
            source = 'BACKBONE, IMAGE_SIZE, WEIGHTS, EPOCHS = "test_vit", 32, "random", 1'
        exec(compile(source, NOTEBOOK.name, "exec"), names)
    assert set(names["scores"]) == {"digits", "location"}
    assert [answer.task for answer in names["answers"]] == names["tasks"]
    assert names["report"].passed
