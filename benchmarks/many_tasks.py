"""An engine of thousands of task folders beside one of two: opening it, and listing, adding and removing tasks.

Commands are timed whole, each in a process of its own; both engines take turns in every round. All tasks are copies of
one, which is enough where nothing but their number matters.

python -m benchmarks.many_tasks                           # 10,000 SA²VP tasks over timm's tiny test_vit
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

import prompttune as pt
from benchmarks.common import Run, run_options
from benchmarks.engines import make_engine, workshop
from prompttune.export import EngineFolder
from prompttune.methods import METHODS
from prompttune.serve.bench import Latency, Ratio
from prompttune.serve.bench.subjects import noise

BACKBONE, IMAGE_SIZE = "test_vit", 64
FEW = 2
ADDED = "added"


def multiply(folder: EngineFolder, output: Path, tasks: int) -> Path:
    """A copy of an engine with copies of its first task, ``tasks`` in all."""
    shutil.copytree(folder.path, output)
    for number in range(len(folder.tasks()), tasks):
        shutil.copytree(output / "tasks/task0", output / f"tasks/task{number}", copy_function=os.link)
    return output


def command(*words: str) -> None:
    """Run ``prompttune tasks`` in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "prompttune.cli.main", "tasks", *words], check=True, stdout=subprocess.DEVNULL
    )


def actions(engine: Path, checkpoint: Path, threads: int) -> dict[str, Callable[[], object]]:
    """What is timed; a task that is added is removed again."""
    images = noise(1, IMAGE_SIZE, seed=0)
    last = EngineFolder(engine, verify=False).tasks()[-1]

    def first_answer() -> None:
        pt.Engine(engine, threads=threads).predict(images, last)

    return {
        "Engine(path)": lambda: pt.Engine(engine, threads=threads),
        "Engine(path), first answer": first_answer,
        "tasks list": lambda: command("list", str(engine)),
        "tasks add": lambda: command("add", str(engine), f"{ADDED}={checkpoint}", "--replace"),
        "tasks remove": lambda: command("remove", str(engine), ADDED),
    }


@click.command(help=__doc__)
@click.option("--tasks", type=click.IntRange(FEW), default=10_000, show_default=True)
@run_options
def main(tasks: int, run: Run) -> None:
    os.environ["OMP_NUM_THREADS"] = str(run.threads)  # of the commands, too
    with workshop() as folder:
        checkpoint = folder / "checkpoint"
        backbone = pt.load_backbone(BACKBONE, IMAGE_SIZE, "random")
        pt.PromptModel(backbone, METHODS["sa2vp"](rank=4), num_classes=10).save(checkpoint)
        exported = make_engine(checkpoint, folder / "few", pt.ExportSettings(), FEW)
        many = multiply(exported, folder / "many", tasks)
        timed = {
            (name, count): call
            for count, engine in ((FEW, exported.path), (tasks, many))
            for name, call in actions(engine, checkpoint, run.threads).items()
        }
        names = list(dict.fromkeys(name for name, _ in timed))
        seconds = run.interleaved({(name, count): timed[name, count] for name in names for count in (FEW, tasks)})
    rows = []
    for name in names:
        few, all_of_them = seconds[name, FEW], seconds[name, tasks]
        over = Ratio.of(all_of_them, few)
        rows.append(
            {
                "backbone": BACKBONE,
                "tasks": tasks,
                "what": name,
                f"p50_ms_of_{FEW}": f"{Latency.of(few).p50_ms:.1f}",
                "p50_ms": f"{Latency.of(all_of_them).p50_ms:.1f}",
                "worst_ms": f"{np.max(all_of_them) * 1e3:.1f}",
                "ratio": f"{over.median:.3f}",
                "ratio_p25": f"{over.p25:.3f}",
                "ratio_p75": f"{over.p75:.3f}",
                "rounds": len(few),
            }
        )
        click.echo("  ".join(f"{value}" for value in rows[-1].values()))
    run.write_csv("many_tasks_cpu", rows)


if __name__ == "__main__":
    main()
