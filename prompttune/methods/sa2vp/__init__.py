"""Spatially Aligned-and-Adapted Visual Prompt, SA²VP: https://arxiv.org/abs/2312.10376 (AAAI 2024).

Two pathways run through the same frozen blocks: the base pathway h with the image's tokens, and the prompt pathway p
with a learnable map of one token per token of h. In the prompt layers the base adapts the prompts, in all other blocks
the prompts adapt the base, through spatially aligned cross attention and a bottleneck adapter.

``vit.py``, ``swin.py`` and ``conv.py`` each drive one kind of backbone; ``parts.py`` holds their shared parts.

Everything that does not depend on the image is folded into the task's state, exactly: the prompt pathway's block 0
with its queries, the deep prompt maps' blocks, γ and the adapter norm's affine part. A block's self and cross attention
share q, k and v; both pathways use the frozen weights as one batch; the last block computes only what the head reads.

Deviations from the released code are settings, and the released form is the default: ``activation`` (the code uses
GELU, Eq. 3 says ReLU), ``fusion`` (the code passes a new prompt map through the block, Eq. 5 adds it directly). The
one default that differs is ``init``: with ``up`` at zero a task starts from the frozen backbone's own features and
learns in a few epochs; ``released`` draws ``up`` at random. One difference does not have a setting: the released
script also puts the backbone into training mode, with dropout of 0.1 after the embeddings and in every frozen MLP;
here the backbone is always in evaluation mode, which allows the prompt pathway to fold during training too.
"""

from __future__ import annotations

from prompttune.methods.sa2vp.config import SA2VPConfig
from prompttune.methods.sa2vp.conv import ConvSA2VP
from prompttune.methods.sa2vp.swin import SwinSA2VP
from prompttune.methods.sa2vp.vit import SA2VP

__all__ = ["SA2VP", "ConvSA2VP", "SA2VPConfig", "SwinSA2VP"]
