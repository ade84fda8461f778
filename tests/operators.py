"""What an ONNX file is made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx


def operators(path: Path) -> Counter[str]:
    """How often each operator occurs in an ONNX file, subgraphs and functions included.

    Operators outside the standard domain are named ``domain::operator``.
    """
    model = onnx.load(str(path), load_external_data=False)
    counts: Counter[str] = Counter()

    def count(nodes: Any) -> None:
        for node in nodes:
            counts[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    count(graph.node)

    count(model.graph.node)
    for function in model.functions:
        count(function.node)
    return counts
