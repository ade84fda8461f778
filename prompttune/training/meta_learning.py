"""Meta-learning of DAM-VP's initial prompt: Reptile over the clusters of several data sets.

This follows section 3.3 of the paper, in the form of the released code that also trains heads
(``meta-training/meta_ht.py`` of https://github.com/shikiw/DAM-VP). In each step every data set gives a batch; all its
clusters' prompts start from the common one and take a few SGD steps on that batch together with the data set's own
head, which is kept for the next step; then the common prompt moves towards the mean of all resulting prompts.
Deviations: the last prompt is kept, not that of the step with the lowest loss (it depends on the step's batches);
no weight decay.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.checkpoints.meta_prompt import write_prompt
from prompttune.data import CorruptImages, EpochLoader, load_data, make_loader, on_device
from prompttune.data.rng import derive_seed
from prompttune.errors import DataError, TrainingError, UsageError
from prompttune.files import locked
from prompttune.methods.damvp.config import DAMVPConfig
from prompttune.methods.damvp.method import DAMVP
from prompttune.model import PromptModel
from prompttune.settings import setting, settle

logger = logging.getLogger("prompttune")
MAX_CORRUPT = 10
"""Number of unreadable images to tolerate in a data set."""


@dataclass(frozen=True, kw_only=True)
class MetaSettings:
    """Settings of the meta-learning; the defaults are the released code's arguments."""

    steps: int = setting(200, "Number of moves of the common prompt", low=1)
    inner_steps: int = setting(8, "Number of SGD steps of a data set's prompts in each move", low=1)
    lr: float = setting(1.0, "Learning rate of the prompts in the inner steps; falls to 0 along a cosine", above=0)
    head_lr: float = setting(0.1, "Learning rate of the heads", above=0)
    step_size: float = setting(1.0, "Share of the way to the mean of the other prompts in each move", above=0)
    batch_size: int = setting(64, "Number of images of a data set in each step", low=1)
    seed: int = setting(0, "Seed of order and initialisation", low=0)

    def __post_init__(self) -> None:
        settle(self)


def learn_prompt(
    backbone: Backbone,
    data: Sequence[str],
    output: str | Path,
    *,
    config: DAMVPConfig | None = None,
    settings: MetaSettings | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
) -> list[float]:
    """Meta-learn a prompt and write it to a file for ``DAMVPConfig(meta_init=...)``.

    Args:
        backbone: a frozen backbone; the prompt fits only this one.
        data: data sets, as for training; their training images are used.
        output: path of the file to write.
        config: settings of border and clustering.
        settings: steps and learning rates.
        device: device to compute on.
        on_step: called with the number of finished steps and the mean loss of the last one, before its inner steps.

    Returns:
        The mean loss over the data sets before each step's inner steps.

    Raises:
        UsageError: the list of data sets is empty, or the output is a folder.
        DataError: a data set cannot be read.
        TrainingError: the loss is not finite.
    """
    target, settings = Path(output), settings or MetaSettings()
    if not data:
        raise UsageError("meta-learning needs at least one data set")
    if target.is_dir():
        raise UsageError(f"the output {target} is a folder: name a file")
    with locked(target):
        torch.manual_seed(derive_seed("meta", settings.seed))
        backbone = backbone.to(device)
        config = (config or DAMVPConfig()).resolved(backbone)
        tasks = [_MetaTask(backbone, config, name, settings, torch.device(device)) for name in data]
        prompt = tasks[0].method.prompts.detach()[0].clone()  # [3, P]
        losses: list[float] = []
        for step in range(settings.steps):
            lr = settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2
            moved, before = zip(*(task.adapt(prompt, lr, settings) for task in tasks), strict=True)
            prompt = prompt + settings.step_size * (torch.cat(moved).mean(dim=0) - prompt)
            losses.append(sum(before) / len(before))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss is {losses[-1]} at step {step + 1}; try a lower --lr (it was {lr:.3g} here)"
                )
            on_step(step + 1, losses[-1])
        made: dict[str, Any] = {"data": list(data), **asdict(settings), "losses": losses}
        assert config.prompt_size is not None
        write_prompt(target, prompt, backbone, config.prompt_size, made)
        return losses


class _MetaTask:
    """A data set with its clusters, and its head, which is kept through all steps."""

    def __init__(
        self, backbone: Backbone, config: DAMVPConfig, data: str, settings: MetaSettings, device: torch.device
    ) -> None:
        found = load_data(data, seed=settings.seed)
        if not len(found.train):
            raise DataError(f"{data} gives no training image")
        self.model = PromptModel(backbone, config, labels=found.classes).to(device)
        assert isinstance(self.model.method, DAMVP)
        self.method = self.model.method
        self.device = device
        self.loader = make_loader(
            found.train,
            self.model.preprocess.transform(),
            batch_size=settings.batch_size,
            shuffle=True,
            seed=derive_seed("meta", settings.seed),
        )
        corrupt = CorruptImages(MAX_CORRUPT)
        self.method.begin_training(on_device(self.loader, device, corrupt))
        for line in corrupt.lines:
            logger.warning("unreadable image: %s", line)
        self.batches = _forever(self.loader, device)
        self.criterion = nn.CrossEntropyLoss()

    def adapt(self, prompt: Tensor, lr: float, settings: MetaSettings) -> tuple[Tensor, float]:
        """Prompts [K, 3, P] after inner steps from ``prompt``, and the loss before them."""
        with torch.no_grad():
            self.method.prompts.copy_(prompt)
        optimizer = torch.optim.SGD(
            [
                {"params": [self.method.prompts], "lr": lr},
                {"params": self.model.head.parameters(), "lr": settings.head_lr},
            ]
        )
        images, targets = next(self.batches)
        losses = []
        for _ in range(settings.inner_steps):
            loss = self.criterion(self.model(images).logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return self.method.prompts.detach().clone(), losses[0]


def _forever(loader: EpochLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        epoch, seen = epoch + 1, False
        for pair in on_device(loader, device):
            seen = True
            yield pair
        if not seen:
            raise DataError("no training image could be read")
