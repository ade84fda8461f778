"""Maps of patch tokens, read from a method's forward for a head that answers for each place."""

from __future__ import annotations

from torch import Tensor

from prompttune.backbones.vit import VitBackbone

Levels = tuple[int, ...]
"""Blocks, in ascending order, whose output is read."""


class MapReader:
    """Collects the maps of one pathway while a forward runs through its blocks.

    Args:
        backbone: backbone whose final norm is applied to every map, even those of earlier blocks.
        levels: blocks to read; empty for none.
        inserted: number of prompt tokens between the prefix tokens and the patches.
    """

    def __init__(self, backbone: VitBackbone, levels: Levels, inserted: int = 0) -> None:
        self._backbone = backbone
        self._levels = levels
        self._inserted = inserted
        self._found: list[Tensor] = []

    @property
    def whole(self) -> bool:
        """Whether the last block must compute all tokens, not only the pooled ones."""
        return bool(self._levels)

    def read(self, index: int, tokens: Tensor) -> None:
        """Keep tokens [B, N, D] that leave block ``index`` if this level is requested."""
        if index in self._levels:
            self._found.append(self._backbone.patch_map(tokens, self._inserted))

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Normed patch tokens [B, R C, D] of each level."""
        return tuple(self._found)
