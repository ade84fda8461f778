"""int8 engines over the fp32 engine of the same task: speed, size, how often they name the same class, and whether
neighbours in a batch change an answer.

With random weights the leads between classes are small, so the agreement is a lower bound; --weights auto or a file
shows a real backbone's.

python -m benchmarks.int8                                # SA²VP, ViT-B/16 at 224, batches of 4 and 8
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

import prompttune as pt
from benchmarks.common import Model, Run, batch_option, model_options, run_options
from benchmarks.engines import CONFIGS, make_engine, save_checkpoint, workshop
from prompttune.export import EngineFolder
from prompttune.export.formats.base import QUANTIZATIONS
from prompttune.export.parity.invariance import check_neighbours
from prompttune.serve.bench.settings import ALL
from prompttune.serve.bench.subjects import noise

_AGREEMENT_BATCH = 8


def agreement(engine: Path, reference: Path, images: int, threads: int) -> tuple[float, float]:
    """Share of images on which both name the same class, and the largest difference of a logit, over every task."""
    opened = [pt.Engine(path, threads=threads) for path in (engine, reference)]
    same, apart = [], 0.0
    for number, task in enumerate(opened[0].tasks):
        for start in range(0, images, _AGREEMENT_BATCH):
            rows = min(_AGREEMENT_BATCH, images - start)
            batch = noise(rows, opened[0].image_size, seed=1000 * number + start)
            found, wanted = (one.logits(batch, task) for one in opened)
            same += (found.argmax(axis=1) == wanted.argmax(axis=1)).tolist()
            apart = max(apart, float(np.abs(found - wanted).max()))
    return float(np.mean(same)), apart


def touched(engine: Path, threads: int) -> float:
    """How far neighbours move an answer, see :class:`prompttune.export.parity.invariance.Neighbours`."""
    opened = pt.Engine(engine, threads=threads)
    images = {task: noise(_AGREEMENT_BATCH, opened.image_size, seed=number) for number, task in enumerate(opened.tasks)}
    return max(one.max_rel for one in check_neighbours(opened, images, (_AGREEMENT_BATCH,), opened.tasks))


def model_bytes(folder: EngineFolder) -> int:
    """Size of the model's files."""
    return sum(file.size for file in folder.manifest.files.values())


@click.command(help=__doc__)
@model_options
@click.option("--method", type=click.Choice(list(CONFIGS)), default="sa2vp", show_default=True)
@batch_option(4, 8)
@click.option(
    "--quantization", "kinds", multiple=True, type=click.Choice(QUANTIZATIONS), default=QUANTIZATIONS, show_default=True
)
@click.option("--tasks", type=click.IntRange(1), default=4, show_default=True)
@click.option("--images", type=click.IntRange(1), default=64, show_default=True, help="Of each task, for agreement.")
@run_options
def main(
    model: Model,
    method: str,
    batches: tuple[int, ...],
    kinds: tuple[str, ...],
    tasks: int,
    images: int,
    run: Run,
) -> None:
    frozen = model.load()
    rows = []
    with workshop() as folder:
        checkpoint = save_checkpoint(method, frozen, folder)
        full = make_engine(checkpoint, folder / "fp32", pt.ExportSettings(), tasks)
        for kind in kinds:
            settings = pt.ExportSettings(precision="int8", quantization=kind)
            engine = make_engine(checkpoint, folder / kind, settings, tasks)
            report = run.bench(engine.path, batches, against=(str(full.path),), mix=(ALL,))
            agrees, apart = agreement(engine.path, full.path, images, run.threads)
            moved = touched(engine.path, run.threads)
            smaller = model_bytes(engine) / model_bytes(full)
            for one in report.measurements:
                if one.engine_over is None:
                    int8 = one
                    continue
                over = one.engine_over.median
                rows.append(
                    {
                        **model.columns,
                        "weights": frozen.weights_source,
                        "method": method,
                        "quantization": kind,
                        "batch": one.batch_size,
                        "time_over_fp32": f"{over:.3f}",
                        "images_per_s": f"{int8.images_per_s:.2f}",
                        "fp32_images_per_s": f"{one.images_per_s:.2f}",
                        "size_over_fp32": f"{smaller:.3f}",
                        "agreement": f"{agrees:.4f}",
                        "max_abs": f"{apart:.4g}",
                        "neighbours_max_rel": f"{moved:.3g}",
                    }
                )
                click.echo(f"{kind:8s} batch {one.batch_size:3d}  {over:.2f} x fp32's time, agreement {agrees:.2%}")
    run.write_csv(f"int8_{method}_{run.target.type}", rows)


if __name__ == "__main__":
    main()
