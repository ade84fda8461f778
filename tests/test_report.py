"""The HTML page of a parity report: complete in itself, escaped, and true to the report."""

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from prompttune.cli.engine_options import parity_tables
from prompttune.cli.main import cli
from prompttune.evaluation import Tally as ScoreTally
from prompttune.export import Gate, ParityReport
from prompttune.export.parity.accuracy import Accuracy, Sides
from prompttune.export.parity.bisection import Bisection, Probe
from prompttune.export.parity.figures import DifferenceTally
from prompttune.export.parity.html import LISTED, PLOTTED, write_html
from prompttune.export.parity.invariance import Swap
from tests.engines import exported

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Balanced elements, the classes they carry, and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.references, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes).get("class", "")))
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def comparison(task, shift=0.0, rows=8):
    expected = np.random.default_rng(0).standard_normal((rows, 7)).astype(np.float32)
    tally = DifferenceTally()
    tally.add(expected, expected + np.float32(shift))
    return tally.result(task, "state", 8)


def written(tmp_path, *comparisons, engine="engine", **settings):
    report = ParityReport("ONNX Runtime", {one.task: "8 images" for one in comparisons}, comparisons, 0.0, **settings)
    write_html(report, engine, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    return Page(text), text


def test_everything_is_in_the_page(tmp_path):
    page, text = written(
        tmp_path,
        comparison("digits"),
        comparison("mixed"),
        accuracy=(Accuracy("digits", "demo/digits", 200, 0.97, 0.975), Accuracy("x", "y", 3, skipped="other labels")),
        swaps=(Swap("digits", "x", 1, 8, True, 0.0),),
        bisection=Bisection(
            "digits", 1e-4, (Probe("block0", 1e-7, 1e-7, 1.0), Probe("block1", 0.5, 0.3, 0.9)), ("embed",)
        ),
        notes=("thresholds of fp32",),
        versions={"torch": "2.15"},
    )
    shown = " ".join(page.words)
    for words in ("passed", "97.00%", "97.50%", "-0.50 points", "other labels", "1 of 1", "thresholds of fp32"):
        assert words in shown
    assert "the first intermediate result that diverges is block1" in shown
    assert "Not in the engine: embed" in shown
    assert "torch 2.15" in shown
    assert page.count("svg") == 5  # two for each of two tasks, and the blocks
    assert ("td", "bad") in page.elements  # block1
    assert "currentColor" in text
    assert "prefers-color-scheme: dark" in text


def test_nothing_outside_is_needed(tmp_path):
    page, text = written(tmp_path, comparison("digits"))
    assert page.references
    assert all(one.startswith(("#", "data:")) for one in page.references)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert page.count("script") == page.count("link") == 0


def test_names_are_escaped(tmp_path):
    evil = "<script>alert('&')</script>"
    page, text = written(
        tmp_path,
        comparison(evil),
        engine=evil,
        notes=(evil,),
        versions={evil: evil},
        accuracy=(Accuracy(evil, evil, 1, 0.0, 1.0),),
        swaps=(Swap(evil, evil, 1, 1, False, 0.5),),
        bisection=Bisection(evil, 0.1, (Probe(evil, 1.0, 1.0, 0.0),), (evil,)),
        reference=evil,
    )
    assert page.count("script") == 0
    assert "<script" not in text
    assert " ".join(page.words).count(evil) >= 10


def evaluation(labels, bad=0):
    logits = np.eye(len(labels), dtype=np.float32).repeat(3, axis=0)
    logits[: bad + 1] = logits[::-1][: bad + 1]  # one more than what is not finite is confused with the last class
    logits[:bad] = np.nan
    scores = ScoreTally(len(labels))
    scores.add_logits(logits, np.arange(len(labels)).repeat(3))
    return scores.result(labels)


def test_evaluations_of_both_sides_are_in_the_page(tmp_path):
    evil = "<script>alert('&')</script>"
    sides = Sides(evaluation(["zero", evil], bad=1), evaluation(["zero", evil]))
    rows = (Accuracy("digits", "demo", 6, 4 / 6, 5 / 6, "", 1, ("picture 7",), sides), Accuracy("x", "y", 3, 0.5, 0.5))
    page, text = written(tmp_path, comparison("digits"), accuracy=rows)
    shown = " ".join(page.words)
    for words in ("66.67%", "83.33%", "engine ECE", "balanced", "macro F1", "confused most", "precision"):
        assert words in shown
    assert "the logits of 1 images are not finite" in shown
    assert "the engine's logits are not finite for 1 of 6 images of demo, which count as wrong: picture 7" in shown
    assert page.count("img") == 2  # confusion and reliability of the engine
    assert all(one.startswith(("#", "data:")) for one in page.references)
    assert "<script" not in text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_failed_report_says_so_whatever_the_figures_are(tmp_path, bad):
    page, _ = written(tmp_path, comparison("digits", bad), gate=Gate.for_precision("int8"))
    shown = " ".join(page.words)
    assert "failed" in shown
    assert "not finite" in shown
    assert ("b", "bad") in page.elements
    page, _ = written(tmp_path, comparison("digits", 0.5))
    assert "logits differ by 0.5" in " ".join(page.words)


def test_many_tasks_stay_readable(tmp_path):
    many = [comparison(f"task{number}", shift=number) for number in range(PLOTTED + 3)]
    page, _ = written(tmp_path, *many)
    shown = " ".join(page.words)
    assert page.count("svg") == 2 * PLOTTED
    assert "3 more tasks are closer" in shown
    assert f"and {PLOTTED + 2 - LISTED} more" in shown
    assert "task0" in shown


def test_equal_reports_give_equal_pages(tmp_path):
    _, first = written(tmp_path, comparison("digits"))
    _, second = written(tmp_path, comparison("digits"))
    assert first == second


def test_the_command_writes_both_reports(tmp_path):
    arguments = ["validate", str(exported("linear")), "--images", "4", "--batch-sizes", "1,4"]
    result = CliRunner().invoke(
        cli, [*arguments, "--html", str(tmp_path / "a.html"), "--output", str(tmp_path / "a.json")]
    )
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 120
    values = json.loads((tmp_path / "a.json").read_text())
    assert "ECE" not in result.stdout  # nothing is labelled
    page = Page((tmp_path / "a.html").read_text())
    assert f"{max(one['max_abs'] for one in values['comparisons']):.2e}" in " ".join(page.words)


def test_the_console_shows_the_calibration_error_of_both_sides():
    sides = Sides(evaluation(["a", "b"], bad=1), evaluation(["a", "b"]))
    rows = (Accuracy("t", "data", 6, 4 / 6, 5 / 6, evaluation=sides), Accuracy("u", "d", 2, skipped="other labels"))
    one = comparison("t")
    values = ParityReport("ONNX Runtime", {"t": "8 images"}, (one,), None, accuracy=rows).to_dict()
    stream = io.StringIO()
    parity_tables(Console(file=stream, width=120), values)
    (shown,) = [line for line in stream.getvalue().splitlines() if "66.67%" in line]
    assert shown.split() == [
        "t",
        "data",
        "6",
        "66.67%",
        "83.33%",
        f"{sides.engine.ece:.2%}",
        f"{sides.reference.ece:.2%}",
    ]
    assert "PyTorch ECE" in stream.getvalue()
    assert "other labels" in stream.getvalue()
