"""The interface of every method: what depends on the task alone, on the image alone, and on both.

``Method.task_state()`` computes everything that does not depend on the image, differentiably, with leading dimension 1.
``Method.image_state(images)`` computes everything that does not depend on the task; nothing in it trains.
``Method.forward(image, state)`` reads both: a task state has leading dimension 1 (one task for the batch) or a row for
each pair of an image and a task. Training, checkpoints, export and serving use only these three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from prompttune.axes import CLASSES as CLASSES
from prompttune.axes import CLUSTERS as CLUSTERS
from prompttune.axes import RANK as RANK
from prompttune.axes import Layout as Layout
from prompttune.axes import State as State
from prompttune.backbones.base import Backbone
from prompttune.errors import BackboneError, UsageError
from prompttune.settings import setting as setting
from prompttune.settings import settle

Kind = TypeVar("Kind", bound=Backbone, covariant=True)
Over = TypeVar("Over", bound="Method")
Levels = tuple[int, ...]
"""Blocks, in ascending order, whose patch tokens are read after them."""


class Features(NamedTuple):
    """Result of a method's forward."""

    features: Tensor
    """Pooled features of the base pathway, [B, D] with D :attr:`Method.width`; [B K, D] if K tasks read an image."""
    aux_features: Tensor | None = None
    """Pooled features of the prompt pathway, [B, D], if it exists and was requested."""
    maps: tuple[Tensor, ...] = ()
    """Normed patch tokens of the base pathway, [B, R C, D] for each requested level."""
    aux_maps: tuple[Tensor, ...] = ()
    """Normed patch tokens of the prompt pathway, if it exists and was requested."""


@dataclass(frozen=True)
class MethodConfig:
    """Base of the methods' settings: immutable, typed, checked on creation."""

    method: ClassVar[str]
    """The method's name on the command line."""
    summary: ClassVar[str] = ""
    """Summary of the method, in one line."""
    paper: ClassVar[str] = ""
    """Address of the paper; empty without one."""
    shapes_graph: ClassVar[tuple[str, ...]] = ()
    """Settings that change the traced graph; all tasks of an engine must share them."""
    shares_backbone: ClassVar[bool] = True
    """Whether the backbone's weights stay as they are, so that the tasks of one engine can share them."""
    start_file: ClassVar[str | None] = None
    """Setting that names a file with a prompt to start from, see :mod:`prompttune.checkpoints.meta_prompt`."""
    modules: ClassVar[tuple[type[Method], ...]] = ()
    """What computes the method, one module for each kind of backbone; :func:`implements` adds them."""

    def __post_init__(self) -> None:
        try:
            settle(self, strict=True)
        except UsageError as problem:
            raise UsageError(f"{self.method}: {problem}") from None
        self.check()

    def check(self) -> None:
        """Raise :class:`UsageError` if the settings contradict each other."""

    def resolved(self, backbone: Backbone) -> MethodConfig:  # noqa: ARG002
        """The same settings, with values that depend on the backbone filled in."""
        return self

    def check_epochs(self, epochs: int) -> None:
        """Raise :class:`UsageError` if a run of ``epochs`` epochs cannot train the method."""

    def build(self, backbone: Backbone) -> Method:
        """Make the module that holds one task's parameters over ``backbone``.

        Raises:
            BackboneError: no module drives this kind of backbone.
        """
        for module in self.modules:
            if isinstance(backbone, module.backbones):
                return module(self.resolved(backbone), backbone)
        known = ", ".join(kind.__name__ for module in self.modules for kind in module.backbones)
        limits = f": {backbone.limits}" if backbone.limits else ""
        raise BackboneError(f"{self.method} runs on {known}, not on {type(backbone).__name__}{limits}")

    @property
    def base_loss_weight(self) -> float:
        """λ of ``λ CE(base pathway) + (1 - λ) CE(prompt pathway)``; 1 without supervision of the prompt pathway."""
        return 1.0

    def graph_settings(self) -> dict[str, Any]:
        """The settings named in :attr:`shapes_graph`."""
        values = self.to_dict()
        return {name: values[name] for name in self.shapes_graph}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    def require(self, holds: bool, message: str) -> None:
        """Raise :class:`UsageError`, with the method's name first, unless ``holds``."""
        if not holds:
            raise UsageError(f"{self.method}: {message}")


