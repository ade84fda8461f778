"""Every name that timm knows through ``load_backbone``: what loads, whether its features are timm's, which methods run.

Models that run in blocks are built with few of them and at a small image size; their weights are drawn far from
initial values and loaded from a file, once by ``load_backbone`` and once by timm. A model that runs as a whole keeps
its initial weights and is compared with timm's own forward, at a small size too if it takes several.

    python -m benchmarks.backbones --part 0/2
    python -m benchmarks.backbones --engines     # an fp32 engine of the smallest model of each family
"""

from __future__ import annotations

import csv
import gc
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import timm
import torch
from safetensors.torch import save_file

import prompttune as pt
from benchmarks.common import RESULTS
from prompttune.backbones.catalogue import describe_backbone, families
from prompttune.errors import BackboneError, ParityError, PrompttuneError, UsageError, describe_failure
from prompttune.methods import METHODS

SHORT: tuple[dict[str, Any], ...] = (
    {"depth": 2},
    {"depths": (1, 1, 2, 1)},
    {"layers": (1, 1, 2, 1)},
)
"""Arguments that make a model small; the first that timm takes is used."""
IN_BLOCKS = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vitamin",
    "deit",
    "eva",
    "swin_transformer",
    "swin_transformer_v2",
    "convnext",
    "resnet",
)
"""Modules of timm whose models are shortened: those of a kind that runs in blocks."""
LARGEST = 60e6
"""Parameters of the largest model that is filled; a larger one is only built without memory."""
WHOLE_SIZE = 96
"""Image size of a model that runs as a whole, if it takes several."""
COLUMNS = ("name", "module", "kind", "width", "methods", "linear_difference", "problem", "seconds")


@contextmanager
def shortened(module: str) -> Iterator[None]:
    """Let ``timm.create_model`` build models of few blocks."""
    real: Callable[..., Any] = timm.create_model

    def short(name: str, **settings: Any) -> Any:
        for fewer in SHORT if module in IN_BLOCKS else ():
            try:
                return real(name, **{**fewer, **settings})
            except (TypeError, AssertionError):
                continue
        return real(name, **settings)

    timm.create_model = short
    try:
        yield
    finally:
        timm.create_model = real


def rough(state: dict[str, torch.Tensor], gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Tensors like those of ``state``, far from initial values, so that no part of a model hides.

    ``gain`` is that of linear layers and convolutions.
    """
    drawn = torch.Generator().manual_seed(0)
    made = {}
    for name, tensor in state.items():
        value = torch.randn(tensor.shape, generator=drawn) if tensor.is_floating_point() else tensor
        leaf = name.rpartition(".")[2]
        if not tensor.is_floating_point():
            pass
        elif leaf == "running_var":
            value = value.abs() * 0.5 + 0.5
        elif leaf in ("running_mean", "bias", "beta"):
            value = value * 0.2
        elif tensor.ndim == 1:
            value = (0.5 if "gamma" in leaf else 1.0) + value * 0.2
        elif "embed" in leaf or "token" in leaf or "table" in leaf:
            value = value * 0.5
        else:
            value = value * gain / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim else tensor
        made[name] = value.to(tensor.dtype).contiguous()
    return made


def small_size(model: Any, module: str) -> int | None:
    """A small image size that the model takes; None for its own."""
    if module in ("convnext", "resnet"):
        return 64
    if module in IN_BLOCKS:
        patch, own = int(model.patch_embed.feat_ratio()), int(model.patch_embed.img_size[0])
        return own // 2 if "swin" in module else 4 * patch
    return None


@torch.no_grad()
def examine(row: dict[str, Any], folder: Path) -> None:
    """Fill one row of the table of names."""
    row["module"] = timm.models.model_entrypoint(row["name"]).__module__.rpartition(".")[2]
    with shortened(row["module"]):
        row |= _loaded(row["name"], row["module"], folder)


def _loaded(name: str, module: str, folder: Path) -> dict[str, Any]:
    with torch.device("meta"):
        count = sum(one.numel() for one in timm.create_model(name, num_classes=0).parameters())
    if count > LARGEST:
        found = describe_backbone(name)
        return {"kind": found.kind.__name__, "width": found.width, "problem": f"{count / 1e6:.0f} M: built, not filled"}
    weights, size = "random", None
    if module in IN_BLOCKS:
        donor = timm.create_model(name, num_classes=0)
        weights, size = str(folder / "weights.safetensors"), small_size(donor, module)
        save_file(rough(donor.state_dict()), weights)
    try:
        backbone = pt.load_backbone(name, size or WHOLE_SIZE, weights)
    except UsageError:  # it takes one size alone
        backbone = pt.load_backbone(name, weights=weights)
    side = backbone.image_size
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    features = backbone(images)
    theirs = _by_timm(backbone, module, name, size, weights)
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    difference = float((features - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    runs = [method for method in METHODS if _runs(backbone, method, images)]
    return {
        "kind": type(backbone).__name__,
        "width": backbone.width,
        "methods": len(runs),
        "linear_difference": f"{difference:.1e}",
    }


def _by_timm(backbone: pt.Backbone, module: str, name: str, size: int | None, weights: str) -> Any:
    """The model as timm itself loads it at this size; the backbone's own model if it runs as a whole."""
    if module not in IN_BLOCKS:
        return backbone.model
    sized = {} if module in ("convnext", "resnet") or size is None else {"img_size": size}
    overlay = {"file": weights, "num_classes": 0}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **sized).eval()
    except OSError:  # some hybrids ask the hub for the weights of their convolutions as well
        return backbone.model


