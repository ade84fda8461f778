"""Interface of every frozen backbone, whatever its architecture."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from prompttune.backbones.blocks import Constant, FrozenBlock, Stage
from prompttune.errors import UsageError
from prompttune.images.preprocess import OWN_CROP, Preprocess
from prompttune.layers.attention import is_explicit
from prompttune.layers.probe import probe

Staged = TypeVar("Staged", bound=FrozenBlock)


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 over sorted tensor names, dtypes, shapes and bytes.

    The weights are those of the source, before position embeddings are resampled to the image size: resampling may
    differ in the last bit between machines, the source does not.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Backbone(nn.Module):
    """A frozen timm model. Its parameters never train and it never leaves evaluation mode.

    ``forward(images [B, 3, S, S])`` returns the pooled features [B, D] of the plain model, which a linear probe reads.
    The methods drive the parts of a concrete class (:class:`prompttune.backbones.vit.VitBackbone`).
    """

    name: str
    """timm's model name, as requested."""
    image_size: int
    """Side of the square input, in pixels."""
    width: int
    """Channels D of the pooled features."""
    depth: int
    """Number of blocks."""
    blocks: tuple[FrozenBlock, ...] = ()
    """The blocks in pieces; empty if the backbone only runs as a whole."""
    grid: tuple[int, int]
    """Rows and columns of the patch map, or of the map after a convolutional stem."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    """Resizing filter that the weights were trained with."""
    crop_mode: str = "center"
    crop_pct: float = 1.0
    """The crop that the weights' publishers evaluate with; ours is ``squash`` at 1.0."""
    weights: str
    """Value for ``load_backbone(weights=...)`` that loads the same weights again."""
    weights_source: str
    """Description of the weights' source, for people."""
    fingerprint: str
    """See :func:`fingerprint_of`."""
    limits: str = ""
    """Reason why the model runs only as a whole; empty if it runs in pieces."""
    is_tuned: bool = False
    """Whether these are the weights of one task, made by a method that trains the backbone itself."""

    token_dtype: torch.dtype | None = None
    """Type of the tokens before the blocks; None for that of the blocks' weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        part: Any
        for part in model.modules():
            if hasattr(part, "qkv_bias_separate"):  # otherwise timm reads a layer's weights and does not call it
                part.qkv_bias_separate = True
        super().train(False)

    @contextlib.contextmanager
    def matrices_in(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Hold the weights of linear layers and convolutions in the type that autocast casts them to in every forward.

        For forwards under autocast to ``dtype``, whose results stay the same to the bit; None changes nothing. The
        weights are what they were when the block ends.
        """
        held = (one for one in self.model.modules() if dtype is not None and isinstance(one, (nn.Linear, nn.Conv2d)))
        kept = {layer.weight: layer.weight.data for layer in held}
        try:
            for weight, values in kept.items():
                weight.data, self.token_dtype = values.to(dtype), values.dtype
            yield
        finally:
            self.token_dtype = None
            for weight, values in kept.items():
                weight.data = values

    def check_images(self, images: Tensor) -> None:
        """Check the type and shape of normalised images; a traced graph skips the check.

        Raises:
            UsageError: the images are not floats [B, 3, image_size, image_size]; the message says what to do.
        """
        size = self.image_size
        wanted = f"{getattr(self, 'name', type(self).__name__)} takes normalised float images [B, 3, {size}, {size}]"
        if not isinstance(images, Tensor):
            raise UsageError(f"{wanted}, not {type(images).__name__}: make a tensor with model.preprocess.transform()")
        shape = list(images.shape)
        hint = "make them with model.preprocess.transform(), or load the backbone with their image_size"
        if not images.is_floating_point():
            raise UsageError(f"{wanted}, not {images.dtype}: make them with model.preprocess.transform()")
        if images.dim() == 4 and images.shape[1:] == (3, size, size):
            return
        if images.dim() == 3:
            hint = "add the batch axis with images[None]"
        elif images.dim() == 4 and images.shape[3] == 3 != images.shape[1]:
            hint = "put the channels second with images.permute(0, 3, 1, 2)"
        raise UsageError(f"{wanted}, not {shape}: {hint}")

    def train(self, mode: bool = True) -> Backbone:  # noqa: ARG002
        """Stay in evaluation mode: dropout and similar layers belong to the methods."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Backbone:
        """Let the weights train, or freeze them with every :class:`Constant` at its current value."""
        super().requires_grad_(requires_grad)
        for part in self.modules():
            if isinstance(part, Constant):
                part.freeze(not requires_grad)
        return self

    def default_preprocess(
        self,
        normalisation: str = "backbone",
        crop_mode: str = "squash",
        crop_pct: float = 1.0,
        interpolation: str | None = None,
    ) -> Preprocess:
        """The evaluation transform of these weights: resize to ``image_size``, the weights' own mean and std.

        Args:
            normalisation: one of ``preprocess.NORMALISATIONS``.
            crop_mode: one of ``preprocess.CROP_MODES``, or ``backbone`` for :attr:`crop_mode` and :attr:`crop_pct`.
            crop_pct: share of the resized image to keep.
            interpolation: resizing filter; None is the weights' own.

        Raises:
            UsageError: a name is unknown, or ``crop_pct`` is given beside the backbone's own.
        """
        if crop_mode == OWN_CROP:
            if crop_pct != 1.0:
                raise UsageError(f"crop mode {OWN_CROP} brings its own share ({self.crop_pct:g}): leave out crop_pct")
            crop_mode, crop_pct = self.crop_mode, self.crop_pct
        filtered = interpolation or self.interpolation
        own = Preprocess(self.image_size, self.mean, self.std, filtered, crop_pct=crop_pct, crop_mode=crop_mode)
        return own.normalised(normalisation)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features of the plain backbone.

        Args:
            images: normalised [B, 3, image_size, image_size].

        Returns:
            [B, D]; gradients are tracked only if the images need them.

        Raises:
            UsageError: images of another shape, see :meth:`check_images`.
        """
        raise NotImplementedError

    def run_timm(self, images: Tensor) -> Tensor:
        """The pooled features [B, D] of images, by timm's own forward."""
        model: Any = self.model
        features: Tensor = model.forward_head(model.forward_features(for_timm(model, images)), pre_logits=True)
        return features


