"""A parity report as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from prompttune.evaluation.page import Cell, page, table
from prompttune.evaluation.report import FIGURES, draw, figure_cells, section
from prompttune.evaluation.result import Evaluation, percent
from prompttune.export.parity.accuracy import Accuracy
from prompttune.export.parity.figures import Comparison
from prompttune.export.parity.plots import divergence, histogram, scatter
from prompttune.export.parity.report import ParityReport
from prompttune.files import write_text

LISTED = 10
"""Largest number of failures in the list, the worst first."""
PLOTTED = 12
"""Largest number of plotted tasks: those with the largest differences, and the first evaluations; tables hold all."""

SHARES = ("top5_agreement",)
"""Fields that are shown as percentages."""
HIDDEN = ("pairs", "pixels", "unexplained", "disagreement_margin")
"""Fields of a comparison that have no column."""
ABOUT_COMPARISONS = (
    "Relative differences (rel) are over the row's largest absolute reference logit; KL is in nats; margin is the "
    "smallest lead of a class."
)
ABOUT_NEIGHBOURS = "Each image alone against the same image in a batch; max rel is over its largest logit alone."


def write_html(report: ParityReport, engine: str, path: Path) -> None:
    """Write the page; ``engine`` is the engine's name on it."""
    title, gate = f"Parity of {engine}", report.gate
    compared = {"agreement": gate.min_agreement, "max_abs": gate.atol}
    made_with = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p><span class="verdict {_class(report.passed)}">{"passed" if report.passed else "failed"}</span></p>',
        f"<p>{escape(report.runtime)}, against {escape(report.reference)}</p>",
        *(f'<p class="dim">{escape(line)}</p>' for line in (_thresholds(report), *report.notes)),
        _failures(report.failures),
        *(f'<p class="warning">{escape(line)}</p>' for line in report.warnings),
        _cards(report),
        *_accuracy(report),
        _records("Comparisons", report.comparisons, compared, ABOUT_COMPARISONS),
        *_bisection(report),
        *_plots(report),
        _records("Swaps A, B, A", report.swaps, {}),
        _records("Neighbours", report.neighbours, {"max_rel": gate.max_neighbours}, ABOUT_NEIGHBOURS),
        "<h2>Images</h2>",
        table(("task", "images"), [[(task, "text"), (words, "text")] for task, words in report.images.items()], 2),
        f"<h2>Made with</h2><p>{escape(made_with)}</p>",
    ]
    write_text(path, page(title, parts))


def _class(good: bool) -> str:
    return "good" if good else "bad"


def _within(value: float, limit: float | None) -> str:
    """CSS class of a figure; without a limit, only a figure that is not finite gets one."""
    if not math.isfinite(value):
        return "bad"
    return "" if limit is None else _class(value <= limit)


def _records(title: str, records: Sequence[Any], limits: Mapping[str, float | None], about: str = "") -> str:
    """A headline and a table with a column for each field of some dataclasses; ``limits`` by field."""
    if not records:
        return ""
    names = [field.name for field in dataclasses.fields(records[0]) if field.name not in HIDDEN]
    rows = [[_cell(one, name, limits.get(name)) for name in names] for one in records]
    texts = sum(kind == "text" for _, kind in rows[0])
    titles = [name.replace("_", " ") for name in names]
    return f'<h2>{escape(title)}</h2><p class="dim">{escape(about)}</p>' + table(titles, rows, texts)


def _cell(record: Any, name: str, limit: float | None) -> Cell:
    value = getattr(record, name)
    if isinstance(value, str):
        return value, "text"
    if isinstance(value, bool):
        return ("yes" if value else "no"), _class(value)
    if isinstance(record, Comparison) and name == "agreement":
        return f"{value:.2%}", _class(record.decided_agreement >= (limit or 0))
    if isinstance(value, float):
        return format(value, ".2%" if name in SHARES else ".2e"), _within(value, limit)
    return ("-" if value is None else str(value)), ""


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


def _accuracy(report: ParityReport) -> Iterator[str]:
    """The score of both sides, then all figures of both sides of each task, with pictures and classes of the engine."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    def change(one: Accuracy) -> str:
        scored = one.engine is not None and one.reference is not None
        return f"{(one.engine - one.reference) * 100:+.2f} points" if scored else one.skipped  # type: ignore[operator]

    rows = []
    for one in report.accuracy:
        both = one.evaluation
        figures = [share(one.engine), share(one.reference), change(one)]
        sides = (None, None) if both is None else (both.engine, both.reference)
        figures += [percent(getattr(side, "ece", None)) for side in sides]
        rows.append([(one.task, "text"), (one.data, "text"), (str(one.images), ""), *((text, "") for text in figures)])
    if rows:
        engine, reference = (f"{side} {report.accuracy[0].metric}" for side in ("engine", "reference"))
        titles = ("task", "data", "images", engine, reference, "change", "engine ECE", "reference ECE")
        yield "<h2>Accuracy</h2>" + table(titles, rows, 2)
    yield from (f"<p>{escape(one.task)}: {escape(note)}</p>" for one in report.accuracy for note in one.notes)
    evaluated = [(one, one.evaluation) for one in report.accuracy if one.evaluation is not None]
    for number, (one, found) in enumerate(evaluated):
        yield f"<h2>{escape(one.task)} on {escape(one.data)}</h2>"
        pairs = (("engine", found.engine), ("reference", found.reference))
        if isinstance(found.engine, Evaluation):
            rows = [[(name, "text"), *figure_cells(side)] for name, side in pairs if isinstance(side, Evaluation)]
            pictures = draw(found.engine) if number < PLOTTED else {}
            yield table(("", *FIGURES), rows, 1) + '<p class="dim">Of the engine:</p>'
            yield section(one.task, found.engine, pictures)
            continue
        for name, side in pairs:
            yield f'<p class="dim">Of the {name}:</p>'
            for plain in side.tables():
                yield table(plain.titles, [[(text, "") for text in row] for row in plain.rows], 0)


def _bisection(report: ParityReport) -> Iterator[str]:
    if (found := report.bisection) is not None:
        yield _records("Block by block", found.probes, {"relative": found.tolerance}, found.verdict)
        yield f"<figure>{divergence(found)}</figure>"
        if found.skipped:
            yield f'<p class="dim">Not in the engine: {escape(", ".join(found.skipped))}</p>'


def _plots(report: ParityReport) -> Iterator[str]:
    """Logits and differences of each task, from the comparison with the most images."""
    chosen: dict[str, Comparison] = {}
    for one in report.comparisons:
        if one.task not in chosen or one.images > chosen[one.task].images:
            chosen[one.task] = one
    order = sorted(chosen.values(), key=lambda one: -one.max_rel if math.isfinite(one.max_rel) else -math.inf)
    for one in order[:PLOTTED]:
        about = f"{one.images} images, batch size {one.batch_size}, against the {one.reference}"
        yield (
            f'<h2>{escape(one.task)}</h2><p class="dim">{escape(about)}; {one.pairs.shape[1]:,} logits</p>'
            f'<div class="plots"><figure>{scatter(one.pairs)}</figure>'
            f"<figure>{histogram(one.pairs, report.gate.atol)}</figure></div>"
        )
    if len(order) > PLOTTED:
        left = len(order) - PLOTTED
        yield f'<p class="dim">{left} more tasks are closer to their reference and not plotted.</p>'
