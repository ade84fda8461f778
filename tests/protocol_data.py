"""Tiny data sets in the layouts of VTAB-1k and FGVC, and recipes that train on them in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

SIZES = {"train800": 8, "val200": 4, "test": 6}
TINY = {"backbone": "test_vit", "weights": "random:0", "image_size": 32}


def picture(path: Path, label: int, seed: int) -> None:
    """Noise with a bright bar whose edge is the label."""
    pixels = np.random.default_rng(seed).integers(0, 90, (40, 40, 3)).astype(np.uint8)
    np.rot90(pixels, label)[:10] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_vtab(root: Path, *names: str, classes: int = 2) -> Path:
    """``<root>/<name>/<list>.txt`` with ``path label`` lines."""
    for name in names:
        lines: dict[str, list[str]] = {}
        for split, size in SIZES.items():
            for index in range(size):
                path, label = f"images/{split}/{index:03d}.png", index % classes
                picture(root / name / path, label, seed=index)
                lines.setdefault(split, []).append(f"{path} {label}")
        lines["train800val200"] = lines["train800"] + lines["val200"]
        for split, rows in lines.items():
            (root / name / f"{split}.txt").write_text("\n".join(rows) + "\n")
    return root


def write_fgvc(root: Path, name: str, images: str = "images") -> Path:
    """``<root>/<name>/<split>.json`` of path to class id; ids start at 5, images lie below ``images``."""
    for split, size in {"train": 8, "val": 4, "test": 6}.items():
        rows = {}
        for index in range(size):
            path = f"{split}/{index:03d}.png"
            picture(root / name / images / path, index % 2, seed=index)
            rows[path] = 5 + 6 * (index % 2)
        (root / name / f"{split}.json").write_text(json.dumps(rows))
    return root


def write_recipe(path: Path, **changes: Any) -> Path:
    """A protocol of two groups on VTAB's layout, one epoch a run."""
    document: dict[str, Any] = {
        "protocol": "tiny",
        "title": "tiny tasks",
        "seeds": [3, 4],
        "search_seed": 9,
        "defaults": {**TINY, "epochs": 1, "batch_size": 8, "lr": 1e-3, "tensorboard": False},
        "tasks": {
            name: {"group": group, "data": f"vtab/{name}/train800val200/test", "search": f"vtab/{name}/train800/val200"}
            for name, group in (("a", "one"), ("b", "two"))
        },
        "methods": {"linear": {"lr": 2e-3}, "not-registered": {"nothing": 1}},
        **changes,
    }
    path.write_text(yaml.safe_dump(document))
    return path