def _runs(backbone: pt.Backbone, method: str, images: torch.Tensor) -> bool:
    if not any(isinstance(backbone, one.backbones) for one in METHODS[method].modules):
        return False
    if method in ("linear", "full", "dam-vp"):  # they need the features alone, which are there
        return True
    try:
        model = pt.PromptModel(backbone, METHODS[method](), num_classes=3).eval()
    except BackboneError:
        return False
    return bool(torch.isfinite(model(images).logits).all())


ENGINE_COLUMNS = (
    "family",
    "name",
    "kind",
    "parameters",
    "image_size",
    "gain",
    "moved_by_1e-6",
    "max_abs",
    "max_rel",
    "problem",
    "seconds",
)


def engine_of(row: dict[str, Any], folder: Path, names: Sequence[str]) -> None:
    """Fill one row of the table of engines: ``linear`` over the smallest of ``names``, exported with its parity.

    A deep model without norms on its residual path amplifies rounding under drawn weights. Where no float32 engine can
    agree so, the matrices are drawn with a gain of one half. ``moved_by_1e-6`` is what noise of 1e-6 in the image does
    to the features, over their largest value.
    """
    smallest = min(map(describe_backbone, names), key=lambda one: one.parameters)
    row |= {"name": smallest.name, "kind": smallest.kind.__name__, "parameters": smallest.parameters}
    row["image_size"] = smallest.image_size
    try:
        _export(row, folder, gain=1.0)
    except ParityError:
        _export(row, folder, gain=0.5)


def _export(row: dict[str, Any], folder: Path, gain: float) -> None:
    run, weights = folder / "run", folder / "weights.safetensors"
    row["gain"] = gain
    save_file(rough(timm.create_model(row["name"], num_classes=0).state_dict(), gain), weights)
    backbone = pt.load_backbone(row["name"], weights=weights)
    model = pt.PromptModel(backbone, "linear", 3)
    with torch.no_grad():
        images = torch.randn(1, 3, backbone.image_size, backbone.image_size)
        features = backbone(images)
        apart = (backbone(images + 1e-6 * torch.randn_like(images)) - features).abs().max()
    row["moved_by_1e-6"] = f"{float(apart / features.abs().max()):.1e}"
    torch.nn.init.normal_(model.head.weight, std=1 / float(features.norm()))  # logits of about 1
    model.save(run)
    engine = pt.export_engine([run], folder / "engine", batch_sizes=(1, 2), images=2, overwrite=True)
    assert engine.manifest.parity is not None
    compared = engine.manifest.parity["comparisons"]
    row |= {key: f"{max(one[key] for one in compared):.1e}" for key in ("max_abs", "max_rel")}


def fill(file: Path, columns: Sequence[str], todo: Mapping[str, Callable[[dict[str, Any], Path], None]]) -> list[Any]:
    """Append the rows that a CSV file lacks, each as soon as it is there; the key is the first column.

    What fails is a row with its problem.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {row[columns[0]] for row in csv.DictReader(file.open())} if file.exists() else set()
    with file.open("a", newline="") as out, tempfile.TemporaryDirectory() as folder:
        table = csv.DictWriter(out, columns)
        if not done:
            table.writeheader()
        for key, make in todo.items():
            if key in done:
                continue
            row, begun = {columns[0]: key, "problem": ""}, time.perf_counter()
            try:
                make(row, Path(folder))
            except PrompttuneError as problem:
                row["problem"] = describe_failure(problem)
            except Exception as problem:  # a table of faults must not end at one
                row["problem"] = f"unexpected: {describe_failure(problem)}"
            table.writerow({**row, "seconds": round(time.perf_counter() - begun, 1)})
            out.flush()
            gc.collect()
    return list(csv.DictReader(file.open()))


@click.command()
@click.option("--engines", is_flag=True, help="Export an engine a family instead.")
@click.option("--part", default="0/1", help="Part of the names, such as 0/2.")
@click.option("--only", default="*", help="Pattern of names.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Folder of backbones_PART.csv.")
def main(engines: bool, part: str, only: str, results: Path) -> None:
    """Load every name, compare its features with timm's, and run every method on it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    number, of = map(int, part.split("/"))
    ending = ".csv" if of == 1 else f"_{number}.csv"
    if engines:
        todo = {one.name: partial(engine_of, names=one.models) for one in families()[number::of]}
        rows = fill(results / f"backbones_engines{ending}", ENGINE_COLUMNS, todo)
        click.echo(f"{len(rows)} families: {sum(not row['problem'] for row in rows)} engines agree with PyTorch")
        return
    names = timm.list_models(only)[number::of]
    rows = fill(results / f"backbones{ending}", COLUMNS, dict.fromkeys(names, examine))
    loads = [row for row in rows if row["width"]]
    many = sum(int(row["methods"] or 0) >= 10 for row in rows)
    apart = max((float(row["linear_difference"]) for row in rows if row["linear_difference"]), default=0.0)
    click.echo(f"{len(rows)} names: {len(loads)} load, {many} with 10 methods or more; farthest from timm {apart:.0e}")


if __name__ == "__main__":
    main()
