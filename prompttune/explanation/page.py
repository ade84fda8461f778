"""The page of an explanation; it contains every picture."""

from __future__ import annotations

from html import escape
from pathlib import Path

from prompttune.evaluation.page import page, picture, table
from prompttune.explanation.result import Explanation
from prompttune.files import write_text

LEGENDS = {
    "attention": "Attention of the pooled token (the class token, or the mean over the patches), "
    "layer by layer. Each map has its own scale; its brightest half per cent of tokens share a colour.",
    "grad-cam": "Grad-CAM: evidence for the class in the last layer.",
    "similarity": "Similarity: cosine of the framed image token with every token of the prompt map, after each layer.",
    "tsne": "t-SNE shows neighbourhoods; sizes of groups and distances between them mean nothing.",
}


def write_page(result: Explanation, path: Path) -> None:
    """Write the page, atomically."""
    parts = ["<h1>What the runs look at</h1>", _subjects(result)]
    parts += [f'<p class="warning">{escape(note)}</p>' for note in result.notes]
    drawn = {one.file for one in result.pictures}
    parts += [
        f'<p class="dim">{escape(text)}</p>' for part, text in LEGENDS.items() if any(part in file for file in drawn)
    ]
    predictions = {one["image"]: one.get("predictions", {}) for one in result.values["images"]}
    section = None
    for one in result.pictures:
        if one.section != section:
            section = one.section
            parts.append(f"<h2>{escape(section)}</h2>")
            answers = [
                f"{name}: {answer['label']} {answer['probability']:.1%}"
                for name, answer in predictions.get(section, {}).items()
            ]
            parts += [f'<p class="dim">{escape("; ".join(answers))}</p>'] if answers else []
        parts.append(f'<div class="plots">{picture(one.png, one.title, broad=True)}</div>')
    if result.corrupt:
        lines = "".join(f"<p>{escape(line)}</p>" for line in result.corrupt)
        parts.append(f'<h2>Unreadable images</h2><div class="warning">{lines}</div>')
    write_text(path, page("What the runs look at", parts))


def _subjects(result: Explanation) -> str:
    rows = [
        [
            (one["name"], "text"),
            (one["method"] or "none", "text"),
            (one["backbone"], "text"),
            (str(one["image_size"]), ""),
        ]
        for one in result.values["subjects"]
    ]
    return table(("run", "method", "backbone", "pixels"), rows, 3)
