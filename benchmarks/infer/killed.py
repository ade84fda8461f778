"""SIGKILL at random moments, then --resume: every row once, and the bytes of a run that was not interrupted.

python -m benchmarks.infer.killed
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import click

from benchmarks.engines import workshop
from benchmarks.infer.common import DINO, RESULTS, command, make_engine, render, rows_of, write
from prompttune.serve.infer.job import COMMIT_S


def answered(folder: Path) -> int:
    """Inputs that the row log of a run has for safe."""
    log = folder / "rows.jsonl.rowlog"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    commits = [line for line in lines if line.startswith(b'{"commit"')]
    return int(json.loads(commits[-1])["commit"]["inputs"]) if commits else -1


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file but the row log, which holds times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".rowlog")
    }


@click.command(help=__doc__)
@click.option("--images", type=click.IntRange(64), default=2000, show_default=True)
@click.option("--kills", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(images: int, kills: int, seed: int, results: Path) -> None:
    chance = random.Random(seed)
    with workshop() as folder:
        engine = make_engine(folder, DINO, tasks=2)
        render(folder / "images", images)

        def words(place: Path) -> list[str]:
            outputs = [f"--output={place / name}" for name in ("rows.jsonl", "rows.csv", "rows.parquet")]
            return [str(folder / "images"), "--task=task0", "--task=task1", *outputs]

        subprocess.run(command(engine, *words(folder / "whole")), check=True)
        moments = []
        for number, least in enumerate(sorted(chance.uniform(0.02, 0.9) * images for _ in range(kills))):
            again = ["--resume"] if number else []
            with subprocess.Popen(command(engine, *words(folder / "killed"), *again)) as process:
                while process.poll() is None and answered(folder / "killed") < least:
                    time.sleep(0.05)
                time.sleep(chance.uniform(0, COMMIT_S))
                process.kill()
            if process.returncode == -signal.SIGKILL:
                moments.append(answered(folder / "killed"))
        subprocess.run(command(engine, *words(folder / "killed"), "--resume"), check=True)
        counts = Counter((row["source"], row["task"]) for row in rows_of(folder / "killed" / "rows.jsonl"))
        same = digest(folder / "whole") == digest(folder / "killed")
        row = {
            **DINO.columns,
            "inputs": images,
            "tasks": 2,
            "kills": len(moments),
            "safe_inputs_at_kills": " ".join(map(str, moments)),
            "rows": sum(counts.values()),
            "missing": 2 * images - len(counts),
            "twice": sum(count > 1 for count in counts.values()),
            "byte_identical": same,
            "files": len(digest(folder / "whole")),
        }
    write(results, "killed_cpu", [row], 2)
    if not same or row["missing"] or row["twice"] or len(moments) < kills:
        raise click.ClickException("not every row is there once")


if __name__ == "__main__":
    main()
