"""E²VPT, input prompts, key-value prompts and pruning: https://arxiv.org/abs/2307.13770 (ICCV 2023).

P prompts are placed between the prefix tokens and the patches, new ones before every block as in VPT-deep. In addition
every block's attention has n learnable keys and values in each head, before its own; by default one tensor serves as
both. During training the least important input prompts are pruned, at two levels: whole tokens, and the R segments of
each token's channels. Then all trained values are rewound to their initial values and train again.

The code follows the release (https://github.com/ChengHan111/E2VPT, ``src/models/vit_prompt/vit_prompt_VK.py``,
``src/engine/trainer.py``): masks multiply the prompts and are the same in every block; channel c belongs to segment
c mod R; key-value prompts start Kaiming-uniform. A pruned token is zero where it enters a block. It remains a token:
the block's norm turns it into its bias, and the attention sees that.

Deviations: importance is the paper's |dL/dmask|, summed over the steps of the epoch before the pruning; the released
code sums signed values over one more epoch, and gives every segment of a token the token's importance. Masks stay at
1 until then, while the released first stage trains them. The shares are settings, while the released code tries 10 to
90 % of each and keeps the best on validation images. Both stages are one run (``prune_at``), so the values are rewound
to the start of this run, and the head, which does not belong to a method, is not rewound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.errors import BackboneError, TrainingError
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Levels, State, implements, setting
from prompttune.methods.over_vit import BlocksConfig, PromptTokens

ROUNDING = 1e-9
"""Tolerance that keeps a share such as 0.29 of 100 at 29."""


@dataclass(frozen=True)
class E2VPTConfig(BlocksConfig):
    """Settings of E²VPT."""

    method = "e2vpt"
    summary = "Input prompts and key-value prompts, pruned and rewound"
    paper = "https://arxiv.org/abs/2307.13770"
    shapes_graph = ("num_prompts", "deep", "num_kv", "share_kv")

    num_prompts: int = setting(10, "prompt tokens", above=0)
    deep: bool = setting(True, "use new prompt tokens before every block")
    num_kv: int = setting(5, "number of key-value prompts of each head in each block", above=0)
    share_kv: bool = setting(True, "use the key prompts as value prompts too")
    prune_tokens: float = setting(0.5, "share of the prompt tokens to prune", low=0, below=1)
    prune_segments: float = setting(0.5, "share of each prompt token's segments to prune", low=0, below=1)
    segments: int = setting(16, "number of segments of a prompt token's channels", above=0)
    prune_at: float = setting(
        0.5, "share of the epochs after which prompts are pruned and training begins again", above=0, below=1
    )
    dropout: float = setting(0.0, "dropout on input prompts and key-value prompts while training", low=0, below=1)

    @property
    def prunes(self) -> bool:
        """Whether at least one prompt is pruned: a small share of few prompts may be zero."""
        return self.pruned_tokens > 0 or self.pruned_segments > 0

    @property
    def pruned_tokens(self) -> int:
        """Number of pruned prompt tokens."""
        return int(self.prune_tokens * self.num_prompts + ROUNDING)

    @property
    def pruned_segments(self) -> int:
        """Number of pruned segments of each prompt token."""
        return int(self.prune_segments * self.segments + ROUNDING)

    def epochs_before_pruning(self, epochs: int) -> int:
        """Number of a run's epochs before the pruning; at least one, and at least one follows."""
        return min(max(round(self.prune_at * epochs), 1), epochs - 1)

    def check_epochs(self, epochs: int) -> None:
        """See :meth:`MethodConfig.check_epochs`."""
        self.require(
            not self.prunes or epochs > 1,
            f"pruning needs at least 2 epochs, not {epochs}; or set prune_tokens and prune_segments to 0",
        )


