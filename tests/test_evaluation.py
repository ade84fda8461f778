"""The one evaluation: figures against references, rows of an inference."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support

from prompttune.errors import DataError
from prompttune.evaluation import (
    Evaluation,
    Tally,
    evaluation_of_rows,
)


def drawn(classes: int, images: int, seed: int = 0) -> tuple[Any, Any]:
    """Logits [N, C] that lean towards the targets [N]."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, images)
    logits = rng.standard_normal((images, classes)) * 2
    logits[np.arange(images), targets] += 1.5
    return logits.astype(np.float32), targets


def evaluated(logits: Any, targets: Any) -> Evaluation:
    tally = Tally(np.shape(logits)[1])
    tally.add_logits(logits, targets)
    return tally.result([f"class {index}" for index in range(tally.classes)])


def ece_written_out(confidences: Any, right: Any, bins: int = 15) -> float:
    """Equation 3 of the paper, bin by bin."""
    total = 0.0
    for number in range(1, bins + 1):
        inside = [i for i, one in enumerate(confidences) if (number - 1) / bins < one <= number / bins]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


# -- figures


@pytest.mark.parametrize("classes", [2, 7, 30])
def test_figures_of_logits_against_torch_and_scikit_learn(classes: int) -> None:
    logits, targets = drawn(classes, 400)
    found = evaluated(logits, targets)
    tensor, truth = torch.from_numpy(logits).double(), torch.from_numpy(targets)
    predicted = tensor.argmax(dim=1)
    best = tensor.topk(min(5, classes)).indices
    assert found.n == 400
    assert found.top1 == (predicted == truth).double().mean().item()
    assert found.top5 == (best == truth[:, None]).any(dim=1).double().mean().item()
    assert found.loss == pytest.approx(F.cross_entropy(tensor, truth).item(), rel=1e-12)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(targets, predicted))
    assert found.macro_f1 == pytest.approx(f1_score(targets, predicted, average="macro"))
    expected = precision_recall_fscore_support(targets, predicted, labels=range(classes), zero_division=0)
    mine = found.report.values()
    assert [one.precision or 0.0 for one in mine] == pytest.approx(expected[0].tolist())
    assert [one.recall or 0.0 for one in mine] == pytest.approx(expected[1].tolist())
    assert [one.f1 or 0.0 for one in mine] == pytest.approx(expected[2].tolist())
    assert [one.support for one in mine] == expected[3].tolist()
    confidences = tensor.softmax(dim=1).max(dim=1).values.tolist()
    assert found.ece == pytest.approx(ece_written_out(confidences, (predicted == truth).tolist()))


def test_calibration_error_by_hand() -> None:
    tally = Tally(2)
    tally.add([0, 1, 1], [0, 0, 1], [0.95, 0.95, 0.65])
    found = tally.result(["a", "b"])
    # two of three in the last bin, half of them right: 2/3 |0.5 - 0.95|; one in the tenth, right: 1/3 |1 - 0.65|
    assert found.ece == pytest.approx(2 / 3 * 0.45 + 1 / 3 * 0.35)
    bins = found.to_dict()["calibration"]
    assert len(bins) == 15
    assert [one["n"] for one in bins] == [0] * 9 + [1, 0, 0, 0, 0, 2]
    assert bins[9] == {"low": 9 / 15, "high": 10 / 15, "n": 1, "confidence": 0.65, "accuracy": 1.0}
    assert bins[0]["confidence"] is bins[0]["accuracy"] is None


def test_a_confidence_on_a_bound_is_in_the_bin_below() -> None:
    tally = Tally(5)
    tally.add_logits(np.zeros((1, 5)), [0])  # one fifth each: the upper bound of the third bin
    tally.add([0, 0], [0, 0], [1.0, 1.0 + 1e-12])
    assert tally.arrays()["bin_counts"].tolist() == [0, 0, 1, *[0] * 11, 2]


