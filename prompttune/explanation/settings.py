"""What to explain, and how: one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass

from prompttune.errors import UsageError, choose
from prompttune.evaluation.scored import SPLITS

PARTS = ("attention", "grad-cam", "similarity", "tsne", "values")
"""Parts of an explanation, in the order of the page."""
OF_IMAGES = ("attention", "grad-cam", "similarity")
"""Those that are drawn of each image."""
HEADS = ("mean", "each")
"""What ``heads`` may be besides the number of one head."""
SHOWN_LAYERS = 12
"""Up to so many layers, all are drawn by default; of more, evenly spread ones."""


@dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """Settings of an explanation.

    Raises:
        UsageError: a value is out of range, unknown, or contradicts another.
    """

    show: tuple[str, ...] | None = None
    """Parts of :data:`PARTS` to draw; None draws all that the runs and the inputs allow."""
    layers: tuple[int, ...] | None = None
    """Blocks to draw, counted from 0; None draws all of :data:`SHOWN_LAYERS` or fewer, else evenly spread ones."""
    heads: str | int = "mean"
    """Attention heads: ``mean`` over all, ``each`` in a row of its own, or the number of one, counted from 0."""
    token: tuple[int, int] | None = None
    """Row and column, in the map, of the image token that is compared with the prompt map; None: the centre."""
    point: tuple[float, float] | None = None
    """The same as x and y in pixels of the upright image; the transform of each run decides which token that is."""
    target: str | None = None
    """Label whose logit Grad-CAM explains; None takes the one that each run predicts."""
    limit: int = 16
    """Images that are explained at most."""
    split: str | None = None
    """Images of the labelled data that t-SNE shows: ``val``, ``test``, ``train`` or ``all``; None takes ``val``, else
    ``test``, else all of them."""
    data_limit: int = 500
    """Images of a split that t-SNE shows at most, each class represented."""
    seed: int = 0
    """Seed of t-SNE, and of the choice that ``data_limit`` makes."""
    batch_size: int = 32
    """Images of a forward pass over the labelled data."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``."""

    def __post_init__(self) -> None:
        for part in self.show or ():
            choose("part", part, PARTS)
        if self.split is not None:
            choose("split", self.split, SPLITS)
        if isinstance(self.heads, str):
            choose("heads", self.heads, HEADS)
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise UsageError("layers must be at least one, each named once")
        if self.token is not None and self.point is not None:
            raise UsageError("token and point name the same thing in two ways: give one of them")
        for name in ("limit", "data_limit", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")

    def wants(self, part: str) -> bool:
        """Whether ``part`` is to be drawn if it can be."""
        return self.show is None or part in self.show

    def insists(self, part: str) -> bool:
        """Whether ``part`` was asked for by name, or with a token to compare, so that leaving it out is an error."""
        named = self.show is not None or (part == "similarity" and (self.token, self.point) != (None, None))
        return named and self.wants(part)

    def leave_out(self, part: str, reason: str, notes: list[str], run: str = "") -> None:
        """Add one note that ``part`` is not drawn, if it is wanted.

        Args:
            part: of :data:`PARTS`.
            reason: why.
            notes: gets the note unless it is there.
            run: name of the one that the part is left out of; empty for all.

        Raises:
            UsageError: the part was asked for, see :meth:`insists`.
        """
        note = f"no {part} of {run}: {reason}" if run else f"no {part}: {reason}"
        if self.insists(part):
            raise UsageError(f"{note}; leave out that part or run" if run else note)
        if self.wants(part) and note not in notes:
            notes.append(note)

    def layers_of(self, depth: int) -> list[int]:
        """The blocks to draw of a backbone with ``depth`` of them.

        Raises:
            UsageError: there is no such block.
        """
        if self.layers is None:
            return spread(depth, SHOWN_LAYERS)
        for layer in self.layers:
            if not 0 <= layer < depth:
                raise UsageError(f"there is no layer {layer}: the backbone has {depth}, counted from 0")
        return sorted(self.layers)


def spread(count: int, most: int) -> list[int]:
    """Up to ``most`` of the numbers below ``count``, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(step * (count - 1) / (most - 1)) for step in range(most)]
