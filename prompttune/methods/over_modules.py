"""LoRA, SSF, BitFit, adapters and AdaptFormer over any timm model: the task joins in at the model's own modules.

timm's forward runs as it is, and forward hooks add the task's part to what a module gives. The modules are found by
running the model once, on two images of which the first is NaN: where that shows in the first half of a
tensor's rows alone, the rows lie by image, those of windows too, and each can take the task of its own image. A module
that runs more than once or on constants stays as it is.

A **part** is a module that keeps the shape of what it reads, with two or more linear layers or convolutions at its own
places, and no part in it: an attention, an MLP, or a residual block of convolutions.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.conv import ConvBackbone
from prompttune.backbones.plain import PlainBackbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.backbones.vit import VitBackbone
from prompttune.errors import BackboneError
from prompttune.methods.adapter import INIT_STD, AdapterConfig
from prompttune.methods.adaptformer import AdaptFormerConfig
from prompttune.methods.base import RANK, Features, Layout, Levels, Method, MethodConfig, State, implements
from prompttune.methods.lora import LoRAConfig
from prompttune.methods.ssf import INIT_STD as SSF_STD
from prompttune.methods.ssf import SSFConfig

LAYERS = (nn.Linear, nn.Conv2d)
LIST = 16  # sizes of one split, see divide


@dataclass(frozen=True)
class Site:
    """A module that runs once, as it ran on two images with n rows each: [2 n, ..., C], or maps [2 n, C, R, C']."""

    name: str
    module: Any
    read: tuple[int, ...]
    gives: tuple[int, ...]
    axis: int = -1
    """Axis of the channels: 1 in maps, else the last."""

    @property
    def width(self) -> int:
        """Channels of what it gives."""
        return self.gives[self.axis]

    @property
    def places(self) -> int:
        """Vectors of channels that it gives for an image."""
        return math.prod(self.gives) // (2 * self.width)

    def flat(self, x: Tensor) -> Tensor:
        """[B, places, C], of maps [n B, C, places / n]."""
        return x.flatten(2) if self.axis == 1 else x.reshape(-1, self.places, x.shape[-1])

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The channels of a :meth:`flat` x times weights [1 or B, C, C']."""
        weight = self.each(weight)
        return weight.transpose(1, 2) @ x if self.axis == 1 else x @ weight

    def along(self, vector: Tensor) -> Tensor:
        """A vector [1 or B, C] for each place of :meth:`flat`."""
        return self.each(vector).unsqueeze(2 if self.axis == 1 else 1)

    def each(self, tensor: Tensor) -> Tensor:
        """A state tensor [1 or B, ...] for each row of :meth:`flat`."""
        rows = self.gives[0] // 2 if self.axis == 1 else 1
        return tensor if rows == 1 or tensor.shape[0] == 1 else tensor.repeat_interleave(rows, dim=0)


Sites = dict[str, Site]
_known: weakref.WeakKeyDictionary[Backbone, Sites] = weakref.WeakKeyDictionary()


def sites_of(backbone: Backbone) -> Sites:
    """The modules that run once and whose rows lie by image, by name.

    Raises:
        BackboneError: the model mixes the images of a batch, or its features are not finite.
    """
    if backbone in _known:
        return _known[backbone]
    calls: dict[str, list[Site | None]] = {}

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        fits = args and all(isinstance(one, Tensor) and _by_image(one) for one in (args[0], output))
        found = Site(name, module, tuple(args[0].shape), tuple(output.shape)) if fits else None
        calls.setdefault(name, []).append(found)

    side, device = backbone.image_size, next(backbone.model.parameters()).device
    images = torch.arange(2 * 3 * side**2, device=device).sin().reshape(2, 3, side, side)
    images[0] = torch.nan
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, module in backbone.model.named_modules():
            hooks.callback(module.register_forward_hook(partial(watch, name)).remove)
        features = backbone.run_timm(images)
    if not _by_image(features):
        raise BackboneError(f"{backbone.name}: NaN in one image does not stay in its own rows, so no task can join")
    return _known.setdefault(backbone, {name: one for name, (one, *more) in calls.items() if one and not more})


def _by_image(tensor: Tensor) -> bool:
    """Whether what is not a number shows in the first half of the rows alone; shapes alone are not held to it."""
    paired = tensor.ndim > 1 and len(tensor) % 2 == 0
    if tensor.is_meta or not paired:
        return paired
    first, second = tensor.isnan().flatten(1).any(dim=1).chunk(2)
    return bool(first.any()) and not second.any()


def layers_of(sites: Sites, grouped: bool = False) -> list[tuple[Site, Any]]:
    """Linear layers and convolutions, if asked also those of channels in groups; with their modules."""
    layers = [one for one in sites.values() if isinstance(one.module, LAYERS)]
    layers = [replace(one, axis=1) if isinstance(one.module, nn.Conv2d) else one for one in layers]
    return [(one, one.module) for one in layers if grouped or getattr(one.module, "groups", 1) == 1]


def norms_of(sites: Sites, model: nn.Module) -> Iterator[tuple[Site, Any]]:
    """Each norm with a weight for each channel; the site is in front of an activation that timm keeps in the norm."""
    for name, norm in model.named_modules():
        kind, site = type(norm), sites.get(f"{name}.drop" if hasattr(norm, "act") else name)
        weight = getattr(norm, "weight", None)
        if site and weight is not None and "norm" in kind.__name__.lower():
            maps = issubclass(kind, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) or "2d" in kind.__name__
            site = replace(site, axis=1) if maps and len(site.gives) > 2 else site
            if weight.shape == (site.width,):
                yield site, norm


def attends(module: nn.Module) -> bool:
    """Whether timm says that a module attends."""
    return hasattr(module, "num_heads") or hasattr(module, "heads") or "Attention" in type(module).__name__


def attention_layers(sites: Sites, model: nn.Module) -> list[Site]:
    """The layers in the innermost modules that attend."""
    layers = [site for site, _ in layers_of(sites)]
    around = [f"{name}." for name, one in model.named_modules() if name and attends(one)]
    around = [name for name in around if any(one.name.startswith(name) for one in layers)]
    around = [name for name in around if not any(other != name and other.startswith(name) for other in around)]
    return [one for one in layers if one.name.startswith(tuple(around))]


def parts_of(sites: Sites) -> list[Site]:
    """The parts, see the module's docstring."""
    found: list[Site] = []
    places = {one.name: one.places for one, _ in layers_of(sites, grouped=True)}
    for site in sites.values():
        layers = {f"{site.name}.{name}": one for name, one in site.module.named_modules() if isinstance(one, LAYERS)}
        if len(layers) > 1 and site.read == site.gives and type(site.module) is not nn.Sequential:
            maps = len(site.gives) == 4 and isinstance(next(iter(layers.values())), nn.Conv2d)
            site = replace(site, axis=1 if maps else -1)
            here = [name for name in layers if places.get(name, site.places) >= site.places]
            found += [site] if len(here) > 1 else []
    return [one for one in found if not any(other.name.startswith(f"{one.name}.") for other in found)]


class OverModules(Method):
    """Base: :meth:`find` chooses the sites, and :meth:`join` computes at one with its share of the state."""

    backbones: ClassVar[tuple[type[Backbone], ...]] = (SwinBackbone, ConvBackbone, PlainBackbone)
    rank_axes: ClassVar[Mapping[str, int]] = {"down": 1, "down_bias": 1, "up": 0}
    """Axis of the ranks in a parameter; the other one is divided among the sites."""

    def __init__(self, config: MethodConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.sites = self.find(sites_of(backbone), backbone.model)
        if not self.sites:
            raise BackboneError(f"{config.method} finds no module of {backbone.name} that a task could join")
        self.widths = [one.width for one in self.sites]
        self.sizes: dict[str, list[int]] = {}  # of the parts of a parameter, if not the widths

    def find(self, sites: Sites, model: nn.Module) -> list[Site]:
        """The sites, of all modules that run once."""
        raise NotImplementedError

    def join(self, site: Site, x: Tensor, y: Tensor, *share: Tensor) -> Tensor:
        """What a module that read x gives in the place of y; ``share`` are its tensors [1 or B, ...]."""
        raise NotImplementedError

    def task_state(self) -> State:
        """The parameters with leading dimension 1."""
        return {name: tensor.unsqueeze(0) for name, tensor in self.named_parameters()}

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        return {
            name: tuple(RANK if axis == self.rank_axes.get(name) else size for axis, size in enumerate(tensor.shape))
            for name, tensor in self.named_parameters()
        }

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`: timm's own forward, with hooks that act in this thread alone."""
        shares = (
            divide(state[name], self.sizes.get(name, self.widths), 1 + (self.rank_axes.get(name) == 0))
            for name, _ in self.named_parameters()
        )
        modules = dict(self.driven.model.named_modules())  # export puts others in the place of norms
        with contextlib.ExitStack() as hooks:
            for site, *share in zip(self.sites, *shares, strict=True):
                hook = partial(self._hook, threading.get_ident(), site, share)
                hooks.callback(modules[site.name].register_forward_hook(hook).remove)
            return Features(self.driven.run_timm(image["image"]))

    def _hook(
        self, thread: int, site: Site, share: list[Tensor], _module: nn.Module, args: tuple[Any, ...], y: Tensor
    ) -> Tensor:
        if threading.get_ident() != thread:
            return y
        return self.join(site, args[0], y, *share).reshape(y.shape).to(y.dtype)


def divide(tensor: Tensor, sizes: list[int], axis: int) -> list[Tensor]:
    """Parts of these sizes; a long list would be stored beside an ONNX file, where ONNX Runtime does not read it."""
    if len(sizes) <= LIST:
        return list(tensor.split(sizes, axis))
    groups = [sizes[at : at + LIST] for at in range(0, len(sizes), LIST)]
    wholes = divide(tensor, [sum(group) for group in groups], axis)
    return [part for whole, group in zip(wholes, groups, strict=True) for part in whole.split(group, axis)]


@implements(LoRAConfig)
class LoRAOverModules(OverModules):
    """``down`` [I, r] and ``up`` [r, O]: I inputs, O outputs of all layers. As in PEFT, a convolution is updated by one
    to r channels and one of 1 x 1; its inputs are channels times the places of its kernel."""

    config: LoRAConfig

    def __init__(self, config: LoRAConfig, backbone: Backbone) -> None:
        config.require(config.targets == "qv", "targets needs a ViT; elsewhere all layers of an attention are adapted")
        super().__init__(config, backbone)
        self.sizes = {"down": [math.prod(one.module.weight.shape[1:]) for one in self.sites]}
        self.down = _drawn(self.sizes["down"], config.rank)
        self.up = nn.Parameter(torch.zeros(config.rank, sum(self.widths)))

    def find(self, sites: Sites, model: nn.Module) -> list[Site]:
        """The layers of attention; all layers of a model without it."""
        return attention_layers(sites, model) or [site for site, _ in layers_of(sites)]

    def task_state(self) -> State:
        """``down`` [1, I, r] and ``up`` [1, r, O] times α / r."""
        state = super().task_state()
        return state | {"up": self.config.alpha / self.config.rank * state["up"]}

    def join(self, site: Site, x: Tensor, y: Tensor, *share: Tensor) -> Tensor:
        """y plus the low-rank product."""
        x = F.dropout(x, self.config.dropout, self.training)
        seen = seen_by(site, x) if site.axis == 1 else site.flat(x)
        return y + site.product(site.product(seen, share[0]), share[1]).reshape(y.shape)


def seen_by(site: Site, x: Tensor) -> Tensor:
    """What a convolution's kernel sees at each place: [n B, C, R, C'] to [n B, C kernel, places / n]."""
    conv, padding, spans = site.module, list[int](), list[list[slice]]()
    for axis in (0, 1):
        kernel, stride, wide = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        reach = (site.gives[2 + axis] - 1) * stride + 1
        missing = reach + wide * (kernel - 1) - site.read[2 + axis]
        begin = 0 if isinstance(conv.padding, str) else conv.padding[axis]
        begin = begin if missing <= 2 * begin else missing // 2  # TensorFlow's padding, which timm adds itself
        padding = [begin, max(0, missing - begin), *padding]
        spans.append([slice(wide * at, wide * at + reach, stride) for at in range(kernel)])
    x = F.pad(x, padding) if any(padding) else x
    seen = [x[..., rows, columns].flatten(2) for rows in spans[0] for columns in spans[1]]
    return torch.stack(seen, dim=2).flatten(1, 2)  # [n B, C, kernel, places / n] before


def _drawn(widths: list[int], rank: int) -> nn.Parameter:
    """Weights [C, r], as torch draws linear layers."""
    return nn.Parameter(torch.cat([torch.empty(width, rank).uniform_(-1, 1) / width**0.5 for width in widths]))


@implements(SSFConfig)
class SSFOverModules(OverModules):
    """``scale`` and ``shift`` [C] for the channels of all linear layers, convolutions and norms."""

    def __init__(self, config: MethodConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.scale = nn.Parameter(torch.empty(sum(self.widths)).normal_(1.0, SSF_STD))
        self.shift = nn.Parameter(torch.empty(sum(self.widths)).normal_(0.0, SSF_STD))

    def find(self, sites: Sites, model: nn.Module) -> list[Site]:
        """Every linear layer, convolution and norm."""
        return [site for site, _ in (*layers_of(sites, grouped=True), *norms_of(sites, model))]

    def join(self, site: Site, x: Tensor, y: Tensor, *share: Tensor) -> Tensor:  # noqa: ARG002
        """y, scaled and shifted."""
        return torch.add(site.flat(y) * site.along(share[0]), site.along(share[1]))


@dataclass(frozen=True)
class BitFitConfig(MethodConfig):
    """BitFit has no settings of its own."""

    method = "bitfit"
    summary = "Biases of the frozen layers, one set for each task"
    paper = "https://arxiv.org/abs/2106.10199"


@implements(BitFitConfig)
class BitFit(OverModules):
    """``shift`` [C], what is added to the biases of all linear layers, convolutions and norms that have one."""

    backbones = (VitBackbone, SwinBackbone, ConvBackbone, PlainBackbone)

    def __init__(self, config: MethodConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.shift = nn.Parameter(torch.zeros(sum(self.widths)))

    def find(self, sites: Sites, model: nn.Module) -> list[Site]:
        """Every linear layer, convolution and norm with a bias."""
        pairs = (*layers_of(sites, grouped=True), *norms_of(sites, model))
        return [site for site, owner in pairs if _has_bias(site, owner, model)]

    def join(self, site: Site, x: Tensor, y: Tensor, *share: Tensor) -> Tensor:  # noqa: ARG002
        """y, shifted."""
        return torch.add(site.flat(y), site.along(share[0]))


def _has_bias(site: Site, owner: Any, model: nn.Module) -> bool:
    """Whether a layer has a bias, or the attention around it one for queries and one for values."""
    around = model.get_submodule(site.name.rpartition(".")[0])
    return any(getattr(one, name, None) is not None for one, name in ((owner, "bias"), (around, "q_bias")))


@implements(AdapterConfig)
class AdapterOverModules(OverModules):
    """``down`` [C, r] and ``up`` [r, C] for the channels of all parts, ``down_bias`` [parts, r], ``up_bias`` [C]."""

    config: AdapterConfig | AdaptFormerConfig

    def __init__(self, config: AdapterConfig | AdaptFormerConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.sizes = {"down_bias": [1] * len(self.sites)}
        self.down = _drawn(self.widths, config.rank)
        self.down_bias = nn.Parameter(torch.zeros(len(self.sites), config.rank))
        self.up = nn.Parameter(torch.zeros(config.rank, sum(self.widths)))
        self.up_bias = nn.Parameter(torch.zeros(sum(self.widths)))
        if isinstance(config, AdapterConfig):
            for weight in (self.down, self.up):
                nn.init.trunc_normal_(weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)

    def find(self, sites: Sites, model: nn.Module) -> list[Site]:  # noqa: ARG002
        """All parts."""
        return parts_of(sites)

    def join(self, site: Site, x: Tensor, y: Tensor, *share: Tensor) -> Tensor:  # noqa: ARG002
        """y + up(GELU(down(y))), behind a part."""
        return y + self.bottleneck(site, y, F.gelu, *share)

    def bottleneck(self, site: Site, x: Tensor, act: Callable[[Tensor], Tensor], *share: Tensor) -> Tensor:
        """up(act(down(x))), in the shape of x."""
        down, down_bias, up, up_bias = share
        hidden = act(site.product(site.flat(x), down) + site.along(down_bias.flatten(1)))
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        return torch.add(site.product(hidden, up), site.along(up_bias)).reshape(x.shape)


@implements(AdaptFormerConfig)
class AdaptFormerOverModules(AdapterOverModules):
    """Beside each part without attention, on what the part reads."""

    config: AdaptFormerConfig

    def find(self, sites: Sites, model: nn.Module) -> list[Site]:
        """The parts without attention."""
        return [one for one in super().find(sites, model) if not any(map(attends, one.module.modules()))]

    def task_state(self) -> State:
        """``up`` and its bias times s."""
        state = super().task_state()
        return state | {name: self.config.adapter_scale * state[name] for name in ("up", "up_bias")}

    def join(self, site: Site, x: Tensor, y: Tensor, *share: Tensor) -> Tensor:
        """y + s up(ReLU(down(x)))."""
        return y + self.bottleneck(site, x, F.relu, *share)
