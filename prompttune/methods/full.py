"""Full fine-tuning: every weight of the backbone trains. It is the reference for the prompt methods.

A task is a whole backbone, so tasks share nothing: the checkpoint holds all tuned tensors, and an engine has the tuned
weights in its graph and one task. The copy stays in evaluation mode like the frozen backbone: without dropout and
stochastic depth, and with fixed batch norm statistics.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor

from prompttune.backbones.base import Backbone, fingerprint_of
from prompttune.methods.base import Features, Levels, Method, MethodConfig, State, implements


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """Full fine-tuning has no settings of its own."""

    method = "full"
    summary = "Full fine-tuning: every weight of the backbone trains"
    shares_backbone = False


@implements(FullConfig)
class Full(Method):
    """``backbone.model.*``: the backbone's tensors by timm's names, a copy that trains.

    If the backbone is already tuned, as in an engine, it is not copied and nothing trains.
    """

    backbones = (Backbone,)

    def __init__(self, config: FullConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if not backbone.is_tuned:
            self.backbone = copy.deepcopy(backbone)  # a backbone always stays in evaluation mode
            self.backbone.requires_grad_(True)

    def task_state(self) -> State:
        """Empty: the graph holds the weights."""
        return {}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """Pooled features of the tuned backbone, [B, D]."""
        features: Tensor = self.driven(image["image"])
        return Features(features)

    @property
    def driven(self) -> Backbone:
        """The tuned backbone."""
        return self._backbone[0] if self._backbone[0].is_tuned else self.backbone

    def own_backbone(self) -> Backbone:
        """A frozen copy of the tuned backbone, with the fingerprint of the tuned weights."""
        tuned = copy.deepcopy(self.driven)
        tuned.requires_grad_(False)
        tuned.is_tuned = True
        tuned.fingerprint = fingerprint_of(tuned.model.state_dict())
        return tuned
