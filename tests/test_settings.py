"""Settings dataclasses: options, values and resume checks made from their fields."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from prompttune.cli.infer import infer
from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand
from prompttune.cli.serve import serve
from prompttune.errors import UsageError
from prompttune.settings import all_settings, make, part, resume_values, setting, settle


def doubled(value: str | int) -> int:
    return value if isinstance(value, int) else 2 * int(value)


@dataclass(frozen=True)
class Inner:
    speed: float = setting(1.5, "Speed of it.", above=0, option="inner_speed", section="Parts")
    hidden: int = 3

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Outer:
    place: Path
    names: tuple[str, ...] = setting((), "Names of it.", option="name", short="-n", repeat=True, shown="all")
    count: int | None = setting(None, "Number of it.", low=1, high=9, envvar="PROMPTTUNE_TEST_COUNT")
    flag: bool = setting(False, "Whether it is.", must_match_on_resume=False)
    twice: int = setting(4, "A number to double.", kind=str, read=doubled, metavar="HALF")
    inner: Inner = part(partial(Inner, hidden=7))

    def __post_init__(self) -> None:
        settle(self)


MADE: list[Outer] = []
ENV = "(env var: 'PROMPTTUNE_TEST_COUNT')"


@click.command(cls=SectionedCommand, settings=lambda: options_of(Outer))
@click.pass_context
def command(ctx: click.Context, /, **_: object) -> None:
    MADE.append(make(Outer, {**given_settings(ctx), "place": Path("here")}))


def run(*words: str, env: dict[str, str] | None = None) -> Outer:
    result = CliRunner().invoke(command, list(words), env=env)
    assert result.exit_code == 0, result.output
    return MADE.pop()


def test_options_give_the_dataclass_and_its_parts():
    assert run() == Outer(Path("here"), inner=Inner(hidden=7))
    words = ("-n", "a", "--name", "b", "--flag", "--twice", "5", "--inner-speed", "2")
    made = run(*words, env={"PROMPTTUNE_TEST_COUNT": "8"})
    assert (made.names, made.count, made.flag, made.twice) == (("a", "b"), 8, True, 10)
    assert made.inner == Inner(2.0, hidden=7)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--count", "10"), f"Invalid value for '--count' {ENV}: count must be at least 1 and at most 9, not 10"),
        (("--count", "none"), f"Invalid value for '--count' {ENV}: count must be a whole number, not 'none'"),
        (("--inner-speed", "nan"), "Invalid value for '--inner-speed': speed must be above 0, not nan"),
    ],
)
def test_a_refused_value_is_one_line_that_names_the_option(words, line):
    result = CliRunner().invoke(command, list(words))
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: {line}")


def test_help_has_defaults_bounds_and_sections():
    text = " ".join(CliRunner().invoke(command, ["--help"]).stdout.split())
    assert "-n, --name TEXT Names of it. [default: all]" in text
    assert "[at least 1 and at most 9] [env var: PROMPTTUNE_TEST_COUNT]" in text
    assert "--flag Whether it is. --twice HALF A number to double. [default: 4]" in text
    assert "Parts: --inner-speed NUMBER Speed of it. [default: 1.5] [above 0]" in text
    assert "hidden" not in text


def test_a_resumed_run_must_share_what_is_not_left_free():
    values = resume_values(Outer(Path("here"), ("a",)))
    assert values == {"place": "here", "name": ["a"], "count": None, "twice": 4, "inner-speed": 1.5, "hidden": 7}


def test_python_gives_the_same_checks():
    with pytest.raises(UsageError, match=r"^count must be at least 1 and at most 9, not 0$"):
        Outer(Path("here"), count=0)
    with pytest.raises(UsageError, match=r"^speed must be above 0, not 0\.0$"):
        Inner(0)


@pytest.mark.parametrize("command", [infer, serve])
def test_every_option_of_a_command_has_its_own_name(command):
    names = [name for option in command.get_params(click.Context(command)) for name in option.opts]
    assert len(names) == len(set(names))


def test_settings_of_parts_are_found_by_their_options():
    assert list(all_settings(Outer)) == ["name", "count", "flag", "twice", "inner_speed"]
