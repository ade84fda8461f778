"""A type of task is one file and one registration; no other room asks which type a task has."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import UsageError
from prompttune.evaluation.result import Table
from prompttune.task_types import (
    TASK_TYPES,
    Head,
    Measures,
    Scores,
    SegmentationConfig,
    TaskType,
    read_task_type,
    register,
)
from prompttune.task_types.classification import ClassHead
from prompttune.training import TrainConfig, evaluate, train
from prompttune.training.state import load, save
from tests.training_helpers import write_folder

ROOT = Path(__file__).parent.parent
BRANCH = re.compile(
    r"^\s*(el)?if\b.*segmentation\b|isinstance\(.*\bSegmentation|is_segmentation|[=!]= *.segmentation|MaskSplits"
)


@dataclass(frozen=True, eq=False)
class Hits:
    """The figures of the toy."""

    hit_rate: float
    loss: float
    n: int
    corrupt: tuple[str, ...] | None = None
    chosen: Any = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"hit_rate": self.hit_rate, "loss": self.loss, "n": self.n}

    def tables(self) -> list[Table]:
        return [Table(("hit rate", "images"), [[f"{self.hit_rate:.2%}", str(self.n)]])]


class HitScores(Scores):
    def __init__(self) -> None:
        self.sums: dict[str, NDArray[Any]] = {name: np.zeros(()) for name in ("hits", "loss", "images")}

    def add(self, logits: Tensor, targets: Tensor) -> None:
        self.sums["hits"] += float((logits.argmax(dim=1) == targets).sum())
        self.sums["loss"] += float(OneVersusRest().loss(logits, targets)) * len(targets)
        self.sums["images"] += len(targets)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return self.sums

    def result(self, labels: Sequence[str], corrupt: Sequence[str] | None = None) -> Hits:
        hits, loss, images = (float(self.sums[name]) for name in ("hits", "loss", "images"))
        return Hits(hits / images, loss / images, int(images), None if corrupt is None else tuple(corrupt))


@dataclass(frozen=True)
class OneVersusRest(TaskType):
    """A toy: each class has a probability of its own."""

    name: ClassVar[str] = "one-versus-rest"
    measures: ClassVar[Measures] = Measures("hit_rate", "hit rate", "loss", "hit_rate", "hit rate")

    def columns(self, matched: Any) -> list[NDArray[np.int64]]:
        columns: list[NDArray[np.int64]] = matched.columns
        return columns

    def make_head(self, backbone: pt.Backbone, classes: int, width: int) -> Head:
        return ClassHead(width, classes)

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.float(), F.one_hot(targets, logits.shape[1]).float())

    def hits(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmax(dim=1) == targets).sum()

    def figure(self, result: Any) -> Figure:
        return Figure()

    def scores(self, classes: int, unseen: int = 0) -> HitScores:
        return HitScores()

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        shares: NDArray[np.float64] = 1 / (1 + np.exp(-logits.astype(np.float64)))
        return shares


@pytest.fixture
def toy() -> type[OneVersusRest]:
    return register(OneVersusRest)


def settings(data: Path, output: Path, **own: Any) -> TrainConfig:
    values = {"backbone": "test_vit", "weights": "random", "image_size": 32, "method": "linear", "device": "cpu"}
    shared = {"data": str(data), "output": str(output), "epochs": 1, "lr": 1e-2, "tensorboard": False}
    return TrainConfig.from_flat({**values, **shared, **own})


def invoke(*args: object) -> str:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_new_type_goes_through_every_door(
    toy: type[OneVersusRest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = write_folder(tmp_path / "data", 4, 2), tmp_path / "run"
    result = train(settings(data, run, task_type=toy.name))
    assert result.score_title == "hit rate"
    assert {"train_hit_rate", "val_hit_rate"} <= result.metrics["history"][0].keys()
    scored = evaluate(run, device="cpu")
    assert isinstance(scored, Hits)
    assert scored.hit_rate == pytest.approx(result.best_score)
    model = pt.PromptModel.load(run)
    assert model.task_type == OneVersusRest()
    pt.export_engine([run], tmp_path / "engine", batch_sizes=(1, 2), images=2)
    engine = pt.Engine(tmp_path / "engine")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(images).logits.sigmoid()
    for row, answer in enumerate(engine.predict(images.numpy(), "run")):
        assert answer.probability == pytest.approx(float(wanted[row].max()), abs=1e-4)
        assert answer.label == model.labels[int(wanted[row].argmax())]
    with pytest.raises(UsageError, match=r"call predict\(\)"):
        engine.segment(images.numpy(), "run")
    page = tmp_path / "parity.html"
    monkeypatch.setattr("prompttune.cli.engine_options.WIDTH", 400)  # the folder's name may be long
    told = invoke("validate", engine.folder.path, "--data", data, "--batch-sizes", "1,2", "--images", 2, "--html", page)
    assert "engine hit rate" in told
    assert "ECE" not in told
    assert "<th>hit rate</th>" in page.read_text()
    rows = tmp_path / "rows.csv"
    invoke("infer", engine.folder.path, data, "-o", rows)
    assert all(0.5 < float(row["probability"]) < 1 for row in csv.DictReader(rows.open()))
    invoke("explain", run, next(data.rglob("*.png")), "--show", "grad-cam", "--output", tmp_path / "explained")
    refused = CliRunner().invoke(cli, ["evaluate", str(run), "--report", str(tmp_path / "report")])
    assert refused.output == "Error: one-versus-rest: --report is for classifications; use --output for the figures\n"
    monkeypatch.setattr(OneVersusRest, "refused", {**TaskType.refused, "predict": "nobody asks it"})
    refused = CliRunner().invoke(cli, ["infer", str(engine.folder.path), str(data), "-o", str(tmp_path / "a.csv")])
    assert refused.output.splitlines()[-1] == "Error: one-versus-rest: nobody asks it"


@pytest.mark.parametrize(
    "config",
    [
        {"task_type": {"name": "one-versus-rest", "size": 3}},
        {"task_type": {"size": 3}},
        {"task_type": "one-versus-rest"},
        {"segmentation": {"heads": 1}},
        {"segmentation": None},
    ],
)
def test_an_entry_of_another_version_is_one_line(toy: type[OneVersusRest], config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"is damaged or of another version of prompttune: .*; use the version"):
        read_task_type(config)


def test_a_name_is_taken_once() -> None:
    @dataclass(frozen=True)
    class Other(SegmentationConfig):
        """Another class under the same name."""

    with pytest.raises(UsageError, match="task type named 'segmentation' is registered already"):
        register(Other)
    assert TASK_TYPES["segmentation"] is SegmentationConfig
    with pytest.raises(UsageError, match="subclass of TaskType"):
        register(Hits)  # type: ignore[type-var]


def test_only_the_types_room_knows_the_types() -> None:
    found = []
    for folder in ("prompttune", "export", "serve"):
        for path in (ROOT / folder).rglob("*.py"):
            if (ROOT / "prompttune" / "task_types") in path.parents:
                continue
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{path.name}:{number}: {line}" for number, line in enumerate(lines, 1) if BRANCH.search(line)]
    assert not found


def test_runs_of_earlier_releases_are_read(tmp_path: Path) -> None:
    """Their best figures had the names of a classification's, and the setting was called ``task``."""
    data, run = write_folder(tmp_path / "data", 4, 2), tmp_path / "run"
    first = train(settings(data, run))
    path = run / "last.safetensors"
    saved = load(path)
    former = {name: value for name, value in saved.settings.items() if name != "task_type"} | {"task": "classification"}
    save(path, replace(saved, settings=former))
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = raw[8 : 8 + size].replace(b"best_score", b"best_top1").replace(b"best_second", b"best_top5").rstrip()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])
    again = train(settings(data, run), resume=True)
    assert again.was_over
    assert again.best_score == first.best_score
