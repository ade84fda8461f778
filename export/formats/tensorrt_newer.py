"""What the type stubs, of TensorRT 10.13, do not know: attention layers, which came with 10.14, and named compute
capabilities, which only TensorRT for RTX has. So this has no types; the tests run it on TensorRT for RTX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prompttune.errors import EngineError


def decompose_attention(library: Any, network: Any) -> None:
    """Let TensorRT compute attention in pieces where none of its fused kernels takes the sizes; it fails otherwise."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            # The bindings give out the base class alone; NVIDIA's polygraphy does the same.
            layer.__class__ = library.IAttentionInputLayer
            layer.attention.decomposable = True


def target_capabilities(library: Any, config: Any, capabilities: Sequence[str]) -> None:
    """Build for these compute capabilities, such as 8.9; for none, leave the choice to the library.

    Raises:
        EngineError: the library refuses one.
    """
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
    for index, one in enumerate(capabilities):
        member = getattr(library.ComputeCapability, f"SM{one.replace('.', '')}")
        if not config.set_compute_capability(member, index):
            raise EngineError(f"TensorRT does not build for compute capability {one}")
