"""What a run shows: lines, the live bar, pictures."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from prompttune.evaluation.plots import draw_confusion, save_png
from prompttune.task_types import ClassificationConfig
from prompttune.training.plots import plot_curves
from prompttune.training.progress import Clock, Display, Progress, duration, epoch_line

RECORD = {
    "epoch": 3,
    "lr": 1e-3,
    "train_loss": 0.25,
    "train_top1": 0.9,
    "val_loss": 0.5,
    "val_top1": 0.875,
    "images_per_second": 123.4,
}


def news(**changes: Any) -> Progress:
    return Progress(**{"phase": "epoch", "epoch": 3, "epochs": 10, "seconds_left": 65.4, "record": RECORD, **changes})


def test_an_epoch_is_one_line_with_every_figure() -> None:
    assert epoch_line(news(best=True)) == (
        "epoch 3/10  loss 0.2500  top-1 90.00%  val loss 0.5000  val top-1 87.50%  lr 1.00e-03  123 images/s  "
        "0:01:05 left  *"
    )
    last = epoch_line(news(epoch=10, record={**RECORD, "val_top1": None}))
    assert "val" not in last
    assert "left" not in last
    assert duration(3723) == "1:02:03"


def test_no_terminal_gets_plain_lines_and_no_bar() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream, force_terminal=False, width=40)) as display:
        display(Progress("note", text="[red]not markup[/red]"))
        display(Progress("train", epoch=1, epochs=2, step=1, steps=5, loss=1.0))
        display(news())
    assert stream.getvalue().splitlines() == ["[red]not markup[/red]", epoch_line(news())]


def test_a_terminal_gets_a_live_bar() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream, force_terminal=True, width=120)) as display:
        display(Progress("train", 1, 2, 3, 5, loss=1.5, accuracy=0.25, images_per_second=40, seconds_left=9))
        display._bars.refresh()
        display(Progress("validate", 1, 2, 1, 2))
        display._bars.refresh()
    shown = stream.getvalue()
    for words in ("epoch 1/2", "3/5", "loss 1.5000", "top-1 25.0%", "40 images/s", "0:00:09 left", "validation 1/2"):
        assert words in shown


def test_a_quiet_console_shows_nothing() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream, quiet=True)) as display:
        display(news())
    assert stream.getvalue() == ""


def test_clock_estimates_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 12.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr("prompttune.training.progress.time.perf_counter", lambda: next(now))
    clock = Clock()
    clock.start()
    clock.tick("train", 8)
    clock.tick("train", 8)
    assert clock.images_per_second("train") == 4.0
    assert clock.seconds_left(3, 2) == 3 * 2.0 + 2 * 1.0
    clock.start()
    clock.tick("validate", 8)
    assert clock.seconds_left(3, 2) == 3 * 2.0 + 2 * 1.0
    assert clock.images_per_second("validate") == 8.0


@pytest.mark.parametrize("classes", [2, 10, 30, 200])
def test_confusion_matrix_is_drawn_for_few_and_many_classes(tmp_path: Path, classes: int) -> None:
    confusion = np.random.default_rng(0).integers(0, 3, (classes, classes)) + 20 * np.eye(classes, dtype=int)
    confusion[1] = 0  # a class without images
    path = tmp_path / "confusion.png"
    save_png(draw_confusion(confusion, [f"a rather long class name {index}" for index in range(classes)]), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] >= 400
    blue = (pixels[..., 2] - pixels[..., 0]) > 60  # the diagonal stands out
    assert blue.any()


def test_curves_are_drawn_with_gaps_in_the_validation(tmp_path: Path) -> None:
    history = [
        {**RECORD, "epoch": epoch, "val_loss": 1.0 if epoch % 2 else None, "val_top1": 0.5 if epoch % 2 else None}
        for epoch in range(1, 6)
    ]
    plot_curves(tmp_path / "curves.png", history, ClassificationConfig.measures)
    plot_curves(tmp_path / "one.png", history[1:2], ClassificationConfig.measures)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 300


def test_plots_leave_matplotlibs_global_state_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot_curves(tmp_path / "curves.png", [RECORD], ClassificationConfig.measures)
    save_png(draw_confusion(np.eye(2, dtype=int), ["a", "b"]), tmp_path / "confusion.png")
    assert "matplotlib.pyplot" not in sys.modules
