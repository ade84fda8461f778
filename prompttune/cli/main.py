"""The root command. Commands are imported when they are called, so ``prompttune --help`` stays fast."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, TextIO

import click

from prompttune.errors import NO_MEMORY, PrompttuneError, describe_failure
from prompttune.version import __version__

COMMANDS = {
    "train": ("prompttune.cli.train", "Train one task, or several, over a frozen backbone."),
    "meta": ("prompttune.cli.meta", "Meta-learn dam-vp's initial prompt."),
    "import-checkpoint": (
        "prompttune.cli.import_checkpoint",
        "Import a released SA²VP, VPT, GaPT or PEFT LoRA checkpoint.",
    ),
    "evaluate": ("prompttune.cli.evaluate", "Report the accuracy of a prompt checkpoint."),
    "explain": ("prompttune.cli.explain", "Draw explanations of runs: attention, Grad-CAM, similarity, t-SNE."),
    "export": ("prompttune.cli.export", "Export backbone and method once; tasks become inputs."),
    "tasks": ("prompttune.cli.tasks", "Add, remove or list the tasks of an engine."),
    "validate": ("prompttune.cli.validate", "Prove that an engine's answers agree with PyTorch's."),
    "infer": ("prompttune.cli.infer", "Classify images with a task of an engine."),
    "serve": ("prompttune.cli.serve", "Serve an engine's tasks over HTTP and gRPC."),
    "bench": ("prompttune.cli.bench", "Time an engine against its plain backbone, PyTorch or other engines."),
    "benchmark": ("prompttune.cli.benchmark", "Train methods by a protocol and tabulate their accuracy."),
    "demo": ("prompttune.cli.demo", "Run the main workflow end to end on real images."),
    "backbones": ("prompttune.cli.backbones", "List the backbones, or describe one."),
    "doctor": ("prompttune.cli.doctor", "Show versions, devices, providers and weights."),
}


TRACEBACK = "PROMPTTUNE_TRACEBACK"
"""Environment variable that makes unexpected errors show their traceback."""


class LazyGroup(click.Group):
    """A click group that imports a command's module when the command is used, and prints errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Name the commands in the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name.replace("-", "_"))
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name][0]}.{cmd_name} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; any early end becomes one line and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except PrompttuneError as problem:
            click.echo(f"Error: {problem}", err=True)
            ctx.exit(problem.exit_code)
        except Exception as problem:
            if os.environ.get(TRACEBACK) or (isinstance(problem, BrokenPipeError) and _is_unread(sys.stdout)):
                raise  # click ends quietly when the reader of the output has left
            line = describe_failure(problem)
            expected = isinstance(problem, OSError) or line.startswith(NO_MEMORY)
            hint = "" if expected else f"; prompttune did not expect this: {TRACEBACK}=1 shows where it happened"
            click.echo(f"Error: {line}{hint}", err=True)
            ctx.exit(1)


def _is_unread(stream: TextIO) -> bool:
    try:
        stream.flush()
    except BrokenPipeError:
        return True
    return False


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="prompttune")
def cli() -> None:
    """Train visual prompts over one frozen backbone, export it once, swap tasks as inputs.

    \b
    prompttune train --backbone vit_small_patch14_dinov2 --image-size 56 \\
        --method sa2vp --data demo/digits --output runs/digits
    prompttune export runs/digits --format onnx --output engine
    prompttune infer engine --task digits photos/ --output predictions.jsonl
    """


def main() -> None:
    """Entry point of the ``prompttune`` script."""
    sys.exit(cli(prog_name="prompttune"))


if __name__ == "__main__":
    main()
