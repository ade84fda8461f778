"""Batches of images and masks, in the same reproducible order as those of images and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prompttune.data.base import MaskSource
from prompttune.data.loading import Batch, EpochLoader, Sample, Samples, make_loader
from prompttune.images.joint import JointTransform


class MaskSamples(Samples):
    """A source's images and masks through a joint transform."""

    def draw(self, loaded: tuple[Any, Any]) -> tuple[Any, Any]:
        """Image [3, S, S] and mask [S, S]; raises the errors of :meth:`Samples.draw`."""
        pair: tuple[Any, Any] = self.transform(*loaded)
        return pair

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack the readable samples; targets are [B, S, S]."""
        pairs = [sample for sample in samples if not isinstance(sample, str)]
        corrupt = [sample for sample in samples if isinstance(sample, str)]
        side = self.transform.preprocess.image_size
        if not pairs:
            return Batch(torch.zeros(0, 3, side, side), torch.zeros(0, side, side, dtype=torch.int64), corrupt)
        return Batch(torch.stack([one for one, _ in pairs]), torch.stack([one for _, one in pairs]), corrupt)


def make_mask_loader(source: MaskSource, transform: JointTransform, **settings: Any) -> EpochLoader:
    """The same as :func:`make_loader`, with its settings; targets are masks int64 [B, S, S]."""
    return make_loader(source, transform, samples=MaskSamples, **settings)
