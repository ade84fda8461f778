"""Aligned attention on growing grids and windows: one masked N x N product against gathered windows.

python -m benchmarks.attention
"""

from __future__ import annotations

import itertools
from functools import partial

import click
import torch

from benchmarks.common import Run, ratio, run_options
from prompttune.layers.aligned_attention import AlignedAttention


@click.command(help=__doc__)
@click.option("--side", "sides", multiple=True, type=int, default=(4, 14, 24, 32, 48, 64), show_default=True)
@click.option("--window", "windows", multiple=True, type=int, default=(3, 5, 7), show_default=True)
@click.option("--heads", default=12, show_default=True)
@click.option("--channels", default=64, show_default=True, help="Channels of a head.")
@run_options
@torch.inference_mode()
def main(
    sides: tuple[int, ...],
    windows: tuple[int, ...],
    heads: int,
    channels: int,
    run: Run,
) -> None:
    target = run.target
    rows = []
    for window, side in itertools.product(windows, sides):
        q, k, v = (torch.randn(1, heads, 1 + side * side, channels, device=target) for _ in range(3))
        kinds = {name: AlignedAttention((side, side), 1, window, name).to(target) for name in ("masked", "gathered")}
        seconds = run.interleaved({name: partial(kind, q, k, v) for name, kind in kinds.items()})
        over = ratio(seconds["gathered"], seconds["masked"])
        rows.append({"side": side, "tokens": q.shape[2], "window": window, "gathered_over_masked": f"{over:.3f}"})
        click.echo(f"window {window}, {side:3d} x {side:<3d} gathered takes {over:6.2f} x masked")
    run.write_csv(f"attention_{target.type}", rows)


if __name__ == "__main__":
    main()
