"""Figures of a comparison, and which of them pass."""

import json

import numpy as np
import pytest

from prompttune.errors import UsageError
from prompttune.export import Gate, ParityReport
from prompttune.export.parity.accuracy import Accuracy
from prompttune.export.parity.figures import _KEPT, DifferenceTally
from prompttune.export.parity.gate import NOISE, loosest

LOW = ("fp16", "bf16", "int8")


def tally(expected, found, **settings):
    made = DifferenceTally(**settings)
    made.add(np.array(expected, np.float32), np.array(found, np.float32))
    return made.result("t", "state", 1)


def report(*comparisons, apart=None, gate=None, **settings):
    return ParityReport("here", {}, comparisons, apart, gate or Gate(), **settings)


def test_figures():
    one = tally([[1.0, 3.0, 2.0], [0.0, 4.0, 4.5]], [[1.0, 3.0, 2.0], [0.0, 4.5, 4.0]])
    assert (one.max_abs, one.mean_abs, one.median_abs) == (0.5, 1 / 6, 0.0)
    assert (one.images, one.disagreements, one.agreement) == (2, 1, 0.5)
    assert (one.margin, one.disagreement_margin) == (0.5, 0.5)
    assert one.cosine == pytest.approx(36 / (16 + 20.25))
    assert tally([[1.0]], [[1.0]]).margin is None


def test_relative_differences_are_over_the_scale_of_the_row():
    one = tally([[0.0, -4.0, 1e-9], [8.0, 0.0, 0.0]], [[1.0, -4.0, 1.0], [8.0, 0.0, 2.0]])
    assert one.max_rel == pytest.approx(0.25)  # 1 of 4, 2 of 8; never over the logit that is nearly zero
    assert one.mean_rel == pytest.approx((0.25 + 0.25 + 0.25) / 6)
    assert one.median_rel == pytest.approx(0.125)
    assert tally([[0.0, 0.0]], [[0.0, 0.0]]).max_rel == 0
    assert tally([[0.0, 0.0]], [[0.1, 0.0]]).max_rel == np.inf


def test_divergence_of_the_probabilities():
    expected, found = [[0.0, np.log(3.0)], [1.0, 1.0]], [[0.0, 0.0], [5.0, 5.0]]
    one = tally(expected, found)
    by_hand = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert one.kl_max == pytest.approx(by_hand)  # the second row's probabilities are equal
    assert one.kl_mean == pytest.approx(by_hand / 2)
    assert tally(found, expected).kl_max != pytest.approx(by_hand)  # not symmetric: the reference comes first


def test_agreement_of_the_five_best():
    expected = np.arange(12.0)[None]
    found = expected.copy()
    found[0, [7, 0]] = found[0, [0, 7]]
    one = tally(expected, found)
    assert one.agreement == 1
    assert one.top5_agreement == pytest.approx(4 / 5)
    assert tally([[1.0, 2.0]], [[1.0, 2.0]]).top5_agreement is None


def test_batches_add_up_and_many_logits_are_sampled():
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((600, 1024)).astype(np.float32)
    found = expected + rng.standard_normal(expected.shape).astype(np.float32) * 0.01
    made = DifferenceTally()
    for rows in np.array_split(np.arange(600), 7):
        made.add(expected[rows], found[rows])
    one, apart = made.result("t", "state", 8), np.abs(expected - found)
    assert one.images == 600
    assert (one.max_abs, one.mean_abs) == pytest.approx((apart.max(), apart.mean()), rel=1e-5)
    assert one.median_abs == pytest.approx(np.median(apart), rel=0.02)
    assert _KEPT / 4 < one.pairs.shape[1] <= _KEPT < expected.size
    assert one.agreement == (expected.argmax(1) == found.argmax(1)).mean()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", NOISE)
def test_what_is_not_finite_fails_and_stays_json(bad, precision):
    gate = Gate.for_precision(precision, min_agreement=0.0)
    made = report(tally([[1.0, 2.0]], [[bad, 2.0]], noise=gate.noise), gate=gate)
    assert not made.passed
    assert "not finite" in made.failures[0]
    json.loads(json.dumps(made.to_dict(), allow_nan=False))
    both = tally([[bad, 2.0]], [[bad, 2.0]])
    assert (both.agreement, both.ties) == (0, 0)
    assert not report(both, gate=gate).passed
    assert not report(tally([[1.0, 2.0]], [[1.0, 2.0]]), apart=bad, gate=gate).passed


def test_gates():
    near = tally([[1.0, 2.0]], [[1.0, 2.00005]])
    assert report(near).passed
    assert not report(near, gate=Gate(atol=1e-5)).passed
    tie = tally([[1.0, 1.00001]], [[1.00001, 1.0]])
    assert report(tie).failures == [
        "task 't', batch size 1, against the state: top-1 agreement 0 (1 of 1 differ; leads there up to 1e-05), "
        "required 1"
    ]
    assert report(tie, gate=Gate(min_agreement=0.0)).passed
    assert "mixed batch differs from single runs" in report(near, apart=1e-3).failures[0]


def test_the_worst_figure_comes_first():
    near, far = tally([[1.0, 2.0]], [[1.0, 2.001]]), tally([[1.0, 2.0]], [[1.0, 2.5]])
    lines = report(near, far, tally([[1.0, 2.0]], [[2.0, 1.9]]), apart=0.01).failures
    assert [
        next(word for word in ("by 1,", "by 0.5,", "by 0.01,", "by 0.001,", "top-1") if word in line) for line in lines
    ] == [
        "by 1,",
        "by 0.5,",
        "by 0.01,",
        "by 0.001,",
        "top-1",
    ]


