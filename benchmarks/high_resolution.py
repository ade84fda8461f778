"""SA²VP's window attention by itself on growing images: memory and time of each implementation.

Memory is the most that PyTorch's allocator held at once during a call, what the kernels take for themselves included;
the grid's constants (mask or neighbours), made once, stand in a column of their own. Fused attention is what PyTorch
runs, explicit attention what engines are exported with.

python -m benchmarks.high_resolution                     # heads and channels of ViT-B/16
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Run, ratio, run_options
from prompttune.export.formats.base import ATTENTIONS
from prompttune.layers.aligned_attention import IMPLEMENTATIONS, AlignedAttention
from prompttune.layers.attention import explicit_attention
from prompttune.serve.bench import Latency
from prompttune.serve.bench.report import MEBI

KINDS = tuple(name for name in IMPLEMENTATIONS if name != "auto")
_MEMORY = "[memory]"
"""The profiler's name of an allocation (its size) or a release (minus its size)."""


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most memory that a call holds at once, over what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events, changes = list(profiled.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.name == _MEMORY:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def attend(attention: AlignedAttention, form: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call in one form of the products."""
    with explicit_attention(form == "explicit"):
        found: Tensor = attention(q, k, v)
    return found


@click.command(help=__doc__)
@click.option("--image-size", "sizes", multiple=True, type=int, default=(224, 448, 896), show_default=True)
@click.option("--patch-size", default=16, show_default=True)
@click.option("--window", default=3, show_default=True)
@click.option("--heads", default=12, show_default=True)
@click.option("--channels", default=64, show_default=True, help="Channels of a head.")
@click.option("--batch", default=1, show_default=True)
@run_options
@torch.inference_mode()
def main(
    sizes: tuple[int, ...],
    patch_size: int,
    window: int,
    heads: int,
    channels: int,
    batch: int,
    run: Run,
) -> None:
    target = run.target
    rows, smallest = [], {}
    for size in sizes:
        side = size // patch_size
        tokens = 1 + side * side
        q, k, v = (torch.randn(batch, heads, tokens, channels, device=target) for _ in range(3))
        made = {kind: AlignedAttention((side, side), 1, window, kind).to(target) for kind in KINDS}
        calls = {(kind, form): partial(attend, made[kind], form, q, k, v) for kind in KINDS for form in ATTENTIONS}
        seconds = run.interleaved(calls)
        for (kind, form), call in calls.items():
            peak, latency = peak_bytes(call, target), Latency.of(seconds[kind, form])
            constants = sum(buffer.nbytes for buffer in made[kind].buffers())
            first_tokens, first_bytes = smallest.setdefault((kind, form), (tokens, peak + constants))
            rows.append(
                {
                    "implementation": kind,
                    "attention": form,
                    "image_size": size,
                    "tokens": tokens,
                    "window": window,
                    "heads": heads,
                    "channels": channels,
                    "batch": batch,
                    "peak_mib": f"{peak / MEBI:.2f}",
                    "constants_mib": f"{constants / MEBI:.2f}",
                    "tokens_over_first": f"{tokens / first_tokens:.2f}",
                    "memory_over_first": f"{(peak + constants) / first_bytes:.2f}",
                    "median_ms": f"{latency.p50_ms:.2f}",
                    "time_over_masked_explicit": f"{ratio(seconds[kind, form], seconds['masked', 'explicit']):.3f}",
                }
            )
            last = rows[-1]
            click.echo(
                f"{kind:9s} {form:8s} {size:4d} pixels {tokens:5d} tokens: {last['peak_mib']:>7s} MiB and "
                f"{last['constants_mib']:>6s} MiB constant, {last['median_ms']:>8s} ms; "
                f"tokens x {last['tokens_over_first']}, memory x {last['memory_over_first']}"
            )
    run.write_csv(f"high_resolution_{target.type}", rows)


if __name__ == "__main__":
    main()
