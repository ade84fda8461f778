"""PyTorch forward of every method over a plain timm model: the price of a task at inference.

python -m benchmarks.forward                       # ViT-B/16 at 224, CPU, batch 1 and 8
python -m benchmarks.forward --device cuda --batch 1 --batch 64 --precision bf16
"""

from __future__ import annotations

import click
import torch

import prompttune as pt
from benchmarks.common import DTYPES, Model, Run, batch_option, model_options, run_options, speed
from prompttune.methods import METHODS


@click.command(help=__doc__)
@model_options
@batch_option(1, 8)
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Default: all.")
@click.option("--precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@run_options
@torch.inference_mode()
def main(
    model: Model,
    batches: tuple[int, ...],
    methods: tuple[str, ...],
    precision: str,
    run: Run,
) -> None:
    target = run.target
    frozen = model.load().to(target)
    models = {name: pt.PromptModel(frozen, METHODS[name](), num_classes=100).to(target).eval() for name in METHODS}
    models = {name: one for name, one in models.items() if not methods or name in methods}
    states = {name: one.task_state() for name, one in models.items()}
    rows = []
    for batch in batches:
        images = torch.randn(batch, 3, model.image_size, model.image_size, device=target)

        def call(name: str, images: torch.Tensor = images) -> None:
            with torch.autocast(target.type, DTYPES[precision], enabled=precision != "fp32"):
                if name == "plain":
                    frozen.model(images)
                else:
                    models[name].forward_state(images, states[name])

        calls = {name: lambda name=name: call(name) for name in ["plain", *models]}
        seconds = run.interleaved(calls)
        for name, values in seconds.items():
            rows.append(
                {
                    **model.columns,
                    "precision": precision,
                    "batch": batch,
                    "method": name,
                    **speed(batch, values, seconds["plain"], "over_plain"),
                }
            )
            over, speed_ = rows[-1]["over_plain"], rows[-1]["images_per_s"]
            click.echo(f"batch {batch:3d}  {name:12s} {over:>6s} x plain  {speed_:>9s} images/s")
    run.write_csv(f"forward_{target.type}_{precision}", rows)


if __name__ == "__main__":
    main()
