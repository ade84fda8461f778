"""Figures of the layers that TensorRT made of a network."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

_FUSED = re.compile("mha|flash", re.IGNORECASE)
"""In the names of TensorRT's fused attention kernels."""


def summarise(information: str) -> dict[str, Any]:
    """The layers of a plan, ready for JSON: how many, of which types, with outputs of which types, and how many of them
    are fused attention.

    Args:
        information: JSON of TensorRT's engine inspector, with a list ``Layers``. Its items are records where the plan
            keeps details, else names.
    """
    layers = json.loads(information).get("Layers", [])
    records = [one for one in layers if isinstance(one, dict)]
    # TensorRT 11 has split the name of the two in one.
    outputs = (
        output.get("Datatype") or output["Format/Datatype"] for one in records for output in one.get("Outputs", ())
    )
    return {
        "count": len(layers),
        "types": dict(Counter(one["LayerType"] for one in records)),
        "precisions": dict(Counter(outputs)),
        "fused_attention": sum(bool(_FUSED.search(json.dumps(one))) for one in layers),
    }
