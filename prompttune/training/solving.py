"""The head of a task in closed form, where the features are fixed: ridge regression of the classes.

The strength of the regularisation and the scale of the logits are those with the lowest cross entropy when each image
is left out in turn, which follows from one fit: an error is divided by one minus the image's weight in its own answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prompttune.errors import UsageError

if TYPE_CHECKING:
    from prompttune.model import PromptModel

STRENGTHS = torch.logspace(-5, 2, 15, dtype=torch.float64)
"""Strengths λ to choose from, for features whose mean square is 1 and whose products are divided by their number."""
SCALES = torch.logspace(0, 3, 31, dtype=torch.float64)
"""Factors of the logits to choose from."""


HEAD = ("head.weight", "head.bias")
"""The parameters that are solved for."""


def check_solvable(model: PromptModel) -> None:
    """Raise :class:`UsageError` unless the task trains a linear head for one class an image, and nothing else."""
    trained, method = model.trained_parameters(), model.config.method
    if own := [name for name in trained if name not in HEAD]:
        raise UsageError(f"solve sets a linear head alone, as of the method linear; {method} also trains {own[0]}")
    if not model.task_type.label_weights:
        raise UsageError(f"solve needs a class for each image, which a {model.task_type.name} does not have")


class Solution(NamedTuple):
    """A solved head, in the type and on the device of the features."""

    weight: Tensor
    """[C, D]."""
    bias: Tensor
    """[C]."""
    strength: float
    top1: float
    """Share of right answers when each image is left out in turn, between 0 and 1."""


def solve_head(features: Tensor, targets: Tensor, classes: int) -> Solution:
    """The head for features [n, D] and class indices [n]; its time grows with the cube of the smaller of n and D."""
    x = features.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    scale = (deviation.clamp(min=1e-6 * float(deviation.max())) * x.shape[1] ** 0.5).clamp(min=1e-12)
    x = (x - mean) / scale
    wanted = F.one_hot(targets, classes).double()
    centred = wanted - wanted.mean(dim=0)
    if x.shape[0] > x.shape[1]:
        squares, axes = torch.linalg.eigh(x.T @ x)
        z = x @ axes  # [n, r], x in its principal axes
    else:
        squares, axes = torch.linalg.eigh(x @ x.T)
        z = axes * squares.clamp(min=0).sqrt()
    targets, projected, best = targets.to(x.device), z.T @ centred, None
    for strength in STRENGTHS.tolist():
        shrunk = 1 / (squares.clamp(min=0) + strength)
        errors = centred - z @ (shrunk[:, None] * projected)
        seen = (z.square() @ shrunk + 1 / len(x)).clamp(max=1 - 1e-9)  # an image's weight in its own answer
        left_out = wanted - errors / (1 - seen)[:, None]
        for factor in SCALES.tolist():
            loss = float(F.cross_entropy(factor * left_out, targets))
            if best is None or loss < best[0]:
                best = loss, factor, strength, errors, left_out
    assert best is not None
    _, factor, strength, errors, left_out = best
    weight = factor * (errors.T @ x) / strength / scale
    bias = factor * wanted.mean(dim=0) - weight @ mean
    top1 = float((left_out.argmax(dim=1) == targets).double().mean())
    return Solution(weight.to(features.dtype), bias.to(features.dtype), strength, top1)
