"""SA²VP over a ViT."""

from __future__ import annotations

import torch
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone, merge_heads
from prompttune.layers.attention import attend
from prompttune.methods.base import Features, Layout, State, implements
from prompttune.methods.maps import Levels, MapReader
from prompttune.methods.sa2vp.config import SA2VPConfig
from prompttune.methods.sa2vp.parts import Pathways, PromptMap, probe_pathways


@implements(SA2VPConfig)
class SA2VP(Pathways[VitBackbone]):
    """One task of SA²VP over a ViT: ``prompts.{i}`` for the prompt layers, ``adapters.{i}`` for every block."""

    backbones = (VitBackbone,)
    gives_maps_on = (VitBackbone,)

    def __init__(self, config: SA2VPConfig, backbone: Backbone) -> None:
        assert isinstance(backbone, VitBackbone)
        super().__init__(
            config,
            backbone,
            depth=backbone.depth,
            width=backbone.width,
            grid=backbone.grid,
            num_prefix_tokens=backbone.num_prefix_tokens,
        )
        for index in self.prompt_layers:
            self.prompts[str(index)] = PromptMap(
                backbone.grid, backbone.num_prefix_tokens, backbone.width, config, scaled=index > 0
            )

    # ------------------------------------------------------------------ state

    def task_state(self) -> State:
        """Folded tensors of the task.

        ``prompt.input`` [1, N, D], the map that enters block 0; ``prompt.query`` [1, H, N, d], its queries there;
        ``prompt.output`` [1, N, D], the output of block 0 for it; ``deep`` [1, K, N, D], the scaled later maps;
        and :meth:`given_state`.
        """
        backbone = self.backbone
        start = backbone.position(self.prompts["0"]())
        state = {
            "prompt.input": start,
            "prompt.query": backbone.query(0, backbone.norm1(0, start)),
            "prompt.output": backbone.run_block(0, start),
        }
        if len(self.prompt_layers) > 1:
            state["deep"] = torch.stack([self._deep_map(index) for index in self.prompt_layers[1:]], dim=1)
        return state | self.given_state()

    def _deep_map(self, index: int) -> Tensor:
        prompt = self.prompts[str(index)]
        assert isinstance(prompt, PromptMap)
        new = prompt()
        if self.config.fusion == "released":
            new = self.backbone.run_block(index, new)
        scaled: Tensor = prompt.scale * new
        return scaled

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        backbone = self.backbone
        tokens, width = backbone.num_tokens, backbone.width
        layout: Layout = {
            "prompt.input": (tokens, width),
            "prompt.query": (backbone.num_heads, tokens, backbone.head_dim),
            "prompt.output": (tokens, width),
        }
        if len(self.prompt_layers) > 1:
            layout["deep"] = (len(self.prompt_layers) - 1, tokens, width)
        return layout | self.given_layout()

    # ---------------------------------------------------------------- forward

    def forward(self, images: Tensor, state: State, aux: bool = False, levels: Levels = ()) -> Features:
        """See :meth:`Method.forward`. Without ``aux``, the prompt pathway is computed only for the base."""
        backbone = self.backbone
        reader, aux_reader = MapReader(backbone, levels), MapReader(backbone, levels if aux else ())
        h, p = self._first_block(backbone.embed(images), state)
        reader.read(0, h)
        aux_reader.read(0, p)
        for index in range(1, self.depth - 1):
            probe_pathways(index - 1, h, p)
            if aux or index <= self.last_read:
                h, p = self._block(index, h, p, state)
            else:
                h = backbone.run_block(index, h)
            reader.read(index, h)
            aux_reader.read(index, p)
        probe_pathways(self.depth - 2, h, p)
        h, last_p = self._last_block(h, p, state, aux, reader.whole)
        reader.read(self.depth - 1, h)
        if last_p is None:
            return Features(backbone.pool(h), maps=reader.maps)
        aux_reader.read(self.depth - 1, last_p)
        return Features(backbone.pool(h), backbone.pool(last_p), reader.maps, aux_reader.maps)

    def _first_block(self, h: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Block 0, [B, N, D]; the prompt pathway's part is folded in the state."""
        backbone = self.backbone
        q, k, v = backbone.qkv(0, backbone.norm1(0, h))  # [B, H, N, d]
        own = backbone.project(0, merge_heads(attend(q, k, v)))
        cross = backbone.project(0, merge_heads(self.aligned(state["prompt.query"], k, v)))
        given = self.give(0, state["prompt.input"] + self.drop(cross), state)
        return backbone.feed_forward(0, h + own), state["prompt.output"] + given

    def _block(self, index: int, h: Tensor, p: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """A block for both pathways, [B, N, D] each."""
        backbone = self.backbone
        x = torch.stack((h, p))  # [2, B, N, D]
        q, k, v = backbone.qkv(index, backbone.norm1(index, x))  # [2, B, H, N, d]
        asking, answering = (1, 0) if index in self.prompt_layers else (0, 1)
        own = backbone.project(index, merge_heads(attend(q, k, v)))  # [2, B, N, D]
        cross = backbone.project(index, merge_heads(self.aligned(q[asking], k[answering], v[answering])))
        given = self.give(index, (h, p)[asking] + self.drop(cross), state)
        h, p = backbone.feed_forward_both(index, x + own)
        return self._join(index, h, p, given, state)

    def _last_block(self, h: Tensor, p: Tensor, state: State, aux: bool, whole: bool) -> tuple[Tensor, Tensor | None]:
        """The last block: keys and values of all tokens, the rest only for the pooled tokens, or for all with
        ``whole``.

        Returns:
            Tokens of the base and, with ``aux``, of the prompt pathway: [B, 1 or N, D].
        """
        backbone, index = self.backbone, self.depth - 1
        reads_prompts = index not in self.prompt_layers
        x = torch.stack((h, p)) if reads_prompts or aux else h.unsqueeze(0)  # [1 or 2, B, N, D]
        normed = backbone.norm1(index, x)
        k, v = backbone.key_value(index, normed)  # [1 or 2, B, H, N, d]
        streams = 2 if aux else 1
        asking = x[:streams]
        pooled_alone = backbone.pools_class_token and not whole
        if pooled_alone:
            asking, normed = asking[:, :, :1], normed[:, :, :1]
        q = backbone.query(index, normed[:streams])
        own = backbone.project(index, merge_heads(attend(q, k[:streams], v[:streams])))
        out = backbone.feed_forward(index, asking + own)
        if not (reads_prompts or aux):
            return out[0], None
        source, target = (0, 1) if reads_prompts else (1, 0)
        # The class token, a prefix token, sees the whole other map.
        across = attend if pooled_alone else self.aligned
        cross = backbone.project(index, merge_heads(across(q[source], k[target], v[target])))
        given = self.give(index, asking[source] + self.drop(cross), state)
        if not aux:
            return out[0] + given, None
        return self._join(index, out[0], out[1], given, state)

    def _join(self, index: int, h: Tensor, p: Tensor, given: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Add one pathway's contribution to the other; a prompt layer also adds its new map."""
        if index not in self.prompt_layers:
            return h + given, p
        deep = state["deep"][:, self.prompt_layers.index(index) - 1]  # [1 or B, N, D]
        return h, p + given + deep[:, : p.shape[1]]
