"""Settings of an explanation, as one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass

from prompttune.errors import UsageError, choose
from prompttune.evaluation.scored import SPLITS
from prompttune.settings import setting, settle

PARTS = ("attention", "grad-cam", "similarity", "tsne", "values")
"""Parts of an explanation, in the order of the page."""
OF_IMAGES = ("attention", "grad-cam", "similarity")
"""Parts that are drawn for each image."""
HEADS = ("mean", "each")
"""Values of ``heads`` besides the index of a single head."""
SHOWN_LAYERS = 12
"""Largest number of layers that are all drawn by default; with more, evenly spread ones are drawn."""


def _read_heads(value: str | int) -> str | int:
    """A number, or a name of :data:`HEADS`, which is checked later."""
    return int(value) if str(value).isdecimal() else value


@dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """Settings of an explanation.

    Raises:
        UsageError: a value is out of range, unknown, or contradicts another.
    """

    show: tuple[str, ...] | None = setting(
        None, "Part to draw; may be repeated.", PARTS, repeat=True, shown="all that the runs and the inputs allow"
    )  # fmt: skip
    layers: tuple[int, ...] | None = setting(
        None, "Blocks to draw, counted from 0, such as 0,5,11.", shown=f"up to {SHOWN_LAYERS}"
    )
    """None draws up to :data:`SHOWN_LAYERS`, evenly spread."""
    heads: str | int = setting("mean", "Attention heads: mean, each, or a number.", kind=str, read=_read_heads)
    """``mean`` over all, ``each`` in its own row, or the index of one, counted from 0."""
    token: tuple[int, int] | None = setting(
        None, "Image token to compare with the prompt map.", shown="centre", metavar="ROW,COLUMN"
    )
    """Its row and column in the map."""
    point: tuple[float, float] | None = setting(None, "The same token as a pixel of the image.", metavar="X,Y")
    """Place in the upright image; each run's transform maps it to a token."""
    target: str | None = setting(None, "Label that Grad-CAM explains.", shown="the predicted one", option="label")
    limit: int = setting(16, "Most images to explain.", low=1)
    split: str | None = setting(None, "Split of --data to show.", SPLITS, shown="val, else test, else all")
    data_limit: int = setting(500, "Most images of --data to show.", low=1)
    seed: int = setting(0, "Seed of t-SNE and of the selection from --data.", low=0)
    batch_size: int = setting(32, "Images per forward pass.", low=1)
    device: str = setting("auto", "Device: auto, cpu, cuda or cuda:INDEX.")

    def __post_init__(self) -> None:
        settle(self)
        if isinstance(self.heads, str):
            choose("heads", self.heads, HEADS)
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise UsageError("layers must be at least one, each named once")
        if self.token is not None and self.point is not None:
            raise UsageError("token and point both name a token: give only one")

    def wants(self, part: str) -> bool:
        """Whether to draw ``part`` if possible."""
        return self.show is None or part in self.show

    def insists(self, part: str) -> bool:
        """Whether ``part`` was requested by name or with a token to compare, so that leaving it out is an error."""
        named = self.show is not None or (part == "similarity" and (self.token, self.point) != (None, None))
        return named and self.wants(part)

    def leave_out(self, part: str, reason: str, notes: list[str], run: str = "") -> None:
        """Add a note that ``part`` is not drawn, if it is wanted.

        Args:
            part: one of :data:`PARTS`.
            reason: reason for the note.
            notes: list that gets the note, unless it has it already.
            run: name of the run without this part; empty for all runs.

        Raises:
            UsageError: the part was requested, see :meth:`insists`.
        """
        note = f"no {part} of {run}: {reason}" if run else f"no {part}: {reason}"
        if self.insists(part):
            raise UsageError(f"{note}; leave out that part or run" if run else note)
        if self.wants(part) and note not in notes:
            notes.append(note)

    def layers_of(self, depth: int) -> list[int]:
        """The blocks to draw for a backbone with ``depth`` blocks.

        Raises:
            UsageError: a block does not exist.
        """
        if self.layers is None:
            return spread(depth, SHOWN_LAYERS)
        for layer in self.layers:
            if not 0 <= layer < depth:
                raise UsageError(f"no layer {layer}: the backbone has {depth}, counted from 0")
        return sorted(self.layers)


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``, evenly spread, including the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(step * (count - 1) / (most - 1)) for step in range(most)]
