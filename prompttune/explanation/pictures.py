"""One image through all subjects: attention maps, Grad-CAM, similarities; figures and the values behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from prompttune.errors import UsageError, choose
from prompttune.explanation import drawing
from prompttune.explanation.attention import BlockAttention, block_attention, check_readable
from prompttune.explanation.cam import check_explicable, grad_cam
from prompttune.explanation.inputs import Picture, model_input, token_of, view
from prompttune.explanation.settings import ExplainSettings
from prompttune.explanation.similarity import cosine_map, grid_of, number_of, record_maps
from prompttune.explanation.subjects import ExplainedModel


@dataclass
class Explained:
    """Figures and values of one image."""

    figures: dict[str, Figure] = field(default_factory=dict)
    """Figures by the part of their file name."""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Seen:
    """A subject with the image as its input, [1, 3, S, S], and as viewers see it."""

    subject: ExplainedModel
    images: Tensor
    view: drawing.Pixels


class PictureExplainer:
    """Explains images one by one for the same subjects.

    Args:
        subjects: runs and plain backbones.
        settings: settings of the explanation.
        notes: list that gets a line for each part that is left out.

    Raises:
        UsageError: a part that was requested by name, a layer, a head or a label does not exist.
    """

    def __init__(self, subjects: Sequence[ExplainedModel], settings: ExplainSettings, notes: list[str]) -> None:
        self.subjects = subjects
        self.settings = settings
        self.notes = notes
        self.runs = [subject for subject in subjects if subject.model is not None]
        self.layers = {id(one): settings.layers_of(one.backbone.depth) for one in subjects}
        self.attending = self._that_can("attention", lambda one: check_readable(one.driven), subjects)
        self.weighed = self._that_can("grad-cam", lambda one: check_explicable(one.run()[0]), self.runs)
        self.answering = [run for run in self.runs if run.run()[0].task_type.takes("predict")]
        self._check_heads()
        self._check_target()
        self._shares: dict[str, dict[int, list[float]]] = {}

    def _that_can(
        self, part: str, check: Callable[[ExplainedModel], None], subjects: Sequence[ExplainedModel]
    ) -> list[ExplainedModel]:
        """The subjects that support ``part``; adds notes about the others, or raises an error if it was requested."""
        if not self.settings.wants(part):
            return []
        able = []
        for subject in subjects:
            try:
                check(subject)
                able.append(subject)
            except UsageError as problem:
                if subject.model is not None:  # for a plain backbone, its first run gives the same note
                    self.settings.leave_out(part, str(problem), self.notes, subject.name)
        return able

    def _check_heads(self) -> None:
        heads = self.settings.heads
        for subject in self.attending:
            count = int(getattr(subject.backbone, "num_heads"))  # noqa: B009  # every readable backbone has heads
            if isinstance(heads, int) and not 0 <= heads < count:
                raise UsageError(f"no head {heads}: {subject.backbone.name} has {count}, counted from 0")

    def _check_target(self) -> None:
        target = self.settings.target
        if target is None:
            return
        if not self.answering:
            raise UsageError(f"label {target!r}: none of the runs predicts a class of the whole image")
        for run in self.answering:
            choose(f"label of {run.name}", target, run.run()[0].labels)

    def explain(self, picture: Picture) -> Explained:
        """Draw one image.

        Raises:
            UsageError: the token or point is outside the image, or all runs lack a prompt map to compare it with.
        """
        seen = [
            _Seen(one, model_input(one.preprocess, picture.image, one.device), view(one.preprocess, picture.image))
            for one in self.subjects
        ]
        result = Explained()
        self._attention(result, [one for one in seen if one.subject in self.attending])
        self._predictions(result, [one for one in seen if one.subject in self.answering])
        self._similarity(result, [one for one in seen if one.subject in self.runs], picture)
        return result

    # ------------------------------------------------------------ attention

    def _attention(self, result: Explained, seen: Sequence[_Seen]) -> None:
        if not seen:
            return
        found = {id(one): block_attention(one.subject, one.images, self.layers[id(one.subject)]) for one in seen}
        layers = sorted({layer for one in seen for layer in self.layers[id(one.subject)]})
        heads = self.settings.heads
        if heads == "each":
            for one in seen:
                rows = _rows_by_head(one, found[id(one)])
                part = f"attention-{_file_name(one.subject.name)}"
                result.figures[part] = drawing.maps_figure(rows, layers, f"attention of {one.subject.name} by head")
        else:
            rows = [
                drawing.MapRow(
                    one.subject.name, one.view, {at: _of_heads(block, heads) for at, block in found[id(one)].items()}
                )
                for one in seen
            ]
            which = "mean over heads" if heads == "mean" else f"head {heads}"
            result.figures["attention"] = drawing.maps_figure(rows, layers, f"attention by layer, {which}")
        result.values["attention"] = {}
        for one in seen:
            shares = {layer: block.shares() for layer, block in found[id(one)].items()}
            result.values["attention"][one.subject.name] = {str(layer): share for layer, share in shares.items()}
            for layer, share in shares.items():
                kept = self._shares.setdefault(one.subject.name, {})
                kept.setdefault(layer, []).append(share["prompts"])

    def prompt_shares(self) -> dict[str, dict[int, float]]:
        """Mean share of the attention to prompts over the images so far, by layer, for each run with prompts."""
        means = {
            name: {layer: sum(values) / len(values) for layer, values in layers.items()}
            for name, layers in self._shares.items()
        }
        return {name: layers for name, layers in means.items() if any(layers.values())}

    # ------------------------------------------------------------- Grad-CAM

    def _predictions(self, result: Explained, seen: Sequence[_Seen]) -> None:
        """Each run's answer, and Grad-CAM of that class or of the requested one."""
        panels = []
        result.values["predictions"], result.values["grad_cam"] = {}, {}
        for one in seen:
            model, state = one.subject.run()
            with torch.no_grad():
                probabilities = model.forward_state(one.images, state).logits[0].float().softmax(dim=-1)
            best = int(probabilities.argmax())
            result.values["predictions"][one.subject.name] = {
                "label": model.labels[best],
                "probability": float(probabilities[best]),
            }
            if one.subject not in self.weighed:
                continue
            target = best if self.settings.target is None else model.labels.index(self.settings.target)
            heat = grad_cam(model, state, one.images, target)[0]
            caption = f"{model.labels[target]} {float(probabilities[target]):.0%}"
            if not bool(heat.any()):
                caption += ", nothing for it"
            panels.append(drawing.CamPanel(one.subject.name, caption, one.view, heat))
            result.values["grad_cam"][one.subject.name] = model.labels[target]
        if panels:
            result.figures["grad-cam"] = drawing.cam_figure(panels, "Grad-CAM, last layer")

    # ----------------------------------------------------------- similarity

    def _similarity(self, result: Explained, seen: Sequence[_Seen], picture: Picture) -> None:
        settings = self.settings
        if not settings.wants("similarity"):
            return
        rows, values, told = [], {}, False
        for one in seen:
            model, state = one.subject.run()
            image, prompts = record_maps(model, state, one.images)
            layers = [layer for layer in self.layers[id(one.subject)] if layer in image]
            if not layers:
                if image:
                    reason = f"its prompt map is in layers {min(image)} to {max(image)}"
                    settings.leave_out("similarity", reason, self.notes, one.subject.name)
                    told = True
                continue
            grid = grid_of(one.subject.backbone, layers[0])
            number = number_of(settings.token, grid)
            if settings.point is not None:
                number = _at_point(one.subject, picture, settings.point, grid)
            maps = {layer: cosine_map(image[layer], prompts[layer], number, grid) for layer in layers}
            token = (number // grid[1], number % grid[1])
            rows.append(drawing.MapRow(one.subject.name, one.view, maps, token))
            values[one.subject.name] = {
                "token": list(token),
                "cosine": {
                    str(layer): {"least": float(one.min()), "most": float(one.max())} for layer, one in maps.items()
                },
            }
        if rows:
            layers = sorted({layer for row in rows for layer in row.maps})
            title = "cosine of the framed image token with every token of the prompt map"
            result.figures["similarity"] = drawing.similarity_figure(rows, layers, title)
            result.values["similarity"] = values
        elif not told:
            reason = "none of the runs has a prompt map to compare a token with; sa2vp has one"
            settings.leave_out("similarity", reason, self.notes)


def _at_point(subject: ExplainedModel, picture: Picture, point: tuple[float, float], grid: tuple[int, int]) -> int:
    try:
        return token_of(subject.preprocess, picture.image.size, point, grid)
    except UsageError as problem:
        raise UsageError(f"{picture.source}: {problem}") from None


def _of_heads(block: BlockAttention, heads: str | int) -> Tensor:
    """The map of the first image, [R, C], of one head or the mean over all."""
    maps = block.maps[0]  # [H, R, C]
    return maps[heads] if isinstance(heads, int) else maps.mean(dim=0)


def _rows_by_head(seen: _Seen, blocks: Mapping[int, BlockAttention]) -> list[drawing.MapRow]:
    heads = next(iter(blocks.values())).weights.shape[1]
    return [
        drawing.MapRow(f"head {head}", seen.view, {layer: _of_heads(block, head) for layer, block in blocks.items()})
        for head in range(heads)
    ]


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
