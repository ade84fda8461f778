"""Accuracy over ``first_block``: how many blocks in front tasks may share, under the settings of ``benchmark demo``.

python -m benchmarks.first_block --precision bf16        # an hour or two on one core; it resumes
python -m benchmarks.first_block --method lora --task digits --first 0 --first 6
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import click
import torch

import prompttune as pt
from benchmarks.common import Run, run_options
from prompttune.benchmark.plan import RunSpec, make_plan
from prompttune.benchmark.recipe import load_recipe
from prompttune.benchmark.worker import run_one
from prompttune.training.config import PRECISIONS

RECIPE = load_recipe("demo")
TASKS_PER_IMAGE = (1, 10, 100)


def begins_in(spec: RunSpec, first: int, precision: str) -> RunSpec:
    """A run of the recipe with another first block."""
    settings = {**spec.settings, "first_block": first, "precision": precision}
    return dataclasses.replace(spec, label=f"{spec.label}-{first}", settings=settings)


def passes(first: int, depth: int, tasks: int) -> float:
    """Blocks that run for one image and so many tasks, in passes of all blocks."""
    return (first + tasks * (depth - first)) / depth


@click.command(help=__doc__)
@click.option("--method", "methods", multiple=True, default=("ssf", "lora", "sa2vp"), show_default=True)
@click.option("--task", "tasks", multiple=True, default=tuple(RECIPE.tasks), show_default=True)
@click.option("--first", "firsts", multiple=True, type=int, default=(0, 3, 6, 9), show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), show_default=True)
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="fp32", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/first-block"), help="Folder of the runs.")
@run_options
def main(
    methods: tuple[str, ...],
    tasks: tuple[str, ...],
    firsts: tuple[int, ...],
    seeds: tuple[int, ...],
    precision: str,
    output: Path,
    run: Run,
) -> None:
    torch.set_num_threads(run.threads)
    load = functools.cache(pt.load_backbone)
    rows: list[dict[str, Any]] = []
    for spec in make_plan(RECIPE, methods, tasks, seeds):
        for first in firsts:
            before = time.time()
            own = begins_in(spec, first, precision)
            found = own.record(output) or run_one(own, output, {})
            depth = load(*(spec.settings[name] for name in ("backbone", "image_size"))).depth
            rows.append(
                {
                    "method": spec.label,
                    "task": spec.task,
                    "first_block": first,
                    "seed": spec.seed,
                    "accuracy": f"{found['accuracy']:.4f}",
                    "epochs": found["epochs"],
                    "train_images": found["train_images"],
                    "test_images": found["test_images"],
                    "parameters_beside_head": found["parameters_beside_head"],
                    **{f"passes_{count}": f"{passes(first, depth, count):.2f}" for count in TASKS_PER_IMAGE},
                    "backbone": found["backbone"],
                    "image_size": found["image_size"],
                    "precision": precision,
                }
            )
            shown = f"{spec.label} {spec.task} {first}: {found['accuracy']:.1%}, {time.time() - before:.0f} s"
            click.echo(shown)
            run.write_csv("first_block", rows)


if __name__ == "__main__":
    main()