class Method(nn.Module):
    """Parameters of one task over a frozen backbone, and the computation that uses them.

    The backbone is held by reference and is not a submodule: a method's ``state_dict`` and ``parameters`` belong to the
    task alone.
    """

    backbones: ClassVar[tuple[type[Backbone], ...]]
    """Backbone classes that the method can drive."""
    gives_maps_on: ClassVar[tuple[type[Backbone], ...]] = ()
    """Backbone classes on which :meth:`forward` gives the maps of its ``levels``, which segmentation needs."""
    only_reads: ClassVar[bool] = False
    """Whether the tasks only read the image state [B, ...], so that the K tasks of an image share it. Otherwise each
    pair of an image and a task is a row of its own, and an image state is repeated K times."""
    own_norms: ClassVar[tuple[str, ...]] = ()
    """Norms of a block whose output the method itself reads or changes. Only the block's own matrices read the other
    norms, so export may shift the scale of channels between the two."""

    config: MethodConfig
    """The task's settings; a subclass names their class."""

    def __init__(self, config: MethodConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self._backbone = (backbone,)  # a tuple hides it from nn.Module's registration

    @property
    def gives_maps(self) -> bool:
        """Whether :meth:`forward` gives maps here, see :attr:`gives_maps_on`."""
        return isinstance(self._backbone[0], self.gives_maps_on)

    def task_state(self) -> State:
        """Everything that does not depend on the image; differentiable; leading dimension 1."""
        raise NotImplementedError

    @torch.no_grad()
    def state_layout(self) -> Layout:
        """Shape of each tensor of :meth:`task_state`, see :data:`Layout`; by default no axis may differ by task."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.task_state().items()}

    @property
    def driven(self) -> Backbone:
        """The backbone that :meth:`forward` runs: the frozen one, unless the method trains its own copy."""
        return self._backbone[0]

    @property
    def width(self) -> int:
        """Channels of the features that :meth:`forward` gives; the head has as many columns."""
        return self.driven.width

    def leading_keys(self, index: int) -> int:  # noqa: ARG002
        """Number of keys before those of the tokens in the attention of block ``index``."""
        return 0

    def values_by_block(self) -> dict[str, dict[int, float]]:
        """Learned quantities with one meaningful value per block, by name and number of the block; usually empty.

        ``prompttune explain`` draws them as bars.
        """
        return {}

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """Everything that does not depend on the task, leading dimension B; the frozen backbone's work on an image.

        Args:
            images: normalised [B, 3, S, S].
            levels: blocks whose maps :meth:`forward` is to give.
        """
        return {"image": images}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:
        """Features of images under a task's state.

        Args:
            image: tensors of :meth:`image_state`, with leading dimension B.
            state: tensors of :meth:`task_state`, with leading dimension 1, or B for one task a row; with
                :attr:`only_reads` also B K, for K tasks of each image in turn.
            aux: whether to compute the prompt pathway's features too, if the method has one.
            levels: blocks whose maps of patch tokens to give too, see :attr:`gives_maps_on`.
        """
        raise NotImplementedError

    def begin_training(self, batches: Iterable[tuple[Tensor, Tensor]], start: Tensor | None = None) -> None:
        """Set up what depends on the training images; called once, before the first step of a run that is not resumed.

        It may replace parameters by others of another size, see :meth:`take_sizes`.

        Args:
            batches: the training images in evaluation transform, normalised [B, 3, S, S], and their class indices
                [B], on the device of the parameters, shuffled; they are read as far as they are iterated.
            start: the tensor in the file that :attr:`MethodConfig.start_file` names, if a file was given.
        """

    def start_from_loaded(self) -> None:
        """Called instead of :meth:`begin_training` if a run starts from another checkpoint's parameters."""

    def take_sizes(self, stored: Mapping[str, Tensor]) -> None:
        """Resize parameters whose size :meth:`begin_training` chose to that of ``stored`` ones, before these are
        loaded.

        Args:
            stored: tensors by the names of this module's parameters; tensors that do not fit are refused afterwards.
        """

    def own_backbone(self) -> Backbone | None:
        """The backbone with this task's own weights, if the method trains them: see ``shares_backbone``."""
        return None

    def end_epoch(self, epoch: int, epochs: int) -> bool:  # noqa: ARG002
        """Called after each training epoch, before validation; may change the method's parameters in place.

        Args:
            epoch: index of the epoch, counted from 0.
            epochs: number of epochs of the whole run.

        Returns:
            Whether the parameters were rewound: optimiser, schedule and the search for the best checkpoint then start
            again.
        """
        return False

    def parameters_left(self) -> int:
        """Number of trained parameters that the task still needs: all, unless the method has pruned some."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


class MethodOver(Method, Generic[Kind]):
    """A method that drives one kind of backbone, ``backbones = (Kind,)``, and sees it typed."""

    @property
    def backbone(self) -> Kind:
        """The frozen backbone; :class:`Method` has checked its kind."""
        return cast(Kind, self._backbone[0])


def implements(config: type[MethodConfig]) -> Callable[[type[Over]], type[Over]]:
    """Register the decorated module as what computes the method of ``config`` on :attr:`Method.backbones`."""

    def register(module: type[Over]) -> type[Over]:
        earlier = [one for one in vars(config).get("modules", ()) if one.__qualname__ != module.__qualname__]
        config.modules = (*earlier, module)  # a class that a notebook defines anew replaces the old one
        return module

    return register
