"""The whole suite, one process a benchmark, with the options that all of them share.

python -m benchmarks                                     # every CPU benchmark, results in benchmarks/results/
python -m benchmarks --only mixing --only int8 --rounds 5
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict

import click

from benchmarks.common import Model, Run, model_options, run_options

MODEL_FREE = ("attention", "high_resolution")
SUITE = ("forward", "training_step", *MODEL_FREE, "onnx_methods", "mixing", "int8", "residency")
"""Every benchmark that a CPU answers; ``h200`` is for a CUDA device."""


@click.command(help=__doc__)
@model_options
@click.option("--only", multiple=True, type=click.Choice(SUITE), help="Run this one alone. May be repeated.")
@run_options
def main(model: Model, only: tuple[str, ...], run: Run) -> None:
    failed = []
    for name in only or SUITE:
        values = {**({} if name in MODEL_FREE else asdict(model)), **asdict(run)}
        options = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        command = ["-m", f"benchmarks.{name}", *options]
        click.secho(" ".join(["python", *command]), bold=True)
        if subprocess.run([sys.executable, *command], check=False).returncode:
            failed.append(name)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
