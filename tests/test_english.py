"""Plain English: no text for readers opens with a word without a noun, and nothing "is no" something."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
    "package-dir"
].values()
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
DOCUMENTS = sorted(path for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md") for path in ROOT.glob(pattern))

OPENING = re.compile(r"(?:Of|As|Those|That)\s+\S+\s+\S+")
"""A docstring, a field's doc, a help text or a message of three words or more that opens without its noun."""
IS_NO = re.compile(r"\b(?:is|are)\s+no\s+(?!longer\b)")
ALLOWED: frozenset[str] = frozenset()
"""Whole texts that may break a rule; none so far."""


def faults(text: str) -> list[str]:
    """What a text says that it should not."""
    bare = text.strip()
    opening = OPENING.match(bare)
    return (
        [] if bare in ALLOWED else [*([opening[0]] if opening else []), *(found[0] for found in IS_NO.finditer(bare))]
    )


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and content of every string in a module: docstrings, docs of fields, helps and messages."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Of a request, also after it was decompressed.", "Of a request,"),
        ("As many as there are.", "As many as"),
        ("\n    Those of one version", "Those of one"),
        ("That decode images.", "That decode images."),
        ("there is no task 'x'", "is no "),
        ("values that are no\n    numbers", "are no\n    "),
    ],
)
def test_the_faults_are_found(text: str, fault: str) -> None:
    assert faults(text) == [fault]


@pytest.mark.parametrize(
    "text", ["Number of decoding workers", "the file is no longer there", "As asked", "Offline hosts are skipped"]
)
def test_plain_texts_pass(text: str) -> None:
    assert faults(text) == []


def test_every_string_is_plain_english() -> None:
    assert len(SOURCES) > 300
    found = [f"{path.relative_to(ROOT)}:{line}: {fault!r}" for path in SOURCES for line, text in texts(path)
             for fault in faults(text)]  # fmt: skip
    assert not found, "\n".join(found)


def test_every_document_is_plain_english() -> None:
    assert len(DOCUMENTS) > 15
    found = [f"{path.relative_to(ROOT)}: {fault[0]!r}" for path in DOCUMENTS
             for fault in IS_NO.finditer(path.read_text(encoding="utf-8"))]  # fmt: skip
    assert not found, "\n".join(found)
