"""A parity report as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from prompttune.export.figures import Comparison
from prompttune.export.parity import ParityReport
from prompttune.export.plots import divergence, histogram, scatter
from prompttune.files import write_text

LISTED = 10
"""Failures that are listed, the worst first."""
PLOTTED = 12
"""Tasks that are plotted, the furthest off first; the tables hold all."""

_CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1f8a4c; --bad: #cf3a2e; --back: #fff;
  --ink: #1b1f24; --dim: #667; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --ink: #e4e7eb; --dim: #9aa3ad; --good: #4cc481; --bad: #ff7b6e; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2.5rem auto; padding: 0 1.25rem;
  background: var(--back); color: var(--ink); }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .25rem 0; } .dim { color: var(--dim); }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.verdict { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; font-weight: 600; }
.verdict.good { background: #1f8a4c; color: #fff; } .verdict.bad { background: #cf3a2e; color: #fff; }
.warning { border-left: 4px solid #d09a2c; padding: .4rem .9rem; margin: .5rem 0; background: var(--soft); }
.failures { border-left: 4px solid var(--bad); padding: .4rem .9rem; margin: 1rem 0; background: var(--soft); }
.cards, .plots { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.card { flex: 1 1 10rem; border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .9rem; }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--dim); font-weight: 500; } tr:hover td { background: var(--soft); }
th.text, td.text { text-align: left; }
figure { margin: 0; max-width: 56rem; } .plots figure { flex: 1 1 20rem; max-width: 30rem; }
figure svg { width: 100%; height: auto; }
"""

Cell = tuple[str, str]
"""Text, not escaped, and the CSS class of its cell."""


def write_html(report: ParityReport, engine: str, path: Path) -> None:
    """Write the page.

    Args:
        report: what was found.
        engine: what to call the engine.
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
        _comparisons(report),
        _bisection(report),
        _plots(report),
        _swaps(report),
        "<h2>Images</h2>",
        _table(("task", "images"), [[(task, "text"), (words, "text")] for task, words in report.images.items()], 2),
        "<h2>Made with</h2>",
        f"<p>{escape(', '.join(f'{name} {version}' for name, version in report.versions.items()))}</p>",
    ]
    body = "\n".join(part for part in parts if part)
    write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n",
    )


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
    """The figures that are looked at first."""
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
    shown = "".join(
        f'<div class="card">{escape(name)}<b class="{kind}">{value}</b></div>' for name, value, kind in cards
    )
    return f'<div class="cards">{shown}</div>'


def _within(value: float, limit: float | None) -> str:
    """CSS class of a figure; one without a limit has none unless it is not finite."""
    if not math.isfinite(value):
        return "bad"
    return "" if limit is None else _class(value <= limit)


def _accuracy(report: ParityReport) -> str:
    if not report.accuracy:
        return ""
    rows = []
    for one in report.accuracy:
        if one.engine is None or one.reference is None:
            figures = [("", ""), ("", ""), (one.skipped, "")]
        else:
            change = (one.engine - one.reference) * 100
            figures = [(f"{one.engine:.2%}", ""), (f"{one.reference:.2%}", ""), (f"{change:+.2f} points", "")]
        rows.append([(one.task, "text"), (one.data, "text"), (str(one.images), ""), *figures])
    return "<h2>Accuracy</h2>" + _table(
        ("task", "data", "images", "engine top-1", "reference top-1", "change"), rows, 2
    )


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
    return f'<h2>Comparisons</h2><p class="dim">{explained}</p>' + _table(titles, rows, 2)


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
        f"<figure>{divergence(found)}</figure>" + _table(("result", "max |Δ|", "relative", "cosine"), rows, 1) + skipped
    )


def _plots(report: ParityReport) -> str:
    """Logits and differences of each task, from the comparison of most images."""
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
    return "<h2>Swaps A, B, A</h2>" + _table(("A", "B", "batch of A", "batch of B", "A again"), rows, 2)


def _table(titles: Sequence[str], rows: Iterable[Sequence[Cell]], text: int) -> str:
    """A table whose first ``text`` columns hold words; everything is escaped here."""
    head = "".join(
        f'<th class="text">{escape(title)}</th>' if column < text else f"<th>{escape(title)}</th>"
        for column, title in enumerate(titles)
    )
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{escape(value)}</td>' for value, kind in row) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
