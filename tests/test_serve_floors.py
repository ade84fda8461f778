"""The floors of the serving package: each imports from those before it alone."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "serve"
FLOORS = (
    "memory", "limits", "decode_threads", "masks", "answers", "tracing", "messages", "bank", "engine", "workers",
    "batching", "service", "protocol", "page", "ray_serve", "infer", "bench",
)  # fmt: skip


def test_each_floor_imports_from_those_before_it():
    assert {path.stem for path in ROOT.iterdir()} - {"__init__", "__pycache__"} == set(FLOORS)
    wrong = []
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prompttune.serve."):
                other = str(node.module).split(".")[2]
                if own != "__init__" and FLOORS.index(other) > FLOORS.index(own):
                    wrong.append(f"{file.relative_to(ROOT)}: {node.module}")
    assert not wrong
