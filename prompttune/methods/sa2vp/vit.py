"""SA²VP over a ViT."""

from __future__ import annotations

import torch
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone, VitBlock
from prompttune.layers.attention import attend
from prompttune.methods.base import Features, Layout, Levels, State, implements
from prompttune.methods.over_vit import MapReader, OverVit
from prompttune.methods.sa2vp.config import SA2VPConfig
from prompttune.methods.sa2vp.parts import AttentionPathways, PromptMap, probe_pathways


@implements(SA2VPConfig)
class SA2VP(AttentionPathways[VitBackbone], OverVit):
    """One task of SA²VP over a ViT: ``prompts.{i}`` for the prompt layers, ``adapters.{i}`` for every changed block."""

    backbones = (VitBackbone,)
    gives_maps_on = (VitBackbone,)

    def __init__(self, config: SA2VPConfig, backbone: Backbone) -> None:
        assert isinstance(backbone, VitBackbone)
        super().__init__(
            config,
            backbone,
            depth=backbone.depth - config.first_block,
            width=backbone.width,
            grid=backbone.grid,
            num_prefix_tokens=backbone.num_prefix_tokens,
        )
        for index in self.prompt_layers:
            self.prompts[str(index)] = PromptMap(
                backbone.grid, backbone.num_prefix_tokens, backbone.width, config, scaled=index > 0
            )

    @property
    def meeting(self) -> tuple[VitBlock, ...]:
        """The changed blocks."""
        return self.changed

    def task_state(self) -> State:
        """:meth:`start_state` of the first map; ``deep`` [1, K, N, D], the scaled later maps; :meth:`given_state`."""
        state = self.start_state(self.backbone.position(self.prompts["0"]()))
        if len(self.prompt_layers) > 1:
            state["deep"] = torch.stack([self._deep_map(index) for index in self.prompt_layers[1:]], dim=1)
        return state | self.given_state()

    def _deep_map(self, index: int) -> Tensor:
        prompt = self.prompts[str(index)]
        assert isinstance(prompt, PromptMap)
        new = prompt()
        if self.config.fusion == "released":
            new = self.meeting[index].run(new)
        scaled: Tensor = prompt.scale * new
        return scaled

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        layout = self.start_layout()
        if len(self.prompt_layers) > 1:
            layout["deep"] = (len(self.prompt_layers) - 1, self.num_tokens, self.map_width)
        return layout | self.given_layout()

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:
        """:meth:`met_state` of the first changed block, in which the base only gives; and the maps up to it."""
        front = super().image_state(images, levels)
        reader, met = MapReader(self.backbone, levels, image=front), self.met_state(front["tokens"])
        reader.read(self.meeting[0], met["tokens"])
        return met | reader.state

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:
        """See :meth:`Method.forward`. Without ``aux``, the prompt pathway is computed only for the base."""
        backbone, first, last = self.backbone, self.meeting[0], self.meeting[-1]
        reader = MapReader(backbone, levels, image=image)
        aux_reader = MapReader(backbone, levels if aux else (), image=image)  # in front the pathways are one
        h, p = image["tokens"], self.first_prompts(image, state)
        aux_reader.read(first, p)
        for index, block in enumerate(self.meeting[1:-1], 1):
            probe_pathways(block.index - 1, h, p)
            if aux or index <= self.last_read:
                h, p = self.block(index, h, p, state)
            else:
                h = block.run(h)
            reader.read(block, h)
            aux_reader.read(block, p)
        probe_pathways(last.index - 1, h, p)
        h, last_p = self._last_block(h, p, state, aux, reader.whole)
        reader.read(last, h)
        if last_p is None:
            return Features(backbone.pool(h), maps=reader.maps)
        aux_reader.read(last, last_p)
        return Features(backbone.pool(h), backbone.pool(last_p), reader.maps, aux_reader.maps)

    def _last_block(self, h: Tensor, p: Tensor, state: State, aux: bool, whole: bool) -> tuple[Tensor, Tensor | None]:
        """The last block: keys and values of all tokens, the rest only for the pooled tokens, or for all with
        ``whole``.

        Returns:
            Tokens of the base and, with ``aux``, of the prompt pathway: [B, 1 or N, D].
        """
        block, index = self.meeting[-1], self.depth - 1
        reads_prompts = index not in self.prompt_layers
        normed = [block.norm1(x) for x in ((h, p) if reads_prompts or aux else (h,))]
        keys = [block.key_value(x) for x in normed]
        asking = [block.read(x, whole) for x in ((h, p) if aux else (h,))]  # [B, 1 or N, D]
        q = [block.query(block.read(x, whole)) for x in normed[: len(asking)]]
        own = [block.project(block.attend(one, *seen)) for one, seen in zip(q, keys, strict=False)]
        out = [block.feed_forward(x + one) for x, one in zip(asking, own, strict=True)]
        if not (reads_prompts or aux):
            return out[0], None
        source, target = (0, 1) if reads_prompts else (1, 0)
        # The class token, a prefix token, sees the whole other map.
        across = attend if block.pooled_alone and not whole else self.aligned
        given = self.give_attended(index, asking[source], across(q[source], *keys[target]), state)
        if not aux:
            return out[0] + given, None
        return self.join(index, out[0], out[1], given, state)

    def join(self, index: int, h: Tensor, p: Tensor, given: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """See :meth:`AttentionPathways.join`; a prompt layer also adds its new map."""
        if index not in self.prompt_layers:
            return h + given, p
        deep = state["deep"][:, self.prompt_layers.index(index) - 1]  # [1 or B, N, D]
        return h, p + given + deep[:, : p.shape[1]]
