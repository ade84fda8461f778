"""Parts of a self-contained HTML page. All text is escaped here, except markup."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

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
figure svg, figure img { width: 100%; height: auto; }
.plots figure.broad { flex: 1 1 100%; max-width: 80rem; }
figure img { border-radius: .6rem; } details { margin: .75rem 0; } summary { cursor: pointer; }
"""

Cell = tuple[str, str]
"""Text, not escaped, and the CSS class of its cell."""


def page(title: str, parts: Iterable[str]) -> str:
    """A complete page from finished markup; empty parts are skipped."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(titles: Sequence[str], rows: Iterable[Sequence[Cell]], text: int) -> str:
    """A table whose first ``text`` columns hold text; all cells are escaped."""
    head = "".join(
        f'<th class="text">{escape(title)}</th>' if column < text else f"<th>{escape(title)}</th>"
        for column, title in enumerate(titles)
    )
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{escape(value)}</td>' for value, kind in row) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(png: bytes, description: str, broad: bool = False) -> str:
    """A PNG file's bytes as a figure; a broad one gets its own line among ``plots``."""
    data = base64.b64encode(png).decode("ascii")
    kind = ' class="broad"' if broad else ""
    return f'<figure{kind}><img alt="{escape(description)}" src="data:image/png;base64,{data}"></figure>'
