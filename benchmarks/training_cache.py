"""Training on image states that are computed once: many epochs of ``linear`` over one pass, an epoch over one without.

python -m benchmarks.training_cache --backbone vit_small_patch14_dinov2 --image-size 56 --weights auto --rounds 3
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

import prompttune as pt
from benchmarks.common import Model, Run, model_options, ratio, run_options
from prompttune.data import load_data, make_loader
from prompttune.serve.bench import Latency
from prompttune.training import Progress, TrainConfig, train

TUNED = {"lora": {"first_block": 9}, "vpt-deep": {"first_block": 9}, "vqt": {}}
SETTINGS = {"workers": 0, "data": "demo/digits"}


class Marks:
    """Seconds of a run's parts: the image states of both splits, and the epochs with all that is written meanwhile."""

    def __init__(self) -> None:
        self.begin = self.kept = self.end = 0.0

    def __call__(self, news: Progress) -> None:
        now = time.perf_counter()
        if news.phase == "note" and "are computed once" in news.text:
            self.begin = self.begin or now
        elif news.phase == "keep":
            self.kept = now
        elif news.phase == "epoch":
            self.end = now


def settings(model: Model, run: Run, method: str, **changes: Any) -> TrainConfig:
    shared = {"backbone": model.backbone, "image_size": model.image_size, "weights": model.weights}
    return TrainConfig.from_flat({**SETTINGS, **shared, "device": run.device, "method": method, **changes})


def seconds_of_pass(backbone: pt.Backbone, config: TrainConfig, split: str, device: torch.device) -> float:
    """Seconds to read all images of a split and compute their image states."""
    splits = load_data(str(config.data), limit=config.limit, seed=config.seed)
    source = getattr(splits, split)
    model = pt.PromptModel(backbone, config.method_config(), num_classes=len(splits.classes)).to(device).eval()
    loader = make_loader(
        source, model.preprocess.transform(), batch_size=config.batch_size, shuffle=False, seed=0
    )  # fmt: skip
    began = time.perf_counter()
    with torch.no_grad():
        for batch in loader:
            model.image_state(batch.images.to(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def of_linear(model: Model, run: Run, folder: Path, limit: int, epochs: int) -> dict[str, Any]:
    """Many epochs of ``linear`` beside one pass over its images."""
    config = settings(model, run, "linear", limit=limit, epochs=epochs, output=str(folder / "linear"))
    backbone = model.load().to(run.target)
    seconds: dict[str, list[float]] = {"train": [], "both": [], "epochs": [], "run": []}
    for number in range(run.rounds):
        passes = [seconds_of_pass(backbone, config, split, run.target) for split in ("train", "val")]
        marks = Marks()
        train(config, backbone, overwrite=number > 0, on_progress=marks)
        for name, value in zip(
            seconds, (passes[0], sum(passes), marks.end - marks.kept, marks.end - marks.begin), strict=True
        ):
            seconds[name].append(value)
    return {
        "method": "linear",
        "what": f"{epochs} epochs over one pass over the training images",
        "seconds": f"{Latency.of(seconds['epochs']).p50_ms / 1e3:.2f}",
        "reference_s": f"{Latency.of(seconds['train']).p50_ms / 1e3:.2f}",
        "ratio": f"{ratio(seconds['epochs'], seconds['train']):.3f}",
        "with_image_states_over_pass_of_both_splits": f"{ratio(seconds['run'], seconds['both']):.3f}",
    }


def of_epoch(model: Model, run: Run, folder: Path, method: str, limit: int) -> dict[str, Any]:
    """The second epoch of a method with and without the cache."""
    backbone = model.load().to(run.target)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(run.rounds):
        for cache, values in seconds.items():
            output = str(folder / f"{method}-{cache}")
            config = settings(model, run, method, limit=limit, epochs=2, cache=cache, output=output, **TUNED[method])
            result = train(config, backbone, overwrite=number > 0)
            values.append(result.metrics["history"][1]["seconds"])
    return {
        "method": method,
        "what": "an epoch with the cache over one without",
        "seconds": f"{Latency.of(seconds[True]).p50_ms / 1e3:.2f}",
        "reference_s": f"{Latency.of(seconds[False]).p50_ms / 1e3:.2f}",
        "ratio": f"{ratio(seconds[True], seconds[False]):.3f}",
        "with_image_states_over_pass_of_both_splits": "",
    }


@click.command(help=__doc__)
@click.option("--limit", default=1000, show_default=True, help="Images of each split for linear.")
@click.option("--epochs", default=100, show_default=True, help="Epochs of linear.")
@click.option("--few", default=200, show_default=True, help="Images of each split for the other methods.")
@model_options
@run_options
def main(limit: int, epochs: int, few: int, model: Model, run: Run) -> None:
    torch.set_num_threads(run.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"images": limit, **of_linear(model, run, folder, limit, epochs)}]
        rows += [{"images": few, **of_epoch(model, run, folder, method, few)} for method in TUNED]
    for row in rows:
        row.update(model.columns, rounds=run.rounds)
        click.echo("  ".join(f"{value}" for value in row.values()))
    run.write_csv(f"training_cache_{run.target.type}", rows)


if __name__ == "__main__":
    main()