def test_classes_without_images_or_predictions_have_no_figures() -> None:
    tally = Tally(4)
    tally.add([0, 0, 1], [0, 2, 2], [0.5, 0.5, 0.5])
    found = tally.result(list("abcd"))
    report = found.report
    assert (report["a"].precision, report["a"].recall, report["a"].f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert (report["b"].precision, report["b"].recall, report["b"].f1) == (None, 0.0, 0.0)
    assert (report["c"].precision, report["c"].recall, report["c"].f1, report["c"].support) == (0.0, None, 0.0, 0)
    assert (report["d"].precision, report["d"].recall, report["d"].f1) == (None, None, None)
    assert found.balanced_accuracy == 0.25
    assert found.macro_f1 == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert found.per_class == {"a": 0.5, "b": 0.0, "c": None, "d": None}
    assert found.worst_pairs(5) == [("b", "c", 1, 1.0), ("a", "c", 1, 0.5)]


def test_of_equal_logits_the_first_is_the_likelier() -> None:
    found = evaluated(np.zeros((7, 7)), np.arange(7))
    assert (found.top1, found.top5) == (1 / 7, 5 / 7)
    assert found.confusion[:, 0].tolist() == [1] * 7


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_wrong(bad: float) -> None:
    logits = np.zeros((3, 6), dtype=np.float32)
    logits[:, 2] = 9.0
    logits[0, 5] = bad
    found = evaluated(logits, [2, 2, 2])
    assert (found.n, found.top1, found.top5) == (3, 2 / 3, 2 / 3)
    assert found.per_class["class 2"] == 2 / 3
    assert found.not_finite.tolist() == [0, 0, 1, 0, 0, 0]
    assert int(found.calibration.counts.sum()) == 2
    assert found.loss is not None
    assert np.isnan(found.loss)  # training stops at it
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (values["loss"], values["not_finite"]) == (None, 1)
    nothing = evaluated(np.full((1, 2), np.nan), [1])
    assert (nothing.top1, nothing.ece, nothing.balanced_accuracy, nothing.macro_f1) == (0.0, None, 0.0, 0.0)
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_a_large_lead_has_a_finite_loss() -> None:
    assert evaluated([[0.0, 5000.0]], [0]).loss == 5000.0
    tally = Tally(2)
    tally.add([0], [1], [1.0], [1.0], [0.0])
    loss = tally.result(["a", "b"]).loss
    assert loss is not None
    assert 700 < loss < 710


def test_what_is_not_known_of_one_image_is_not_known_of_all() -> None:
    tally = Tally(9)
    tally.add([0, 1], [0, 0], [0.5, 0.5], [1, 0], [0.5, 0.25])
    known = tally.result(list("abcdefghi"))
    assert known.top5 == 0.5
    assert known.loss == pytest.approx(-(np.log(0.5) + np.log(0.25)) / 2)
    tally.add([0], [0], [0.5], [1])
    assert (tally.result(list("abcdefghi")).top5, tally.result(list("abcdefghi")).loss) == (2 / 3, None)
    tally.add([0], [0], [0.5], None, [0.5])
    assert tally.result(list("abcdefghi")).top5 is None


def test_parts_add_up_whatever_the_batches() -> None:
    logits, targets = drawn(11, 90)
    whole = evaluated(logits, targets)
    total = Tally(11)
    for part in (slice(0, 1), slice(1, 40), slice(40, 40), slice(40, 90)):
        other = Tally(11)
        other.add_logits(logits[part], targets[part])
        for name, counted in other.arrays().items():
            total.arrays()[name] += counted
    merged = total.result(whole.labels)
    assert merged.loss == pytest.approx(whole.loss)
    assert merged.ece == pytest.approx(whole.ece)
    for key in ("n", "top1", "top5", "report", "confusion"):
        assert merged.to_dict()[key] == whole.to_dict()[key]


def test_a_result_does_not_change_afterwards() -> None:
    tally = Tally(2)
    tally.add([0], [0], [1.0])
    first = tally.result(["a", "b"])
    tally.add([1], [0], [1.0])
    assert first.confusion.sum() == first.calibration.counts.sum() == 1


def test_indices_that_are_no_classes_are_refused() -> None:
    for targets, predictions in (([-1], [0]), ([2], [0]), ([0], [-1]), ([0], [2])):
        with pytest.raises(ValueError, match="class ind"):
            Tally(2).add(targets, predictions, [0.5])
    with pytest.raises(ValueError, match="for 2 classes"):
        Tally(2).add_logits(np.zeros((1, 3)), [0])
    with pytest.raises(DataError, match="none of the images to evaluate on is readable"):
        Tally(2).result(["a", "b"])


# -- rows


class Score(NamedTuple):
    label: str
    probability: float


class Row(NamedTuple):
    task: str
    label: str | None = None
    probability: float | None = None
    top_k: tuple[Score, ...] = ()
    target: str | None = None
    target_probability: float | None = None
    error: str | None = None


def rows_of(logits: Any, targets: Any, top_k: int, task: str = "t") -> Iterator[Row]:
    shares = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    for share, target in zip(shares, targets, strict=True):
        best = [Score(f"class {one}", share[one]) for one in np.argsort(-share, kind="stable")[:top_k]]
        label, probability = best[0]
        yield Row(task, label, probability, tuple(best), f"class {target}", share[target])


def classes_named(count: int) -> list[str]:
    return [f"class {index}" for index in range(count)]


def test_rows_give_the_figures_of_their_logits() -> None:
    logits, targets = drawn(8, 300)
    whole = evaluated(logits, targets)
    found = evaluation_of_rows(rows_of(logits, targets, 5), {"t": classes_named(8)})["t"]
    assert found.evaluation is not None
    assert (found.errors, found.unlabelled, found.unknown) == (0, 0, 0)
    assert found.evaluation.loss == pytest.approx(whole.loss)
    assert found.evaluation.ece == pytest.approx(whole.ece)
    for key in ("n", "top1", "top5", "report", "confusion"):
        assert found.evaluation.to_dict()[key] == whole.to_dict()[key]


def test_top5_is_known_only_where_the_rows_tell() -> None:
    labels = {"t": classes_named(8), "few": classes_named(5)}
    best = tuple(Score(f"class {index}", 0.1) for index in range(5))

    def top5(target: int, shown: int, task: str = "t") -> float | None:
        row = Row(task, "class 0", 0.1, best[:shown], f"class {target}")
        evaluation = evaluation_of_rows([row], labels)[task].evaluation
        assert evaluation is not None
        return evaluation.top5

    assert top5(0, 1) == top5(2, 3) == 1.0
    assert top5(7, 5) == 0.0
    assert top5(7, 4) is None
    assert top5(4, 1, "few") == 1.0  # one of five is among the five likeliest
    logits, targets = drawn(8, 50)
    found = evaluation_of_rows(rows_of(logits, targets, 2), labels)["t"].evaluation
    assert found is not None
    assert found.top5 is None


def test_rows_that_cannot_be_scored_are_counted() -> None:
    answer = {"label": "a", "probability": 0.9, "top_k": (Score("a", 0.9),)}
    rows = [
        Row("t", **answer, target="a"),
        Row("t", **answer),
        Row("t", error="damaged", target="b"),
        Row("t", **answer, target="x"),
        Row("t", **answer, target="x"),
        Row("other", error="damaged"),
        Row("nobody", error="unknown task"),
        Row("t", target="b"),  # no answer, no reason: wrong
    ]
    found = evaluation_of_rows(rows, {"t": ["a", "b"], "other": ["c"], "idle": ["d"]})
    assert list(found) == ["t", "other", "nobody"]
    one = found["t"]
    assert one.evaluation is not None
    assert (one.evaluation.n, one.evaluation.top1, one.evaluation.loss) == (4, 0.25, None)
    assert one.evaluation.confusions()["x"] == {"a": 2}
    alone = evaluation_of_rows([Row("t", **answer, target="x")], {"t": ["a", "b"]})["t"]
    assert (alone.evaluation, alone.unknown, alone.told_of_unknown) == (None, 1, "nothing is scored")
    assert (one.errors, one.unlabelled, one.unknown, one.unknown_labels) == (1, 1, 2, ("x",))
    assert found["other"].evaluation is found["nobody"].evaluation is None
    assert found["other"].to_dict() == {"n": 0, "errors": 1, "unlabelled": 0, "unknown": 0, "unknown_labels": []}
    assert evaluation_of_rows([], {"t": ["a"]}) == {}
    with pytest.raises(DataError, match="'z', which is not one of its classes"):
        evaluation_of_rows([Row("t", "z", 0.5, target="a")], {"t": ["a"]})
    with pytest.raises(DataError, match="task 'u', whose classes are not known"):
        evaluation_of_rows([Row("u", "z", 0.5)], {"t": ["a"]})


def test_memory_does_not_grow_with_the_rows() -> None:
    def stream(count: int) -> Iterator[Row]:
        for number in range(count):
            share = 0.5 + number / (2 * count)
            yield Row("t", "a", share, (Score("a", share),), "a", share)

    tracemalloc.start()
    try:
        found = evaluation_of_rows(stream(40_000), {"t": ["a", "b"]})["t"].evaluation
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found is not None
    assert (found.n, found.top1) == (40_000, 1.0)
    assert most < 40_000 * 50  # a row's five figures alone take more


def test_neither_torch_nor_scikit_learn_nor_matplotlib_is_needed() -> None:
    script = (
        "import sys\n"
        "from prompttune.evaluation import Tally, evaluation_of_rows\n"
        "tally = Tally(2)\n"
        "tally.add_logits([[1.0, 0.0]], [1])\n"
        "tally.result(['a', 'b']).to_dict()\n"
        "sys.exit(', '.join({'torch', 'timm', 'lightning', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
