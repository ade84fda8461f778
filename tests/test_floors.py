"""Folders import only from the floors before them, in the order of docs/architecture.md."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    "images",
    "data",
    "evaluation",
    "layers",
    "backbones",
    "task_types",
    "methods",
    "model checkpoints",
    "training",
    "explanation benchmark",
    "export.quiet export.layout export.banks export.versions export.options export.folder export.tasks",
    "export.precision",
    "export.graph",
    "export.runtimes",
    "export.formats",
    "export.parity",
    "export.build",
    "export.triton",
    "export",
    "serve.answers serve.decode_threads serve.limits serve.masks serve.memory serve.messages serve.tracing",
    "serve.bank serve.engine",
    "serve.workers",
    "serve.batching",
    "serve.service",
    "serve.protocol",
    "serve.infer",
    "serve.bench",
    "serve.ray_serve",
    "serve",
    "cli",
)
"""The modules of the root folder, such as settings and errors, are the ground floor."""
NAMES = {f"prompttune.{name}": number for number, floor in enumerate(FLOORS, 1) for name in floor.split()}


def floor_of(module: str) -> int:
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((NAMES[prefix] for prefix in prefixes if prefix in NAMES), 0)


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.startswith("prompttune.")]


def test_folders_import_from_the_floors_before_them():
    wrong, seen = [], set()
    for folder in ("prompttune", "export", "serve"):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / "prompttune" if folder == "prompttune" else ROOT)
            module = ".".join(("prompttune", *inside.with_suffix("").parts)).removesuffix(".__init__")
            if module == "prompttune":  # the public names of every floor
                continue
            seen.add(floor_of(module))
            wrong += [f"{module} imports {name}" for name in imports(path) if floor_of(name) > floor_of(module)]
    assert seen == set(range(len(FLOORS) + 1))
    assert not wrong


def test_every_folder_has_a_floor():
    text = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'^    "(prompttune\.[\w.]+)",$', text, flags=re.MULTILINE)
    assert len(packages) > 20
    assert [name for name in packages if not floor_of(name)] == []
