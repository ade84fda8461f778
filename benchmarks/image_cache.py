"""A server's questions about images of which some were asked about before: with the image cache over without it."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import click
import numpy as np

import prompttune as pt
from benchmarks.common import Model, Run, model_options, run_options
from benchmarks.engines import save_checkpoint, workshop
from benchmarks.fan_out import CLASSES, METHODS_HERE
from prompttune.serve.bench.subjects import noise
from prompttune.serve.bench.timing import Ratio

RATES = (0.0, 0.5, 0.9, 1.0)
CACHE_MIB = 512


@click.command(help=__doc__)
@model_options
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS_HERE)), default=("linear",))
@click.option("--questions", type=click.IntRange(1), default=40, show_default=True)
@run_options
def main(model: Model, methods: tuple[str, ...], questions: int, run: Run) -> None:
    frozen, rows = model.load(), []
    fresh = noise(questions + 1, frozen.image_size, 0)
    with workshop() as folder:
        for method in methods:
            name = method.replace(" ", "-")
            checkpoint = save_checkpoint(method, frozen, folder, METHODS_HERE[method], CLASSES, name)
            for kind, split in (("whole", False), ("parts", True)):
                made = pt.ExportSettings(split=split)
                pt.export_engine({"task0": checkpoint}, folder / f"{name}-{kind}", format=made, parity=False)
            whole = pt.Engine(folder / f"{name}-whole", threads=run.threads)
            for rate in RATES:
                parts = pt.Engine(folder / f"{name}-parts", threads=run.threads, image_cache=CACHE_MIB)
                parts.logits(fresh[:1], "task0")
                known = np.random.default_rng(0).permutation(questions) < rate * questions
                shown = [fresh[:1] if hit else fresh[row : row + 1] for row, hit in enumerate(known, 1)]
                calls = [(one, engine) for one in shown for engine in (whole, parts)]
                seconds: dict[int, list[float]] = {id(whole): [], id(parts): []}
                whole.logits(fresh[:1], "task0")
                for image, engine in calls:
                    began = time.perf_counter()
                    engine.logits(image, "task0")
                    seconds[id(engine)].append(time.perf_counter() - began)
                if not np.allclose(parts.logits(fresh[:1], "task0"), whole.logits(fresh[:1], "task0"), atol=1e-4):
                    raise click.ClickException(f"{method}: another answer at a hit rate of {rate}")
                over = Ratio.of(seconds[id(parts)], seconds[id(whole)])
                mean = sum(seconds[id(parts)]) / sum(seconds[id(whole)])
                row: dict[str, Any] = {
                    **model.columns,
                    "method": method,
                    "hit_rate": rate,
                    "questions": questions,
                    "mean_over_whole": f"{mean:.3f}",
                    "median_over_whole": f"{over.median:.3f}",
                    "p50_ms": f"{median(seconds[id(parts)]) * 1e3:.2f}",
                }
                rows.append(row)
                click.echo(" ".join(f"{key}={value}" for key, value in list(row.items())[2:]))
    run.write_csv("image_cache", rows)


if __name__ == "__main__":
    main()
