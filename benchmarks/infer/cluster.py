"""The same job here and on a Ray cluster of two nodes on this machine, one of which is killed in the middle.

python -m benchmarks.infer.cluster
"""

from __future__ import annotations

import time
from pathlib import Path

import click
from ray.cluster_utils import Cluster

from benchmarks.engines import workshop
from benchmarks.infer.common import DINO, RESULTS, make_engine, render, write
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.infer import InferSettings, infer
from prompttune.serve.infer.cluster import RaySettings
from prompttune.serve.infer.row_log import RunProgress

NODE_MEMORY = 200 * 2**20


def job(engine: Path, images: Path, output: Path, address: str | None = None) -> InferSettings:
    """The job, here or on a cluster; one thread an engine, so that its rows are the same bits."""
    ray = None if address is None else RaySettings(address, actors=(1, 2), parcel=64, window=4)
    options = RuntimeOptions(threads=1)
    tasks, outputs = ("task0", "task1"), (str(output),)
    return InferSettings(engine, (str(images),), outputs, tasks, options=options, ray=ray, overwrite=True)


@click.command(help=__doc__)
@click.option("--images", type=click.IntRange(256), default=1000, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(images: int, results: Path) -> None:
    arguments = {"object_store_memory": NODE_MEMORY, "include_dashboard": False}
    with workshop() as folder:
        engine = make_engine(folder, DINO, tasks=2)
        render(folder / "images", images)
        here = infer(job(engine, folder / "images", folder / "here.jsonl"))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **arguments})
        nodes = [cluster.add_node(num_cpus=4, object_store_memory=NODE_MEMORY) for _ in range(2)]
        killed: list[float] = []
        started = time.monotonic()

        def kill(progress: RunProgress) -> None:
            if progress.inputs >= images // 4 and not killed:
                killed.append(time.monotonic() - started)
                cluster.remove_node(nodes[0], allow_graceful=False)

        try:
            there = infer(job(engine, folder / "images", folder / "there.jsonl", cluster.address), on_progress=kill)
        finally:
            cluster.shutdown()
        mine, theirs = ((folder / name).read_bytes() for name in ("here.jsonl", "there.jsonl"))
        row = {
            **DINO.columns,
            "inputs": images,
            "tasks": 2,
            "nodes": 2,
            "killed_after_s": f"{killed[0]:.1f}" if killed else "never",
            "rows_here": here.rows,
            "rows_there": there.rows,
            "byte_identical": mine == theirs,
            "images_per_s_here": f"{here.images_per_s:.1f}",
            "images_per_s_there": f"{there.images_per_s:.1f}",
        }
    write(results, "cluster_cpu", [row], 1)
    if mine != theirs or not killed:
        raise click.ClickException("the cluster's rows are not those of this machine, or no node was killed")


if __name__ == "__main__":
    main()
