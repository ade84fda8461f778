"""SA²VP over convolutions, one choice of its design at a time, by training.

A small ResNet is first trained on two of the built-in tasks (orientation and count), then frozen; every variant learns
the two others (digits and location) from the same images, order and seed. No other backbone's weights are needed, so
the figures compare variants and say nothing about a ResNet that has seen ImageNet.

python -m benchmarks.conv_ablation                       # some minutes on one core
python -m benchmarks.conv_ablation --epochs 4 --only linear --only default
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import prompttune as pt
from benchmarks.common import RESULTS
from prompttune.backbones.base import Backbone, fingerprint_of
from prompttune.backbones.conv import ConvBackbone
from prompttune.data.builtin import load_builtin
from prompttune.images.preprocess import Preprocess
from prompttune.methods import LinearConfig, MethodConfig
from prompttune.methods.base import Method
from prompttune.methods.sa2vp.conv import ConvSA2VP
from prompttune.serve.bench.machine import machine_columns, write_csv

SIZE = 64
PRETRAINED_ON, LEARNT = ("orientation", "count"), ("digits", "location")
MEAN = STD = (0.5, 0.5, 0.5)
BATCH = 25


class Raw(ConvSA2VP):
    """The attention reads the maps as they are."""

    def normalised(self, tokens: Tensor) -> Tensor:
        return tokens


class Early(ConvSA2VP):
    """The pathways meet in stage index 1."""

    meeting_stage = 1


class Late(ConvSA2VP):
    """The pathways meet in stage index 3."""

    meeting_stage = 3


@dataclass(frozen=True)
class RawConfig(pt.SA2VPConfig):
    """See :class:`Raw`."""

    module: ClassVar[type[ConvSA2VP]] = Raw

    def resolved(self, backbone: Backbone) -> RawConfig:  # noqa: ARG002
        return dataclasses.replace(self, prompt_layers=(0,))

    def build(self, backbone: Backbone) -> Method:
        return self.module(self.resolved(backbone), backbone)


@dataclass(frozen=True)
class EarlyConfig(RawConfig):
    """See :class:`Early`."""

    module = Early


@dataclass(frozen=True)
class LateConfig(RawConfig):
    """See :class:`Late`."""

    module = Late


COMMON: dict[str, Any] = {"rank": 8, "dropout": 0.0}
VARIANTS: dict[str, MethodConfig] = {
    "linear": LinearConfig(),
    "default": pt.SA2VPConfig(**COMMON),
    "window 1": pt.SA2VPConfig(**COMMON, window=1),
    "window 5": pt.SA2VPConfig(**COMMON, window=5),
    "global": pt.SA2VPConfig(**COMMON, attention="global"),
    "no adapter": pt.SA2VPConfig(**COMMON, adapter=False),
    "no norm": RawConfig(**COMMON),
    "meet in stage 1": EarlyConfig(**COMMON),
    "meet in stage 3": LateConfig(**COMMON),
}


def read(task: str, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a split, normalised [N, 3, S, S], and their labels [N]."""
    source = load_builtin(task).named[split]
    transform = Preprocess(SIZE, MEAN, STD, "bilinear").transform()
    pairs = [source.load(index) for index in range(min(count, len(source)))]
    return torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def batches(count: int, generator: torch.Generator) -> Sequence[Tensor]:
    """An epoch's rows, shuffled."""
    return torch.randperm(count, generator=generator).split(BATCH)


def schedule(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Cosine to zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))