@implements(E2VPTConfig)
class E2VPT(PromptTokens):
    """For L changed blocks ``prompts`` [L, P, D] (or [1, P, D]), ``key`` [L, H, n, d], ``value`` too unless shared.

    With pruning it also has tensors that gradients do not train: ``masks.token`` [P], ``masks.segment`` [P, R], and
    ``initial.*``, the initial values of the others.
    """

    config: E2VPTConfig

    def __init__(self, config: E2VPTConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        vit, layers = self.backbone, len(self.changed)
        self.prompts = self.drawn(layers if config.deep else 1, config.num_prompts, vit.width)
        size = (layers, vit.num_heads, config.num_kv, vit.head_dim)
        bound = math.sqrt(6 / (config.num_kv * vit.head_dim))
        self.key = nn.Parameter(torch.empty(size).uniform_(-bound, bound))
        self.value = None if config.share_kv else nn.Parameter(torch.empty(size).uniform_(-bound, bound))
        self.masks, self.initial = nn.ParameterDict(), nn.ParameterDict()
        self._importance: Tensor | None = None
        self._token_importance: Tensor | None = None
        if config.prunes:
            self._prepare_pruning(vit)

    def _prepare_pruning(self, backbone: VitBackbone) -> None:
        count, segments = self.config.num_prompts, self.config.segments
        if backbone.width % segments:
            raise BackboneError(
                f"e2vpt: {segments} segments do not divide the {backbone.width} channels of {backbone.name}; "
                "set segments to a number that does"
            )
        self.initial.update({name: _fixed(one.detach().clone()) for name, one in self.named_parameters()})
        self.masks.update({"token": _fixed(torch.ones(count)), "segment": _fixed(torch.ones(count, segments))})
        # A hook on the parameter sees each step's gradient without changing the forward.
        self.prompts.register_hook(self._observe)

    def leading_keys(self, index: int) -> int:
        """Number of key prompts."""
        return self.config.num_kv if index >= self.first_block else 0

    def mask(self) -> Tensor:
        """1 for each channel of a prompt that remains, 0 for a pruned one: [P, D]."""
        repeated = self.masks["segment"].repeat(1, self.prompts.shape[-1] // self.config.segments)  # [P, D]
        mask: Tensor = self.masks["token"].unsqueeze(1) * repeated
        return mask

    def task_state(self) -> State:
        """``prompts`` [1, L, P, D] with the masks multiplied in, ``keys`` [1, L, H, n, d], ``values`` unless shared."""
        prompts = self.prompts * self.mask() if self.config.prunes else self.prompts
        state = {"prompts": prompts.unsqueeze(0), "keys": self.key.unsqueeze(0)}
        if self.value is not None:
            state["values"] = self.value.unsqueeze(0)
        return state

    def parameters_left(self) -> int:
        """See :meth:`Method.parameters_left`; pruned channels do not count."""
        pruned = 0 if not self.config.prunes else int((self.mask() == 0).sum()) * len(self.prompts)
        return super().parameters_left() - pruned

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        tokens = image["tokens"]  # [B, N, D]
        prompts, keys = self.rows(state["prompts"], tokens), self.rows(state["keys"], tokens)
        # dropout draws separate values for keys and values, as released
        values = self.rows(state["keys" if self.config.share_kv else "values"], tokens)
        tokens = self.insert(tokens, prompts[:, 0])  # [B, N + P, D]
        for place, block in enumerate(self.changed):
            if place > 0 and self.config.deep:
                tokens = self.replace(tokens, prompts[:, place])
            normed = block.norm1(tokens)
            key, value = block.key_value(normed)  # [B, H, N + P, d]
            key, value = torch.cat((keys[:, place], key), dim=2), torch.cat((values[:, place], value), dim=2)
            attended = block.project(block.attend(block.query(block.read(normed)), key, value))
            tokens = block.feed_forward(block.read(tokens) + attended)
            probe(f"block{block.index}", tokens)
        return Features(self.pool(tokens))

    def end_epoch(self, epoch: int, epochs: int) -> bool:
        """See :meth:`Method.end_epoch`: prune and rewind, once.

        Raises:
            TrainingError: the pruning is due, but this epoch had no gradient.
        """
        seen, seen_of_tokens = self._importance, self._token_importance
        self._importance = self._token_importance = None  # only the last epoch before the pruning counts
        if not self.config.prunes or epoch + 1 != self.config.epochs_before_pruning(epochs):
            return False
        if seen is None or seen_of_tokens is None:
            raise TrainingError("e2vpt: no gradient of the prompts was seen in the epoch in front of the pruning")
        with torch.no_grad():
            self._prune(_summed(seen_of_tokens), _summed(seen))
            for name, value in self.initial.items():
                self.get_parameter(name).copy_(value)
        return True

    @torch.no_grad()
    def start_from_loaded(self) -> None:
        """See :meth:`Method.start_from_loaded`: pruned prompts are zeros that may grow; the state to rewind to."""
        if self.config.prunes:
            self.prompts.mul_(self.mask())
            for mask in self.masks.values():
                mask.fill_(1.0)
            for name, value in self.initial.items():
                value.copy_(self.get_parameter(name))

    @torch.no_grad()
    def _observe(self, gradient: Tensor) -> None:
        """Add one step's |dL/dmask|, with all masks at 1: the sum of gradient times prompt over what a mask covers.

        In fp16 the gradient contains the step's loss scale, so steps after a change of the scale have another weight;
        steps that overflow are ignored.
        """
        by_channel = (gradient * self.prompts).sum(dim=0)  # [P, D]
        by_segment = by_channel.unflatten(1, (-1, self.config.segments)).sum(dim=1)  # [P, R]
        by_segment = torch.where(by_segment.isfinite().all(), by_segment, 0.0)
        by_token = by_segment.sum(dim=1).abs()  # [P]
        by_segment = by_segment.abs()
        self._importance = by_segment if self._importance is None else self._importance + by_segment
        self._token_importance = by_token if self._token_importance is None else self._token_importance + by_token

    def _prune(self, tokens: Tensor, segments: Tensor) -> None:
        """Zero the masks of the least important tokens [P], and of each token's least important segments [P, R]."""
        for mask, importance, pruned in (
            (self.masks["token"], tokens, self.config.pruned_tokens),
            (self.masks["segment"], segments, self.config.pruned_segments),
        ):
            least = importance.argsort(dim=-1, stable=True)[..., :pruned]
            mask.fill_(1.0).scatter_(-1, least, 0.0)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _summed(tensor: Tensor) -> Tensor:
    """The sum over all processes of a data-parallel run, which must prune alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
