"""A training step of SA²VP over a forward of the plain model, with and without torch.compile: speed and memory.

python -m benchmarks.training_step --device cuda --precision bf16 --batch 64 --compile
python -m benchmarks.training_step --batch 4                                  # CPU
python -m benchmarks.training_step --precision bf16 --batch 40 --backbone vit_small_patch14_dinov2 --image-size 56

In half precision the step whose frozen weights are cast in every forward is measured beside the one that trains, and
on a CPU the one with the library's fused attention.
"""

from __future__ import annotations

import contextlib
import copy
import resource
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F

import prompttune as pt
from benchmarks.common import DTYPES, Model, Run, model_options, run_options, speed
from prompttune.layers.attention import explicit_attention
from prompttune.methods import METHODS


def training_step(model: pt.PromptModel, images: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(list(model.task_parameters().values()), lr=1e-3)
    weight = model.config.base_loss_weight

    def step() -> None:
        out = model(images)
        loss = F.cross_entropy(out.logits, targets)
        if out.aux_logits is not None:
            loss = weight * loss + (1 - weight) * F.cross_entropy(out.aux_logits, targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def with_fused_attention(step: Callable[[], None]) -> Callable[[], None]:
    def fused() -> None:
        with explicit_attention(explicit=False):
            step()

    return fused


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@click.command(help=__doc__)
@model_options
@click.option("--batch", default=4, show_default=True)
@click.option("--method", type=click.Choice(list(METHODS)), default="sa2vp", show_default=True)
@click.option("--precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=False, help="Measure torch.compile beside eager.")
@run_options
def main(
    model: Model,
    batch: int,
    method: str,
    precision: str,
    compiled: bool,
    run: Run,
) -> None:
    target = run.target
    frozen = model.load().to(target)
    images = torch.randn(batch, 3, model.image_size, model.image_size, device=target)
    targets = torch.randint(0, 100, (batch,), device=target)
    casting, held = frozen, contextlib.ExitStack()
    steps = {"plain forward": torch.inference_mode()(lambda: casting.model(images))}
    if precision != "fp32":
        each = pt.PromptModel(casting, METHODS[method](), num_classes=100).to(target).train()
        frozen = copy.deepcopy(casting)
        held.enter_context(frozen.matrices_in(DTYPES[precision]))
        steps["eager, cast in each forward"] = training_step(each, images, targets)
    trained = pt.PromptModel(frozen, METHODS[method](), num_classes=100).to(target)
    steps["eager"] = training_step(trained.train(), images, targets)
    if target.type == "cpu" and precision != "fp32":
        steps["eager, fused attention"] = with_fused_attention(steps["eager"])
    if compiled:
        plain = torch.compile(casting.model)
        steps["plain forward, compiled"] = torch.inference_mode()(lambda: plain(images))
        faster = pt.PromptModel(frozen, METHODS[method](), num_classes=100).to(target).train()
        faster.compile()
        steps["compiled"] = training_step(faster, images, targets)
    rows = []
    with held, torch.autocast(target.type, DTYPES[precision], enabled=precision != "fp32"):
        memory = {}
        for name, step in steps.items():
            if target.type == "cuda":
                torch.cuda.reset_peak_memory_stats(target)
            step()
            memory[name] = peak_mib(target)
        seconds = run.interleaved(steps)
    for name, values in seconds.items():
        rows.append(
            {
                **model.columns,
                "precision": precision,
                "batch": batch,
                "method": "" if name.startswith("plain") else method,
                "step": name,
                **speed(batch, values, seconds["plain forward"], "over_plain_forward"),
                "peak_mib": f"{memory[name]:.0f}",
            }
        )
        over, images, peak = (rows[-1][key] for key in ("over_plain_forward", "images_per_s", "peak_mib"))
        click.echo(f"{name:28s} {over:>6s} x plain forward  {images:>9s} images/s  {peak:>7s} MiB peak")
    run.write_csv(f"training_step_{target.type}_{precision}", rows)


if __name__ == "__main__":
    main()
