"""Long-term Spatial Prompt Tuning for self-supervised ViTs: https://arxiv.org/abs/2402.17406.

Prompts are placed between the prefix tokens and the patches. Between two blocks the prompts that left the first one
are coded anew: spatially (the mean of the patch tokens is added), then over the long term (an LSTM cell shared by all
blocks reads a learnable input for each block; the coded prompts are its hidden state). Patches and prefix tokens pass
unchanged, and there is coding only between blocks. The cell's input half does not depend on the image and folds into
the state.

Without long-term coding, the spatially coded prompts enter the next block directly. Without both, the method is
VPT-shallow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.layers.probe import probe
from prompttune.layers.prompt_lstm import PromptLSTMCell, lstm_step
from prompttune.methods.base import Features, Levels, State, implements, setting
from prompttune.methods.over_vit import BlocksConfig, MapReader, PromptTokens


@dataclass(frozen=True)
class LSPTConfig(BlocksConfig):
    """Settings of LSPT."""

    method = "lspt"
    summary = "Long-term spatial prompts: an LSTM over the blocks"
    paper = "https://arxiv.org/abs/2402.17406"
    shapes_graph = ("num_prompts", "long_term", "spatial", "cell_rank")
    fewest_blocks = 2

    num_prompts: int = setting(10, "prompt tokens", above=0)
    long_term: bool = setting(True, "use long-term prompt coding: an LSTM cell between blocks")
    spatial: bool = setting(True, "use global spatial prompt coding: add the mean of the patches to the prompts")
    cell_rank: int | None = setting(None, "rank of the LSTM cell's matrices; none for full matrices", above=0)
    dropout: float = setting(0.0, "dropout on the prompts that enter the first block, while training", low=0, below=1)

    def check(self) -> None:
        """See :meth:`MethodConfig.check`."""
        self.require(self.long_term or self.cell_rank is None, "cell_rank needs long_term")


@implements(LSPTConfig)
class LSPT(PromptTokens):
    """``prompts`` [L, P, D]: of the L changed blocks, P^0 enters block 0; P^1 .. P^{L-1} are the LSTM's inputs after
    blocks 0 .. L-2."""

    gives_maps_on = (VitBackbone,)
    config: LSPTConfig

    def __init__(self, config: LSPTConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        layers = len(self.changed) if config.long_term else 1
        self.prompts = self.drawn(layers, config.num_prompts, backbone.width)
        self.cell = PromptLSTMCell(backbone.width, config.cell_rank) if config.long_term else None

    def task_state(self) -> State:
        """``prompts`` [1, P, D]; with long-term coding ``gates`` [1, L-1, P, 4D] and the hidden weights."""
        state = {"prompts": self.prompts[:1]}
        if self.cell is not None:
            state["gates"] = self.cell.input_gates(self.prompts[1:]).unsqueeze(0)
            state |= {f"hidden.{name}": value.unsqueeze(0) for name, value in self.cell.hidden_weights().items()}
        return state

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone, prefix = self.backbone, self.backbone.num_prefix_tokens
        patch = prefix + self.count  # the first one
        reader = MapReader(backbone, levels, self.count, image)
        tokens = image["tokens"]  # [B, N, D]
        prompts = self.rows(state["prompts"], tokens)  # [B, P, D]
        cell = torch.zeros_like(prompts)
        tokens = self.insert(tokens, prompts)  # [B, N + P, D]
        for block in self.changed[:-1]:
            tokens = block.run(tokens)
            reader.read(block, tokens)
            prompts, cell = self._code(self.place(block), tokens[:, prefix:patch], tokens[:, patch:], cell, state)
            tokens = self.replace(tokens, prompts)
            probe(f"block{block.index}", tokens)
        tokens = backbone.blocks[-1].run_read(tokens, reader.whole)
        reader.read(backbone.blocks[-1], tokens)
        return Features(self.pool(tokens), maps=reader.maps)

    def _code(self, place: int, prompts: Tensor, patches: Tensor, cell: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Prompts and cell [B, P, D] after changed block ``place``, coded for the next block."""
        if self.config.spatial:
            prompts = prompts + patches.mean(dim=1, keepdim=True)
        if not self.config.long_term:
            return prompts, cell
        if self.config.cell_rank is None:
            hidden = prompts @ state["hidden.weight"]  # [B, P, 4D]
        else:
            hidden = prompts @ state["hidden.down"] @ state["hidden.up"]
        return lstm_step(state["gates"][:, place] + hidden, cell)