def test_thresholds_follow_the_precision():
    exact = Gate.for_precision("fp32")
    assert (exact.atol, exact.min_agreement, exact.max_accuracy_loss, exact.noise) == (1e-4, 1.0, None, 0.0)
    for precision in LOW:
        gate = Gate.for_precision(precision)
        assert (gate.atol, gate.min_agreement, gate.max_accuracy_loss) == (None, 0.99, 0.01)
        assert gate.noise == NOISE[precision]
        given = Gate.for_precision(precision, atol=0.5, min_agreement=0.0, max_accuracy_loss=0.0, images=3)
        assert (given.atol, given.min_agreement, given.max_accuracy_loss, given.images) == (0.5, 0.0, 0.0, 3)
    assert loosest("fp16", "fp32") == "fp16"
    assert loosest("int8", "bf16", "fp32") == "int8"
    for settings in ({"atol": np.nan}, {"min_agreement": np.nan}, {"max_accuracy_loss": np.nan}):
        with pytest.raises(UsageError):
            Gate.for_precision("fp16", **settings)
    with pytest.raises(UsageError, match="unknown precision 'fp8'"):
        Gate.for_precision("fp8")


@pytest.mark.parametrize("precision", LOW)
def test_one_tie_of_few_images_does_not_refuse_an_honest_engine(precision):
    gate, rng = Gate.for_precision(precision), np.random.default_rng(0)
    expected = rng.standard_normal((16, 10)) * 3
    best = expected[0].argsort()[-2:]
    expected[0, best] = 5.0, 5.0 + 1e-3
    found = expected.copy()
    found[0, best] = 5.0 + 1e-3, 5.0
    one = tally(expected, found, noise=gate.noise)
    assert (one.disagreements, one.ties, one.agreement) == (1, 1, 15 / 16)
    assert report(one, gate=gate).passed
    assert not report(tally(expected, found), gate=Gate.for_precision("fp32", atol=1.0)).passed  # fp32 knows no ties


def test_a_row_of_small_logits_is_judged_by_its_task():
    """Rounding does not shrink with a row's logits: a tenth of its own scale is nothing beside its task's."""
    expected = np.array([[4.0, -4.0], [4.0, -3.0], [0.01, 0.0]])
    found = expected + np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.02]])
    assert tally(expected, found, noise=0.01).ties == 1
    assert tally(expected[2:], found[2:], noise=0.01).ties == 0
    mixed = DifferenceTally(noise=0.01)  # another task's scale does not count
    mixed.add(expected[:2].astype(np.float32), found[:2].astype(np.float32), "large")
    mixed.add(expected[2:].astype(np.float32), found[2:].astype(np.float32), "small")
    assert (mixed.result("mixed", "state", 1).disagreements, mixed.result("mixed", "state", 1).ties) == (1, 0)


@pytest.mark.parametrize("precision", LOW)
def test_a_broken_engine_has_no_ties(precision):
    """Leads are tiny everywhere, and yet a row that moved by more than rounding is a disagreement."""
    gate, rng = Gate.for_precision(precision), np.random.default_rng(0)
    expected = 1 + rng.standard_normal((16, 10)) * 1e-3
    found = 1 + rng.standard_normal((16, 10))
    one = tally(expected, found, noise=gate.noise)
    assert one.ties == 0
    assert one.disagreements > 8
    assert one.disagreement_margin < 0.01
    assert "top-1 agreement" in report(one, gate=gate).failures[0]


def test_what_rounding_does_not_explain_is_said_although_the_answers_agree():
    gate, expected = Gate.for_precision("fp16"), np.array([[4.0, 0.0], [0.0, 4.0]])
    near, far = (tally(expected, expected + shift, noise=gate.noise) for shift in (0.01, 0.5))
    assert (near.unexplained, far.unexplained, tally(expected, expected + 0.5).unexplained) == (0, 2, 0)
    made = report(near, far, gate=gate)
    assert made.passed
    assert made.warnings == [
        "task 't': 2 of 2 images are off by more than the rounding of fp16 explains (0.01 of the logits' scale); "
        "--debug shows where it begins"
    ]
    assert made.to_dict()["warnings"] == made.warnings


def accuracy_of(engine, reference, images, **settings):
    same = tally([[1.0, 2.0]], [[1.0, 2.0]])
    rows = (Accuracy("t", "data", images, engine, reference),)
    return report(same, accuracy=rows, gate=Gate.for_precision("fp16", **settings))


def test_accuracy_loss_is_gated():
    assert accuracy_of(0.97, 0.98, 1000).passed
    assert accuracy_of(0.99, 0.90, 1000).passed  # a gain
    assert accuracy_of(0.969, 0.98, 1000).failures == [
        "task 't': top-1 on data falls from 98.00% to 96.90%, allowed 1 points"
    ]
    assert accuracy_of(15 / 20, 16 / 20, 20).passed  # one image is not evidence
    assert not accuracy_of(14 / 20, 16 / 20, 20).passed
    assert not accuracy_of(15 / 20, 16 / 20, 20, max_accuracy_loss=0.0).passed
    assert not accuracy_of(np.nan, 0.98, 1000).passed
    assert accuracy_of(None, None, 1000).passed
