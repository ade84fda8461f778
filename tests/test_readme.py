"""Every ``prompttune`` command in the documentation and in ``--help`` parses with the command line as it is."""

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from prompttune.cli.main import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = ("…", "...", "[")


def commands_in(text: str) -> list[str]:
    joined = re.sub(r"\\+\n\s*", " ", text)
    found = re.findall(r"^\s*(?:\$ )?(prompttune .*)$", joined, flags=re.MULTILINE)
    return [line.split("  #")[0].strip() for line in found if not any(mark in line for mark in PLACEHOLDERS)]


def documented() -> list[tuple[str, str]]:
    pages = [(page.name, "\n".join(re.findall(r"```.*?```", page.read_text(), flags=re.DOTALL))) for page in PAGES]
    for name, (module, _) in COMMANDS.items():
        command = getattr(importlib.import_module(module), name.replace("-", "_"))
        pages.append((f"{name} --help", command.help or ""))
        if isinstance(command, click.Group):
            pages += [(f"{name} {sub} --help", inner.help or "") for sub, inner in command.commands.items()]
    return [(page, line) for page, text in pages for line in commands_in(text)]


@pytest.mark.parametrize(("page", "line"), documented())
def test_documented_command_parses(page, line):
    command: click.Command = cli
    words = shlex.split(re.sub(r"\$\w+", "0", line.split("|")[0].split(">")[0]))[1:]  # 0 for a shell's variable
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        context = click.Context(command)
        found = command.get_command(context, words[0])
        assert found is not None, f"{page}: no command {words[0]!r}"
        command, words = found, words[1:]
    if words and words[0] in ("--help", "--version", "-h"):
        return
    command.make_context("prompttune", words)  # raises a click error on an unknown option or a bad value


def test_there_are_documented_commands():
    assert len(documented()) > 10
