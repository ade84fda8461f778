"""Engines on a CUDA device beside the plain backbone compiled the same way: AOTInductor and ONNX Runtime.

Images come from host memory and logits go back there, on both sides. Parity of each engine with PyTorch is measured
and reported, nothing is refused for it. Written without a CUDA device at hand: only its CPU path has run.

python -m benchmarks.gpu --device cuda
python -m benchmarks.gpu --device cuda --format onnx --precision fp16 --method sa2vp --batch 64
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import click
import torch

import prompttune as pt
from benchmarks.common import DTYPES, Model, Run, batch_option, model_options, run_options
from benchmarks.engines import make_engine, save_checkpoint, workshop
from prompttune.export import FORMATS, EngineFolder
from prompttune.export.formats.base import PRECISIONS
from prompttune.export.layout import stack_states
from prompttune.serve.bench import Latency
from prompttune.serve.bench.subjects import ALL, BACKBONE, ENGINE, MIXES

METHODS = ("sa2vp", "lspt", "vpt-deep")


def gather_ms(folder: EngineFolder, batch: int, run: Run) -> float:
    """Median time of gathering the states of ``batch`` rows from the bank, in eager PyTorch on the device."""
    manifest, target = folder.manifest, run.target
    stacked = stack_states(manifest.layout, [folder.read_task(name).state for name in folder.tasks()])
    dtype = DTYPES[manifest.bank_precision]
    bank = [torch.from_numpy(rows).to(target, dtype) for rows in stacked.values()]
    index = torch.arange(batch, device=target) % len(folder.tasks())

    def gather() -> None:
        for rows in bank:
            rows.index_select(0, index)

    return Latency.of(run.interleaved({"gather": gather})["gather"]).p50_ms


def measure(folder: EngineFolder, batches: Sequence[int], counts: Sequence[int], run: Run) -> Iterator[dict[str, Any]]:
    """Rows of one engine: against its plain backbone, with its parity and the share of gathering."""
    assert folder.manifest.parity is not None
    comparisons = folder.manifest.parity["comparisons"]
    parity = {
        "parity_max_abs": max(one["max_abs"] for one in comparisons),
        "parity_agreement": min(one["agreement"] for one in comparisons),
    }
    gathers = {batch: gather_ms(folder, batch, run) for batch in batches}
    for number, count in enumerate(counts):
        report = run.bench(
            folder.path, batches, against=(BACKBONE,), mixes=MIXES if number == 0 else (ALL,), tasks=count
        )
        for row, one in zip(report.rows(), report.measurements, strict=True):
            gather = gathers[one.batch_size] if one.subject == ENGINE else 0.0
            share = f"{gather / one.latency.p50_ms:.4f}"
            yield {**row, **parity, "gather_ms": f"{gather:.4f}", "gather_share": share}


@click.command(help=__doc__)
@model_options
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), default=METHODS, show_default=True)
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(list(FORMATS)), default=("aoti", "onnx"), show_default=True
)
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), default=("bf16", "fp16"),
    show_default=True,
)  # fmt: skip
@batch_option(1, 8, 64, 256)
@click.option("--tasks", "counts", multiple=True, type=click.IntRange(1), default=(16, 256), show_default=True)
@run_options
def main(
    model: Model,
    methods: tuple[str, ...],
    formats: tuple[str, ...],
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    counts: tuple[int, ...],
    run: Run,
) -> None:
    frozen = model.load()
    rows: list[dict[str, Any]] = []
    for method, format_, precision in itertools.product(methods, formats, precisions):
        settings = pt.ExportSettings(format_, precision, device=run.device)
        with workshop() as folder:
            checkpoint = save_checkpoint(method, frozen, folder)
            engine = make_engine(checkpoint, folder / method, settings, max(counts), parity=True)
            for row in measure(engine, batches, counts, run):
                rows.append(row)
                shown = ("method", "format", "precision", "subject", "batch", "mix", "tasks", "images_per_s")
                click.echo("  ".join(str(row[key]) for key in shown))
    run.write_csv(f"gpu_{run.target.type}", rows)


if __name__ == "__main__":
    main()
