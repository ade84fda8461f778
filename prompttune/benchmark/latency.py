"""Cost of a method at inference: time of its forward relative to the plain backbone's, alternating on one machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prompttune.benchmark.plan import RunSpec

if TYPE_CHECKING:
    from prompttune.backbones import Backbone

BATCH, ROUNDS, WARMUP = 8, 15, 2


@dataclass(frozen=True)
class MethodLatency:
    """Time of one task's forward in PyTorch, float32."""

    label: str
    milliseconds: float
    """Median over the rounds, in milliseconds per batch."""
    over_backbone: float
    """Median over the rounds of the ratio to the plain timm model, measured in the same round."""
    batch: int
    threads: int


@torch.inference_mode()
def measure(
    specs: Mapping[str, RunSpec], backbone: Backbone, device: str = "cpu", classes: int = 16, batch: int = BATCH
) -> list[MethodLatency]:
    """Time the methods of ``specs``, by label, on noise; the task's state is computed beforehand, as in an engine.

    Rounds alternate between all methods, so a disturbance affects all of them.
    """
    from prompttune.model import PromptModel
    from prompttune.training.scoring import resolve_device

    place = resolve_device(device)
    backbone.to(place)
    images = torch.randn(
        batch, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(0)
    ).to(place)
    calls: dict[str, Callable[[], object]] = {"": lambda: backbone.model(images)}
    for label, spec in specs.items():
        config = spec.method_config()
        model = PromptModel(backbone, config, num_classes=classes).to(place).eval()
        state = model.task_state()
        calls[label] = lambda model=model, state=state: model.forward_state(images, state)  # type: ignore[misc]
    seconds = _in_turn(calls, place)
    return [
        MethodLatency(
            label=label,
            milliseconds=statistics.median(seconds[label]) * 1000,
            over_backbone=statistics.median(a / b for a, b in zip(seconds[label], seconds[""], strict=True)),
            batch=batch,
            threads=torch.get_num_threads(),
        )
        for label in specs
    ]


def _in_turn(calls: Mapping[str, Callable[[], object]], place: torch.device) -> dict[str, Sequence[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(WARMUP + ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            if index >= WARMUP:
                seconds[name].append(time.perf_counter() - began)
    return {name: list(values) for name, values in seconds.items()}