def for_timm(model: nn.Module, images: Tensor) -> Tensor:
    """Images in the type of a model's first layer, for timm's own forward.

    Its attention takes the form of :func:`prompttune.layers.attention.attend`.
    """
    part: Any
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = not is_explicit()
    first = next((one.weight for one in model.modules() if isinstance(one, nn.Conv2d)), next(model.parameters()))
    return images.to(first.dtype)


class PatchBackbone(Backbone):
    """A backbone whose model cuts the image into patches, with timm's ``PatchEmbed`` or behind convolutions."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        embedding = model.patch_embed
        self.image_size = int(embedding.img_size[0])
        self.grid = (int(embedding.grid_size[0]), int(embedding.grid_size[1]))
        self.patch_size = int(embedding.feat_ratio())

    def embed_patches(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to patch tokens [B, R C, D], without prefix tokens and position embedding."""
        embedding: Any = self.model.patch_embed
        # The patch convolution may have a higher precision than the blocks.
        patches = embedding(images.to(next(embedding.parameters()).dtype)).flatten(1, -2)
        return cast(Tensor, patches.to(self.token_dtype or self.blocks[0].timm.attn.proj.weight.dtype))


class StagedBackbone(Backbone):
    """A backbone in stages, each with its own grid and width; blocks are numbered over all stages.

    ``depth`` counts all blocks, ``grid`` is the map that enters the first stage and ``width`` the channels of the
    pooled features. ``x`` is a map or its tokens.
    """

    stages: tuple[Stage[Any], ...]

    def set_stages(self, stages: Iterable[Stage[Staged]]) -> None:
        """Take the stages of the model, and their blocks."""
        self.stages = tuple(stages)
        self.blocks = tuple(block for stage in self.stages for block in stage.blocks)
        self.depth = len(self.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """See :meth:`Backbone.forward`."""
        self.check_images(images)
        return self.pool(self.run_stages(self.embed(images), range(len(self.stages))))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to what enters stage 0."""
        raise NotImplementedError

    def enter(self, number: int, x: Tensor) -> Tensor:
        """The layers between two stages, before stage ``number``; stage 0 may have none."""
        raise NotImplementedError

    def run_stages(self, x: Tensor, numbers: range) -> Tensor:
        """Whole stages with the layers before them."""
        for number in numbers:
            x = self.enter(number, x)
            for block in self.stages[number].blocks:
                x = block.run(x)
                probe(f"block{block.index}", x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """The model's own pooling with its norms, to [B, D]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Architecture:
    """One kind of timm model that :func:`load_backbone` can wrap."""

    models: tuple[type[nn.Module], ...]
    modules: tuple[str, ...]
    """timm modules with models that may be supported; each model is checked again after it is built."""
    problem: Callable[[Any], str]
    """Function of a model: the reason why it cannot be driven block by block; empty if it can."""
    wrap: Callable[[Any, str, int | None], Backbone]
    """Function of a model, its name and the image size or None: the backbone."""
    kind: type[Backbone]
    """Class of what :attr:`wrap` returns."""
    rename: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = lambda tensors, _model: tensors
    """timm's function from an author's tensors and a model to tensors with timm's names and shapes."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``timm.create_model``."""


def set_patch_input(model: Any, name: str, image_size: int | None, **settings: Any) -> None:
    """Resize a model that has a fixed image size to another; None keeps its own.

    Args:
        model: the timm model.
        name: its name, for errors.
        image_size: side of the square input in pixels.
        settings: further arguments of timm's ``set_input_size``.

    Raises:
        UsageError: the size is not a multiple of the patch size.
    """
    if image_size is None:
        return
    embedding: Any = getattr(model, "patch_embed", None)
    patch = int(embedding.feat_ratio()) if hasattr(embedding, "feat_ratio") else 1
    if image_size <= 0 or image_size % patch:
        nearest = max(patch, round(image_size / patch) * patch)
        raise UsageError(
            f"image size {image_size} is not a multiple of {name}'s patch size {patch}; nearest: {nearest}"
        )
    model.set_input_size((image_size, image_size), **settings)
