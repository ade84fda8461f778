"""GaPT as released: https://github.com/ryongithub/GatedPromptTuning, ``src/models/vit_prompt/``.

fvcore's ``Checkpointer.save`` writes ``model`` with ``enc.``, a timm ViT that also holds ``prompt_embeddings``
[1, P, D], ``gate_logit`` [L - 1] and ``temp`` [L], and ``head.last_layer``.

- Without gates (``GATE_PRIOR`` off), or behind the last of fewer gates, prompts pass as they leave a block: a gate
  of 1, which the logit 30 gives exactly in float32.
- A gate behind the last block matters to pooled prompts alone: dropped with ``pool backbone``, refused with ``mean``.
- Without ``temp`` (``TEMP_LEARN`` off) the temperature is a constant of the run's config, by default 1.
- MoCo v3 and MAE files have the same names; what the head reads, the class token or the mean of prompts and patches,
  must be said: ``pool``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prompttune.backbones import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.checkpoints.importing.layout import Foreign, Layout, Names, names_after, need_class_token
from prompttune.checkpoints.importing.source import FileTensors
from prompttune.checkpoints.importing.vpt import DEEP, ENCODER, SHALLOW, VPTLayout, refuse_deep_head
from prompttune.errors import CheckpointError, UsageError

OPEN = 30.0
"""The logit whose sigmoid is 1 in float32."""
GATES, TEMPERATURES = f"{ENCODER}gate_logit", f"{ENCODER}temp"


class GaPTLayout(Layout):
    """GaPT over a self-supervised ViT."""

    name = "gapt"
    code = "https://github.com/ryongithub/GatedPromptTuning"
    normalisation = "imagenet"
    interpolation = "bilinear"
    usual_backbone = "vit_base_patch16_224.mae"
    settings = ("pool", "dropout")
    head = VPTLayout.head

    def backbone_names(self, source: FileTensors) -> Names | None:
        """See :meth:`Layout.backbone_names`."""
        return names_after(ENCODER) if source.names(f"{ENCODER}patch_embed.") else None

    def take_task(self, source: FileTensors, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        """See :meth:`Layout.take_task`."""
        if f"{ENCODER}{DEEP}" in source:
            raise CheckpointError(f"{source.where} holds deep prompts, which have no gates: import it as vpt")
        refuse_deep_head(source)
        if "pool" not in given:
            raise UsageError(
                "a GaPT file does not say what its head reads: give --pool mean (MAE) or --pool backbone (MoCo v3)"
            )
        vit = need_class_token(backbone, "GaPT's ViT")
        count = source.size(f"{ENCODER}{SHALLOW}", 1, 3)
        found = Foreign("gapt", {"num_prompts": count})
        found.tensors = {
            "prompts": source.take(f"{ENCODER}{SHALLOW}", (1, count, vit.width))[0],
            "gates": _gates(source, vit, given["pool"], found.notes),
            "temperatures": _temperatures(source, vit, found.notes),
        }
        return found


def _gates(source: FileTensors, backbone: VitBackbone, pool: str, notes: list[str]) -> Tensor:
    """Logits [L - 1]."""
    wanted, shape = backbone.depth - 1, source.shape(GATES)
    gates = torch.full((wanted,), OPEN)
    if shape is None or len(shape) != 1 or shape[0] > backbone.depth:
        if shape is not None:
            source.take(GATES, (wanted,))
        else:
            notes.append("no gates in the file: prompts pass every block as they leave it")
        return gates
    stored = source.take(GATES, shape)
    if shape[0] > wanted:
        if pool == "mean":
            raise CheckpointError(
                f"{source.where} has a gate behind the last block, which pooled prompts pass; GaPT here has none"
            )
        notes.append("the gate behind the last block is left out: nothing reads those prompts")
    if shape[0] < wanted:
        notes.append(f"gates of the last {wanted - shape[0]} blocks are not in the file: open")
    kept = stored[:wanted]
    gates[: len(kept)] = kept
    return gates


def _temperatures(source: FileTensors, backbone: VitBackbone, notes: list[str]) -> Tensor:
    """Temperatures [L]; the released code ignores those beyond the last block."""
    shape = source.shape(TEMPERATURES)
    if shape is None:
        notes.append("no temperatures in the file: taken to be 1")
        return torch.ones(backbone.depth)
    beyond = len(shape) == 1 and shape[0] > backbone.depth
    return source.take(TEMPERATURES, shape if beyond else (backbone.depth,))[: backbone.depth].clone()
