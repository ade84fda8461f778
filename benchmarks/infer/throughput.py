"""Files to rows, end to end, over the engine alone on tensors that are ready, with the same threads.

Both sides run in one process, in turn, over the same number of images: JPEG files of 640 x 480 pixels on the one side,
read, decoded, transformed, classified and written as JSON lines with a row log; batches in memory on the other.

python -m benchmarks.infer.throughput
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import click

import prompttune as pt
from benchmarks.engines import workshop
from benchmarks.infer.common import DINO, RESULTS, make_engine, render, write
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.bench.subjects import noise
from prompttune.serve.infer import InferSettings, infer
from prompttune.serve.infer.settings import Decoding

KINDS = {"rendered": 0.0, "grainy": 0.12}
"""Pictures and their share of noise; with it, files are as large as a camera's and take longer to decode."""


def raw(engine: pt.Engine, images: int, batch: int) -> float:
    """Images a second of the engine alone."""
    ready = noise(batch, engine.image_size, seed=0)
    started = time.perf_counter()
    for _ in range(images // batch):
        engine.logits(ready, "task0")
    return images // batch * batch / (time.perf_counter() - started)


def raw_at_once(engine: pt.Engine, images: int, batch: int, calls: int) -> float:
    """Images a second of the engine alone, ``calls`` calls at once."""
    ready = noise(batch, engine.image_size, seed=0)
    started = time.perf_counter()
    with ThreadPoolExecutor(calls) as pool:
        for one in [pool.submit(engine.logits, ready, "task0") for _ in range(images // batch)]:
            one.result()
    return images // batch * batch / (time.perf_counter() - started)


def whole(engine: Path, folder: Path, output: Path, batch: int, threads: int, decoding: Decoding) -> float:
    """Images a second from files to rows, the opening of the engine left out."""
    settings = InferSettings(
        engine,
        (str(folder),),
        (str(output),),
        ("task0",),
        options=RuntimeOptions(threads=threads, spin=False),
        decoding=decoding,
        batch_size=batch,
        overwrite=True,
    )
    return infer(settings).images_per_s


@click.command(help=__doc__)
@click.option("--images", type=click.IntRange(64), default=2000, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--threads", "counts", multiple=True, type=int, default=(1, 2), show_default=True, help="Of the engine.")
@click.option("--workers", type=click.IntRange(1), help="That decode.  [default: one a core]")
@click.option("--decode", type=click.Choice(["threads", "processes"]), default="threads", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(
    images: int, batch: int, counts: tuple[int, ...], workers: int | None, decode: str, rounds: int, results: Path
) -> None:
    found = []
    decoding = Decoding(workers, decode)
    with workshop() as folder:
        path = make_engine(folder, DINO)
        for (kind, grain), threads in itertools.product(KINDS.items(), counts):
            files = render(folder / kind, images, grain=grain)
            alone = pt.Engine(path, threads=threads)
            apart = pt.Engine(path, threads=1)
            where = path, folder / kind, folder / "rows.jsonl", batch, threads, decoding
            raw(alone, 2 * batch, batch)
            whole(*where)
            measured = [
                (raw(alone, images, batch), raw_at_once(apart, images, batch, threads), whole(*where))
                for _ in range(rounds)
            ]
            engine_rate, apart_rate, infer_rate = (median(column) for column in zip(*measured, strict=True))
            found.append(
                {
                    **DINO.columns,
                    "method": "sa2vp",
                    "images": images,
                    "files": kind,
                    "kib_a_file": f"{sum(file.stat().st_size for file in files) / len(files) / 1024:.0f}",
                    "batch": batch,
                    "engine_threads": threads,
                    "decoders": f"{decoding.count} {decode}",
                    "engine_images_per_s": f"{engine_rate:.1f}",
                    "engine_calls_of_one_thread_images_per_s": f"{apart_rate:.1f}",
                    "infer_images_per_s": f"{infer_rate:.1f}",
                    "ratio": f"{median(end / one for one, _, end in measured):.3f}",
                    "ratio_over_calls_of_one_thread": f"{median(end / one for _, one, end in measured):.3f}",
                    "rounds": rounds,
                }
            )
    write(results, "throughput_cpu", found, max(counts))


if __name__ == "__main__":
    main()
