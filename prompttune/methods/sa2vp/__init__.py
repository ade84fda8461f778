"""Spatially Aligned-and-Adapted Visual Prompt, SA²VP: https://arxiv.org/abs/2312.10376 (AAAI 2024).

Two pathways run through the same frozen blocks: the base pathway h over the image's tokens and the prompt pathway p
over a learnable map with one token for each token of h. In the prompt layers the base adapts the prompts, in all
other blocks the prompts adapt the base, through spatially aligned cross attention and a bottleneck adapter.

``vit.py``, ``swin.py`` and ``conv.py`` drive one kind of backbone each, ``parts.py`` is what they share.

What does not depend on the image is folded into the task's state, exactly: the prompt pathway's block 0 with its
queries, the deep prompt maps' blocks, γ and the adapter norm's affine part. A block's self and cross attention share
q, k and v; both pathways go through the frozen weights as one batch; the last block computes what the head reads.

Deviations from the released code are settings, the released form being the default: ``activation`` (the code uses
GELU, Eq. 3 says ReLU), ``fusion`` (the code passes a new prompt map through the block, Eq. 5 adds it directly). The
one default that differs is ``init``: with ``up`` at zero a task starts from the frozen backbone's own features and
learns in a few epochs; ``released`` draws ``up`` at random. One difference has no setting: the released script puts
the backbone into training mode too, whose configuration drops out 0.1 behind the embeddings and in every frozen MLP;
here the backbone is always in evaluation mode, which is what lets the prompt pathway fold while training as well.
"""

from __future__ import annotations

from prompttune.methods.sa2vp.config import SA2VPConfig
from prompttune.methods.sa2vp.conv import ConvSA2VP
from prompttune.methods.sa2vp.swin import SwinSA2VP
from prompttune.methods.sa2vp.vit import SA2VP

__all__ = ["SA2VP", "ConvSA2VP", "SA2VPConfig", "SwinSA2VP"]
