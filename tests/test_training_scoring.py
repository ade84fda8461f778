"""Evaluation: the figures against hand computation, classes matched by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from prompttune.backbones import load_backbone
from prompttune.data import load_data
from prompttune.errors import DataError, UsageError
from prompttune.methods import LinearConfig
from prompttune.model import PromptModel
from prompttune.task_types.classification import ClassScores
from prompttune.training import evaluate
from prompttune.training.scoring import resolve_device
from tests.training_helpers import CLASSES, SIDE, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "bars", train=3, val=4)


def make_model(labels: list[str]) -> PromptModel:
    torch.manual_seed(1)
    return PromptModel(load_backbone("test_vit", SIDE, "random:0"), LinearConfig(), labels=labels).eval()


def test_scores_against_hand_computation() -> None:
    logits = torch.tensor(
        [
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],  # right
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],  # class 3: fifth
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],  # class 2: sixth
            [0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0],  # right
        ]
    )
    targets = torch.tensor([0, 3, 2, 2])
    labels = list("abcdefg")
    scores = ClassScores(len(labels))
    scores.add(logits[:3], targets[:3])
    scores.add(logits[3:], targets[3:])
    result = scores.result(labels)
    assert (result.top1, result.top5, result.n) == (0.5, 0.75, 4)
    assert result.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert result.per_class == {"a": 1.0, "b": None, "c": 0.5, "d": 0.0, "e": None, "f": None, "g": None}
    expected = np.zeros((7, 7), dtype=int)
    expected[0, 0] = expected[3, 0] = expected[2, 0] = expected[2, 2] = 1
    assert np.array_equal(result.confusion, expected)
    assert result.to_dict()["confusion"]["c"] == {"a": 1, "c": 1}


def test_top5_with_fewer_classes_is_all_and_sums_add_up_over_processes() -> None:
    scores = ClassScores(2)
    scores.add(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    scores.reduce(lambda tensor: tensor * 3)
    result = scores.result(["a", "b"])
    assert (result.top1, result.top5, result.n) == (0.0, 1.0, 3)


def test_figures_of_two_processes_are_those_of_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 6, generator=generator).bfloat16()
    targets = torch.randint(0, 6, (40,), generator=generator)
    whole, *parts = ClassScores(6), ClassScores(6), ClassScores(6)
    whole.add(logits, targets)
    for part, rows in zip(parts, (slice(0, 13), slice(13, 40)), strict=True):
        part.add(logits[rows], targets[rows])
    other = iter([torch.from_numpy(array) for array in parts[1].tally.arrays().values()])
    labels = list("abcdef")
    parts[0].reduce(lambda tensor: tensor + next(other))
    summed = parts[0].result(labels, ["broken"]).to_dict()
    expected = whole.result(labels, ["broken"]).to_dict()
    assert summed.keys() == expected.keys()
    for key, value in expected.items():
        assert summed[key] == (pytest.approx(value) if isinstance(value, float) else value) or key == "calibration"
    assert [one["n"] for one in summed["calibration"]] == [one["n"] for one in expected["calibration"]]


def test_a_logit_that_is_not_finite_makes_a_loss_that_training_stops_at() -> None:
    scores = ClassScores(2)
    scores.add(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]), torch.tensor([0, 0]))
    result = scores.result(["a", "b"])
    assert result.top1 == 0.5
    assert not np.isfinite(result.loss)


def test_no_image_is_an_error() -> None:
    with pytest.raises(DataError, match="none of the images to evaluate on is readable"):
        ClassScores(2).result(["a", "b"])


def test_evaluation_of_a_folder_against_a_loop_by_hand(folder: Path) -> None:
    reordered = list(reversed(CLASSES))
    model = make_model(reordered)
    seen: list[tuple[int, int]] = []
    result = evaluate(
        model, str(folder), batch_size=5, device="cpu", on_batch=lambda done, total: seen.append((done, total))
    )
    transform = model.preprocess.transform()
    right, losses = dict.fromkeys(CLASSES, 0), []
    for name in CLASSES:
        for path in sorted((folder / "val" / name).iterdir()):
            logits = model(transform(Image.open(path).convert("RGB"))[None]).logits
            right[name] += reordered[int(logits.argmax())] == name
            losses.append(F.cross_entropy(logits, torch.tensor([reordered.index(name)])).item())
    assert result.n == 16
    assert result.labels == tuple(reordered)
    assert result.per_class == {name: right[name] / 4 for name in reordered}
    assert result.top1 == sum(right.values()) / 16
    assert result.top5 == 1.0
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert seen[-1] == (16, 16)


def test_a_saved_checkpoint_scores_the_same_and_every_split_can_be_scored(folder: Path, tmp_path: Path) -> None:
    model = make_model(sorted(CLASSES))
    model.save(tmp_path / "checkpoint")
    of_folder = evaluate(tmp_path / "checkpoint", str(folder), device="cpu")
    assert of_folder.to_dict() == evaluate(model, str(folder), device="cpu").to_dict()
    sizes = {split: evaluate(model, str(folder), split=split, device="cpu").n for split in ("train", "val", "all")}
    assert sizes == {"train": 12, "val": 16, "all": 28}
    source = load_data(str(folder)).train
    assert evaluate(model, source, device="cpu").n == 12


def test_evaluation_refuses_data_with_no_class_in_common_and_unknown_splits(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"no class of the data .* only in the data: east, .*; only in the model: up, down"
    ):
        evaluate(make_model(["up", "down"]), str(folder), device="cpu")
    with pytest.raises(UsageError, match="unknown split 'dev'; one of val, test, train, all"):
        evaluate(make_model(CLASSES), str(folder), split="dev", device="cpu")
    with pytest.raises(UsageError, match="does not say what it was trained on"):
        evaluate(make_model(CLASSES), device="cpu")


def test_evaluation_leaves_the_model_in_its_mode_and_folds_its_state_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(CLASSES).train()
    fold, folded = model.task_state, []
    monkeypatch.setattr(model, "task_state", lambda: folded.append(model.training) or fold())
    evaluate(model, str(folder), batch_size=4, device="cpu")
    assert model.training
    assert folded == [False]


@pytest.mark.parametrize("device", ["cuda:99", "nothing"])
def test_a_device_that_is_not_there_is_one_line(device: str) -> None:
    with pytest.raises(UsageError, match=r"is not there|unknown device"):
        resolve_device(device)


@dataclass
class UnreadableBatches:
    """A source whose second image cannot be read, as the loader reports it."""

    classes: list[str] = field(default_factory=lambda: list(CLASSES))

    def __len__(self) -> int:
        return 3

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index == 1:
            raise OSError("broken")
        return Image.new("RGB", (SIDE, SIDE)), index

    def describe(self, index: int) -> str:
        return f"picture {index}"

    def labels(self) -> list[int]:
        return [0, 1, 2]

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_unreadable_images_are_listed_and_limited() -> None:
    model = make_model(CLASSES)
    result = evaluate(model, UnreadableBatches(), device="cpu")  # type: ignore[arg-type]
    assert result.n == 2
    assert len(result.corrupt) == 1
    assert "picture 1" in result.corrupt[0]
    with pytest.raises(DataError):
        evaluate(model, UnreadableBatches(), device="cpu", max_corrupt=0)  # type: ignore[arg-type]
