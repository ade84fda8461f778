"""A parity report as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from prompttune.evaluation.page import page, table
from prompttune.evaluation.report import FIGURES, draw, figure_cells, section
from prompttune.evaluation.result import Evaluation, percent
from prompttune.export.parity.accuracy import Sides
from prompttune.export.parity.figures import Comparison
from prompttune.export.parity.plots import divergence, histogram, scatter
from prompttune.export.parity.report import ParityReport
from prompttune.files import write_text

LISTED = 10
"""Largest number of failures in the list, the worst first."""
PLOTTED = 12
"""Largest number of plotted tasks: those with the largest differences, and the first evaluations; tables hold all."""


def write_html(report: ParityReport, engine: str, path: Path) -> None:
    """Write the page.

    Args:
        report: the report.
        engine: name of the engine on the page.
        path: the file to write.
    """
    passed = report.passed
    title = f"Parity of {engine}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p><span class="verdict {_class(passed)}">{"passed" if passed else "failed"}</span></p>',
        f"<p>{escape(report.runtime)}, against {escape(report.reference)}</p>",
        f'<p class="dim">{escape(_thresholds(report))}</p>',
        *(f'<p class="dim">{escape(note)}</p>' for note in report.notes),
        _failures(report.failures),
        *(f'<p class="warning">{escape(line)}</p>' for line in report.warnings),
        _cards(report),
        _accuracy(report),
        _evaluations(report),
        _comparisons(report),
        _bisection(report),
        _plots(report),
        _swaps(report),
        _neighbours(report),
        "<h2>Images</h2>",
        table(("task", "images"), [[(task, "text"), (words, "text")] for task, words in report.images.items()], 2),
        "<h2>Made with</h2>",
        f"<p>{escape(', '.join(f'{name} {version}' for name, version in report.versions.items()))}</p>",
    ]
    write_text(path, page(title, parts))


def _class(good: bool) -> str:
    return "good" if good else "bad"


def _thresholds(report: ParityReport) -> str:
    gate = report.gate
    loss = "" if gate.max_accuracy_loss is None else f", accuracy loss at most {gate.max_accuracy_loss * 100:g} points"
    difference = "no limit on |Δ|" if gate.atol is None else f"|Δ| at most {gate.atol:g}"
    ties = f" (ties within {gate.noise:g} of a row's scale left out)" if gate.noise else ""
    return f"Thresholds ({gate.precision}): {difference}, top-1 agreement at least {gate.min_agreement:.4g}{ties}{loss}"


def _failures(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    shown = "".join(f"<p>{escape(line)}</p>" for line in [*lines[:LISTED], *more])
    return f'<div class="failures">{shown}</div>'


def _cards(report: ParityReport) -> str:
    """The most important figures."""
    gate, comparisons = report.gate, report.comparisons
    agreement = min(one.decided_agreement for one in comparisons)
    cards = [
        ("largest |Δ| of a logit", f"{report.max_abs:.2e}", _within(report.max_abs, gate.atol)),
        ("lowest top-1 agreement", f"{agreement:.2%}", _class(agreement >= gate.min_agreement)),
        ("largest KL divergence", f"{np.max([one.kl_max for one in comparisons]):.2e}", ""),
    ]
    if report.mixed_vs_single is not None:
        within = _within(report.mixed_vs_single, gate.atol)
        cards.append(("mixed against single rows", f"{report.mixed_vs_single:.2e}", within))
    if report.swaps:
        exact = sum(one.exact for one in report.swaps)
        cards.append(("swaps A, B, A exact", f"{exact} of {len(report.swaps)}", _class(exact == len(report.swaps))))
    if report.neighbours:
        apart = float(np.max([one.max_rel for one in report.neighbours]))
        cards.append(("alone against in a batch", f"{apart:.2e}", _within(apart, gate.max_neighbours)))
    shown = "".join(
        f'<div class="card">{escape(name)}<b class="{kind}">{value}</b></div>' for name, value, kind in cards
    )
    return f'<div class="cards">{shown}</div>'


def _within(value: float, limit: float | None) -> str:
    """CSS class of a figure; without a limit, only a figure that is not finite gets one."""
    if not math.isfinite(value):
        return "bad"
    return "" if limit is None else _class(value <= limit)


def _accuracy(report: ParityReport) -> str:
    if not report.accuracy:
        return ""
    rows = []
    for one in report.accuracy:
        if one.engine is None or one.reference is None:
            figures = [("", ""), ("", ""), (one.skipped, ""), ("", ""), ("", "")]
        else:
            change = (one.engine - one.reference) * 100
            figures = [(f"{one.engine:.2%}", ""), (f"{one.reference:.2%}", ""), (f"{change:+.2f} points", "")]
            figures += [(percent(None if side is None else side.ece), "") for side in _sides(one.evaluation)]
        rows.append([(one.task, "text"), (one.data, "text"), (str(one.images), ""), *figures])
    titles = ("task", "data", "images", "engine top-1", "reference top-1", "change", "engine ECE", "reference ECE")
    notes = [f"<p>{escape(one.task)}: {escape(note)}</p>" for one in report.accuracy for note in one.notes]
    return "<h2>Accuracy</h2>" + table(titles, rows, 2) + "".join(notes)


def _sides(found: Sides | None) -> tuple[Evaluation | None, Evaluation | None]:
    return (None, None) if found is None else (found.engine, found.reference)


def _evaluations(report: ParityReport) -> str:
    """Figures of both sides of each task, with pictures and classes of the engine."""
    found = [(one.task, one.data, one.evaluation) for one in report.accuracy if one.evaluation is not None]
    parts = []
    for number, (task, data, sides) in enumerate(found):
        pairs = (("engine", sides.engine), ("reference", sides.reference))
        rows = [[(name, "text"), *figure_cells(evaluation)] for name, evaluation in pairs]
        pictures = draw(sides.engine) if number < PLOTTED else {}
        parts.append(f"<h2>{escape(task)} on {escape(data)}</h2>" + table(("", *FIGURES), rows, 1))
        parts.append('<p class="dim">Of the engine:</p>' + section(task, sides.engine, pictures))
    return "".join(parts)


def _comparisons(report: ParityReport) -> str:
    gate = report.gate
    titles = ["task", "against", "batch", "images", "max |Δ|", "mean |Δ|", "median |Δ|", "max rel", "mean rel"]
    titles += ["median rel", "mean KL", "max KL", "cosine", "top-1", "differ", "ties", "top-5", "least lead"]
    rows = []
    for one in report.comparisons:
        agreement = _class(one.decided_agreement >= gate.min_agreement)
        rows.append(
            [
                (one.task, "text"),
                (one.reference, "text"),
                (str(one.batch_size), ""),
                (str(one.images), ""),
                (f"{one.max_abs:.2e}", _within(one.max_abs, gate.atol)),
                *((f"{value:.2e}", "") for value in (one.mean_abs, one.median_abs)),
                *((f"{value:.2e}", "") for value in (one.max_rel, one.mean_rel, one.median_rel)),
                *((f"{value:.2e}", "") for value in (one.kl_mean, one.kl_max)),
                (f"{one.cosine:.6f}", ""),
                (f"{one.agreement:.2%}", agreement),
                (str(one.disagreements), ""),
                (str(one.ties), ""),
                ("-" if one.top5_agreement is None else f"{one.top5_agreement:.2%}", ""),
                ("-" if one.margin is None else f"{one.margin:.2e}", ""),
            ]
        )
    explained = "Relative differences are over the row's largest absolute reference logit; KL is in nats."
    return f'<h2>Comparisons</h2><p class="dim">{explained}</p>' + table(titles, rows, 2)


def _bisection(report: ParityReport) -> str:
    found = report.bisection
    if found is None:
        return ""
    rows = [
        [
            (one.name, "text"),
            (f"{one.max_abs:.2e}", ""),
            (f"{one.relative:.2e}", _class(one.relative <= found.tolerance)),
            (f"{one.cosine:.6f}", ""),
        ]
        for one in found.probes
    ]
    skipped = f'<p class="dim">Not in the engine: {escape(", ".join(found.skipped))}</p>' if found.skipped else ""
    return (
        f'<h2>Block by block</h2><p class="{_class(found.first is None)}">{escape(found.verdict)}</p>'
        f"<figure>{divergence(found)}</figure>" + table(("result", "max |Δ|", "relative", "cosine"), rows, 1) + skipped
    )


def _plots(report: ParityReport) -> str:
    """Logits and differences of each task, from the comparison with the most images."""
    chosen: dict[str, Comparison] = {}
    for one in report.comparisons:
        if one.task not in chosen or one.images > chosen[one.task].images:
            chosen[one.task] = one
    order = sorted(chosen.values(), key=lambda one: -one.max_rel if math.isfinite(one.max_rel) else -math.inf)
    sections = [
        f'<h2>{escape(one.task)}</h2><p class="dim">{one.images} images, batch size {one.batch_size}, against the '
        f"{escape(one.reference)}; {one.pairs.shape[1]:,} logits</p>"
        f'<div class="plots"><figure>{scatter(one.pairs)}</figure>'
        f"<figure>{histogram(one.pairs, report.gate.atol)}</figure></div>"
        for one in order[:PLOTTED]
    ]
    left = len(order) - PLOTTED
    if left > 0:
        sections.append(f'<p class="dim">{left} more tasks are closer to their reference and not plotted.</p>')
    return "".join(sections)


def _swaps(report: ParityReport) -> str:
    if not report.swaps:
        return ""
    rows = [
        [
            (one.task, "text"),
            (one.other, "text"),
            (str(one.batch_size), ""),
            (str(one.between), ""),
            ("exact" if one.exact else f"off by {one.max_abs:.2e}", _class(one.exact)),
        ]
        for one in report.swaps
    ]
    return "<h2>Swaps A, B, A</h2>" + table(("A", "B", "batch of A", "batch of B", "A again"), rows, 2)


def _neighbours(report: ParityReport) -> str:
    if not report.neighbours:
        return ""
    rows = [
        [
            (one.task, "text"),
            (one.among, "text"),
            (str(one.batch_size), ""),
            (str(one.images), ""),
            (f"{one.max_rel:.2e}", _within(one.max_rel, report.gate.max_neighbours)),
            (str(one.changed), ""),
        ]
        for one in report.neighbours
    ]
    explained = (
        "Each image alone against the same image in a batch; differences are over its largest logit alone, at most "
        f"{report.gate.max_neighbours:g}."
    )
    titles = ("task", "in a batch with", "batch", "images", "max rel", "other top class")
    return f'<h2>Neighbours</h2><p class="dim">{explained}</p>' + table(titles, rows, 2)
