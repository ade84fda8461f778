"""Pictures of an evaluation, the report's files, and the command that writes them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from prompttune.backbones import load_backbone
from prompttune.cli.main import cli
from prompttune.evaluation import Tally, TaskEvaluation, confusion_figure, reliability_figure, write_report
from prompttune.evaluation.plots import NAMED_CLASSES, NUMBERED_CLASSES, png_bytes
from prompttune.methods import LinearConfig
from prompttune.model import PromptModel
from tests.test_evaluation import drawn, evaluated
from tests.test_report import Page
from tests.training_helpers import CLASSES, SIDE, write_folder


@pytest.mark.parametrize("classes", [2, NUMBERED_CLASSES, NAMED_CLASSES, 250])
def test_the_confusion_matrix_stays_readable(classes: int) -> None:
    found = evaluated(*drawn(classes, 500))
    figure = confusion_figure(found)
    axes = figure.axes[0]
    assert len(axes.get_xticks()) == len(axes.get_yticks()) <= NAMED_CLASSES
    assert "class 0" in axes.get_yticklabels()[0].get_text()
    assert bool(axes.texts) == (classes <= NUMBERED_CLASSES)
    assert any("% of the true class" in one.get_ylabel() for one in figure.axes)  # the colour bar
    shown = axes.images[0].get_array()
    assert shown is not None
    assert np.allclose(np.asarray(shown).sum(axis=1)[found.support > 0], 100)
    with Image.open(io.BytesIO(png_bytes(figure))) as picture:
        assert min(picture.size) >= 400


def test_the_reliability_plot_shows_accuracy_gap_and_histogram() -> None:
    tally = Tally(2)
    tally.add([0, 1, 1, 1], [0, 0, 1, 1], [0.95, 0.95, 0.65, 0.65])
    figure = reliability_figure(tally.result(["a", "b"]))
    upper, lower = figure.axes
    assert "ECE 40.00%" in upper.get_title()
    accuracy, gap = upper.containers
    assert [bar.get_height() for bar in accuracy] == [1.0, 0.5]
    assert [bar.get_height() for bar in gap] == pytest.approx([-0.35, 0.45])
    assert [bar.get_height() for bar in lower.containers[0] if bar.get_height()] == [0.5, 0.5]
    empty = evaluated(np.full((1, 2), np.nan), [0])
    assert "no answer" in reliability_figure(empty).axes[0].get_title()
    png_bytes(reliability_figure(empty))


def test_names_that_look_like_formulas_are_drawn() -> None:
    tally = Tally(50)
    tally.add([0, 1], [1, 0], [0.5, 0.5])
    png_bytes(confusion_figure(tally.result([f"$^{number}_{{$" for number in range(50)])))


def test_the_report_is_complete_and_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&')</script>/x%"
    tally = Tally(2)
    tally.add([0, 1, 1], [0, 0, 1], [0.9, 0.8, 0.7], [1, 1, 1], [0.9, 0.2, 0.7])
    found = tally.result([evil, "plain"])
    tasks = {evil: found, "rows": TaskEvaluation(found, 7, 2, 3, (evil,)), "empty": TaskEvaluation(None, errors=4)}
    write_report(tasks, tmp_path / "new" / "report", title=evil, about={evil: evil})
    folder = tmp_path / "new" / "report"
    part = evil.replace("%", "%25").replace("/", "%2F")
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["evaluation.json", "evaluation.html"]
        + [f"{kind}-{name}.png" for kind in ("confusion", "reliability") for name in (part, "rows")]
    )
    values = json.loads((folder / "evaluation.json").read_text())
    assert values["about"] == {evil: evil}
    assert list(values["tasks"]) == [evil, "rows", "empty"]
    assert values["tasks"][evil] == json.loads(json.dumps(found.to_dict()))
    assert (values["tasks"]["rows"]["errors"], values["tasks"]["rows"]["n"]) == (7, 3)
    text = (folder / "evaluation.html").read_text()
    page = Page(text)
    assert "<script" not in text
    assert page.count("img") == 4
    assert all(one.startswith("data:image/png;base64,") for one in page.references)
    words = " ".join(page.words)
    for expected in ("66.67%", "40.00%", "3 true labels are not among its classes", "confused most"):
        assert expected in words


def test_the_command_writes_a_report(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "bars", train=1, val=3)
    torch.manual_seed(1)
    model = PromptModel(load_backbone("test_vit", SIDE, "random:0"), LinearConfig(), labels=sorted(CLASSES)).eval()
    model.save(tmp_path / "bars-model", {})
    arguments = ["evaluate", str(tmp_path / "bars-model"), "--data", str(data), "--device", "cpu", "--quiet"]
    arguments += ["--weights", "random:0"]
    shown = CliRunner().invoke(cli, [*arguments, "--report", str(tmp_path / "report")])
    assert shown.exit_code == 0, shown.output
    assert "ECE" in shown.stdout
    assert "balanced" in shown.stdout
    printed = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    (written,) = json.loads((tmp_path / "report" / "evaluation.json").read_text())["tasks"].items()
    assert written[0] == "bars-model"
    assert 0 < printed["ece"] < 1
    assert {key: printed[key] for key in written[1]} == written[1]
    assert (tmp_path / "report" / "reliability-bars-model.png").stat().st_size > 1000