def pretrained(epochs: int, count: int) -> ConvBackbone:
    """A ResNet of eight blocks, trained on :data:`PRETRAINED_ON` with a head each; its last maps are 8 x 8."""
    torch.manual_seed(0)
    model = ResNet(
        BasicBlock,
        (1, 2, 3, 2),
        num_classes=0,
        channels=(16, 24, 32, 48),
        stem_width=8,
        stem_type="deep",
        output_stride=8,
    )
    tasks = [
        (*read(task, "train", count), nn.Linear(48, len(load_builtin(task).named["train"].classes)))
        for task in PRETRAINED_ON
    ]
    parameters = [*model.parameters(), *(parameter for *_, head in tasks for parameter in head.parameters())]
    optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    decay = schedule(optimiser, epochs * sum(math.ceil(len(images) / BATCH) for images, *_ in tasks))
    model.train()
    for epoch in range(epochs):
        losses = []
        orders = [batches(len(images), generator) for images, *_ in tasks]
        for turn in zip(*orders, strict=False):
            for rows, (images, labels, head) in zip(turn, tasks, strict=True):
                loss = F.cross_entropy(head(model(images[rows])), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                decay.step()
                losses.append(loss.item())
        click.echo(f"backbone: epoch {epoch + 1} of {epochs}, loss {sum(losses) / len(losses):.3f}")
    backbone = ConvBackbone(model, SIZE)
    backbone.name, backbone.mean, backbone.std, backbone.interpolation = "small ResNet", MEAN, STD, "bilinear"
    backbone.weights, backbone.weights_source = "none", "trained here"
    backbone.fingerprint = fingerprint_of(model.state_dict())
    return backbone


def learn(model: pt.PromptModel, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train a task."""
    optimiser = torch.optim.AdamW(list(model.task_parameters().values()), lr=5e-3, weight_decay=1e-4)
    decay = schedule(optimiser, epochs * math.ceil(len(images) / BATCH))
    generator = torch.Generator().manual_seed(1)
    weight = model.config.base_loss_weight
    model.train()
    for _ in range(epochs):
        for rows in batches(len(images), generator):
            out = model(images[rows])
            loss = F.cross_entropy(out.logits, labels[rows])
            if out.aux_logits is not None:
                loss = weight * loss + (1 - weight) * F.cross_entropy(out.aux_logits, labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
    model.eval()


@torch.no_grad()
def accuracy(model: pt.PromptModel, images: Tensor, labels: Tensor) -> float:
    """Top-1 in per cent."""
    right = sum(
        int((model(images[rows]).logits.argmax(1) == labels[rows]).sum())
        for rows in torch.arange(len(labels)).split(100)
    )
    return 100 * right / len(labels)


@click.command(help=__doc__)
@click.option("--pretrain-epochs", default=16, show_default=True)
@click.option("--epochs", default=20, show_default=True, help="Of each variant on each task.")
@click.option("--images", default=500, show_default=True, help="Training images of a task.")
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Run this one alone. May be repeated.")
@click.option("--threads", default=1, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the CSV file.")
def main(pretrain_epochs: int, epochs: int, images: int, only: tuple[str, ...], threads: int, results: Path) -> None:
    torch.set_num_threads(threads)
    backbone = pretrained(pretrain_epochs, 1000)
    machine = machine_columns("cpu", threads, f"python -m benchmarks.conv_ablation {' '.join(sys.argv[1:])}".strip())
    rows: list[dict[str, Any]] = []
    for task in LEARNT:
        train, val = read(task, "train", images), read(task, "val", 400)
        for name in only or VARIANTS:
            started = time.process_time()
            torch.manual_seed(0)
            model = pt.PromptModel(backbone, VARIANTS[name], len(load_builtin(task).named["train"].classes))
            learn(model, *train, epochs)
            own = sum(parameter.numel() for parameter in model.method.parameters())
            rows.append(
                {
                    "task": task,
                    "variant": name,
                    "top1": round(accuracy(model, *val), 2),
                    "train_top1": round(accuracy(model, *train), 2),
                    "parameters": own,
                    "epochs": epochs,
                    "images": images,
                    "cpu_seconds": round(time.process_time() - started, 1),
                }
            )
            click.echo("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
            write_csv(results / "conv_ablation_cpu.csv", rows, machine)  # after each, so that none is lost


if __name__ == "__main__":
    main()
