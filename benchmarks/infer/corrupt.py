"""Ten thousand files, 500 of them corrupt in ten different ways: error rows, the rest right, memory flat.

python -m benchmarks.infer.corrupt
"""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

import prompttune as pt
from benchmarks.engines import workshop
from benchmarks.infer.common import RESULTS, TINY, make_engine, rows_of, scene, write
from prompttune.serve.infer import InferSettings, Row, infer
from prompttune.serve.memory import resident_bytes

SIZE = (320, 240)
WARM = 0.2
"""Share of the inputs after which memory is taken for settled."""


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    scene(seed, SIZE).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    scene(seed, (64, 48)).save(stream, "PNG")
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in some bytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_crc(data: bytes) -> bytes:
    """A PNG whose pixels are not those of their checksum."""
    at = data.index(b"IDAT") + 12
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


CORRUPTIONS: dict[str, Callable[[int], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda seed: f"this is no image, number {seed}\n".encode() * 20,
    "noise": lambda seed: np.random.default_rng(seed).bytes(4000),
    "header alone": lambda seed: jpeg(seed)[:20],
    "truncated jpeg": lambda seed: jpeg(seed)[: 2000 + seed % 500],
    "truncated png": lambda seed: png(seed)[:700],
    "wrong checksum": lambda seed: broken_crc(png(seed)),
    "bomb": lambda _: bomb(),
    "gif without frames": lambda _: b"GIF89a" + struct.pack("<HHBBB", 64, 48, 0, 0, 0) + b";",
    "html": lambda _: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
}


def fill(folder: Path, files: int, corrupt: int, chance: np.random.Generator) -> dict[str, str]:
    """Write the files; name → how it is corrupt."""
    folder.mkdir()
    good = [jpeg(seed) for seed in range(50)]
    kinds = list(CORRUPTIONS)
    bad = {int(one): kinds[number % len(kinds)] for number, one in enumerate(chance.permutation(files)[:corrupt])}
    for number in range(files):
        data = CORRUPTIONS[bad[number]](number) if number in bad else good[number % len(good)]
        (folder / f"{number:06}.jpg").write_bytes(data)
    return {f"{number:06}.jpg": kind for number, kind in bad.items()}


def check(rows: list[Row], bad: dict[str, str], expected: list[str]) -> tuple[Counter[str], int]:
    """Error rows by kind of corruption, and rows that are wrong."""
    errors: Counter[str] = Counter()
    wrong = 0
    for number, row in enumerate(rows):
        name = Path(row.source).name
        if name in bad:
            errors[bad[name]] += row.error is not None
            wrong += row.error is None
        else:
            wrong += row.label != expected[number % len(expected)]
    return errors, wrong


@click.command(help=__doc__)
@click.option("--files", type=click.IntRange(100), default=10_000, show_default=True)
@click.option("--corrupt", type=click.IntRange(10), default=500, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(files: int, corrupt: int, results: Path) -> None:
    with workshop() as folder:
        engine = pt.Engine(make_engine(folder, TINY), threads=2)
        bad = fill(folder / "images", files, corrupt, np.random.default_rng(0))
        expected = [engine.predict(jpeg(seed), "task0")[0].label for seed in range(50)]
        memory: list[tuple[int, int]] = []
        settings = InferSettings(
            engine.folder.path, (str(folder / "images"),), (str(folder / "rows.jsonl"),), ("task0",)
        )
        summary = infer(settings, engine, lambda now: memory.append((now.inputs, resident_bytes() or 0)))
        rows = [Row.from_dict(one) for one in rows_of(folder / "rows.jsonl")]
        errors, wrong = check(rows, bad, expected)
        settled = [size for inputs, size in memory if inputs >= WARM * files]
        row = {
            "files": files,
            "corrupt": corrupt,
            "ways": len(CORRUPTIONS),
            "error_rows": summary.errors,
            "ways_with_all_errors": sum(count == corrupt // len(CORRUPTIONS) for count in errors.values()),
            "rows": summary.rows,
            "wrong_rows": wrong,
            "mib_when_warm": f"{settled[0] / 2**20:.0f}",
            "mib_at_most": f"{max(settled) / 2**20:.0f}",
            "mib_at_end": f"{settled[-1] / 2**20:.0f}",
            "images_per_s": f"{summary.images_per_s:.1f}",
        }
    write(results, "corrupt_cpu", [row], 2)
    if summary.errors != corrupt or wrong or summary.rows != files:
        raise click.ClickException("not every corrupt file is an error row, or another row is wrong")


if __name__ == "__main__":
    main()
