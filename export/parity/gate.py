"""Thresholds of parity by precision, and the limits of what a precision can decide."""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack

from prompttune.errors import choose
from prompttune.export.folder import Manifest
from prompttune.export.options import GateOptions, Thresholds
from prompttune.settings import setting, settle
from prompttune.task_types import TaskType

ATOL = 1e-4
"""Largest allowed difference of a logit in fp32."""
MIN_AGREEMENT = 0.99
MAX_ACCURACY_LOSS = 0.01
"""Default loss of every precision below fp32; fp32 requires the same top class on every image."""

NOISE = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.09, "int8": 0.2}
"""Largest change of a value by rounding alone, relative to the scale of its kind, by precision, strictest first.

For fp16, bf16 and int8 it is about twice the largest difference seen: 0.005 in fp16 and 0.045 in bf16, each with all
weights, activations and norms in it, over two tiny ViTs and a DINOv2 ViT-S/14; 0.09 in dynamic int8 over a tiny ViT.
"""

NEIGHBOURS = {"fp32": 1e-5, "fp16": 5e-4, "bf16": 4e-3, "int8": 1e-5}
"""Largest difference of a logit between an image alone and in a batch, relative to its largest logit, by precision.

fp16 and bf16: one rounding of the type, because kernels in it may depend on the batch size; AOTInductor's bf16 moved
logits of a tiny ViT by 1.1e-4. int8 needs less: each row has its own scale, and its products are exact.
"""


def loosest(*precisions: str) -> str:
    """The least strict of some precisions.

    Raises:
        UsageError: a precision is unknown.
    """
    order = list(NOISE)
    return max((choose("precision", one, order) for one in precisions), key=order.index)


@dataclasses.dataclass(frozen=True)
class Gate(GateOptions):
    """Measurement and thresholds of parity; the defaults are those of fp32. A figure that is not finite never passes.

    Below fp32 the agreement leaves ties out: a few images must not refuse an honest engine because one of them lies
    between two classes. A disagreement is a tie only if *every* logit of its row is within ``noise`` of the reference:
    the reference's lead is then at most twice that, and rounding alone explains the change. A broken engine moves its
    rows by more than rounding does, and each disagreement of such a row counts, however small the lead.
    """

    atol: float | None = setting(ATOL, low=0)
    """Largest allowed absolute difference of a logit; None for no limit."""
    min_agreement: float = setting(1.0, low=0, high=1)
    """Smallest allowed share of images on which both sides name the same class, without ties."""
    noise: float = 0.0
    """Largest difference of a tie's logits, relative to their scale, see :class:`DifferenceTally`; 0 for no ties."""
    max_neighbours: float = NEIGHBOURS["fp32"]
    """Largest allowed influence of an image's neighbours on its logits, see :class:`Neighbours`."""
    precision: str = "fp32"
    """Precision that the thresholds belong to."""

    def __post_init__(self) -> None:
        settle(self)

    @classmethod
    def for_precision(cls, precision: str, **given: Unpack[Thresholds]) -> Gate:
        """The thresholds of a precision; given ones that are not None take precedence.

        fp32: ``atol`` 1e-4 and the same top class on every image. fp16, bf16 and int8: no ``atol``, the same top class
        on 99 % of the images without ties, and at most one point of top-1 lost.

        Raises:
            UsageError: the precision is unknown, or a threshold is out of range.
        """
        default = cls()
        if choose("precision", precision, NOISE) != "fp32":
            default = cls(
                atol=None,
                min_agreement=MIN_AGREEMENT,
                max_accuracy_loss=MAX_ACCURACY_LOSS,
                noise=NOISE[precision],
                max_neighbours=NEIGHBOURS[precision],
                precision=precision,
            )
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(default, **chosen)

    def suiting(self, task_type: TaskType) -> Gate:
        """The same gate for a type of task, see :attr:`TaskType.rounding_ties`."""
        return dataclasses.replace(self, noise=self.noise or NOISE[self.precision]) if task_type.rounding_ties else self


def engine_gate(manifest: Manifest, **given: Unpack[Thresholds]) -> Gate:
    """The thresholds that an engine is held to; see :meth:`Gate.for_precision`."""
    gate = Gate.for_precision(engine_precision(manifest), **given)
    return gate.suiting(manifest.task_type)


def engine_precision(manifest: Manifest) -> str:
    """The precision whose thresholds an engine is held to: the looser of its model's and its bank's."""
    return loosest(manifest.precision, manifest.bank_precision)
